"""How announcements of one domain are compared, and what to tell people when they differ."""

from __future__ import annotations

from collections.abc import Mapping

from datadist.control.messages import Announce
from datadist.rank_table import parse_rank_table


def mutual(mine: Announce, own_cluster: int, theirs: Announce, their_cluster: int) -> bool:
    """Whether both want a domain of the same name with each other."""
    return (
        mine.name == theirs.name
        and their_cluster in dict(mine.ranks)
        and own_cluster in dict(theirs.ranks)
    )


def differences(mine: Announce, own_cluster: int, theirs: Announce, their_cluster: int) -> str:
    """What differs between two announcements, in words."""
    here, there = f"at cluster {own_cluster}", f"at cluster {their_cluster}"
    found = []
    if sorted(mine.ranks) != sorted(theirs.ranks):
        found.append(
            f"cluster_rank_info is {dict(mine.ranks)} {here} and {dict(theirs.ranks)} {there}"
        )
    if mine.table != theirs.table:
        try:
            other = parse_rank_table(theirs.table)
        except ValueError as error:
            found.append(f"the rank table {there} is not valid: {error}")
        else:
            found += parse_rank_table(mine.table).differences(other, here, there)
    return "; ".join(found) or "nothing that this release can name"


def disagreement(choices: Mapping[int, Announce], clusters: Mapping[int, int]) -> str | None:
    """Why ranks with the same mapping and table still can not link; None when they can.

    ``choices`` and ``clusters`` are by rank.
    """

    def listed(what: Mapping[int, str]) -> str:
        return ", ".join(
            f"cluster {clusters[rank]} (rank {rank}) {text}" for rank, text in sorted(what.items())
        )

    backends = {rank: announce.backend for rank, announce in choices.items()}
    if len(set(backends.values())) > 1:
        return (
            f"the ranks use different backends: {listed({r: f'uses {b}' for r, b in backends.items()})}"
            "; set the same transfer_backend (or DATADIST_BACKEND) everywhere"
        )
    modes = {rank: announce.one_sided for rank, announce in choices.items()}
    if len(set(modes.values())) > 1:
        texts = {rank: "has it on" if on else "has it off" for rank, on in modes.items()}
        return "enable_remote_cache_accessible must be equal on all ranks: " + listed(texts)
    return None
