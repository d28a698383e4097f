"""What a soak has compared, by kind of transfer, and what it should have compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from datadist.cli.tables import render


class Difference(NamedTuple):
    """Of one transfer, in bytes: those that it moved, those around them, and how many are wrong."""

    moved: int
    around: int
    wrong: int


@dataclass
class Compared:
    """The transfers of one kind whose bytes were compared."""

    transfers: int = 0
    moved: int = 0
    around: int = 0
    wrong: int = 0

    def add(self, found: Difference) -> None:
        """Count one more; one that compared nothing of what it moved does not count."""
        self.transfers += found.moved > 0
        self.moved += found.moved
        self.around += found.around
        self.wrong += found.wrong


EACH = (
    "pull", "pull_blocks", "push", "hand_over", "interrupt_pull", "interrupt_push", "call_in_handler",
)  # fmt: skip
"""Steps whose transfer succeeds, so that every one of them is compared."""
SOME = ("stop_in_pull",)
"""Steps whose transfer may fail as documented, but not always."""
TORN = {
    "stop_in_pull": "the pull failed meanwhile: each byte may be the old or the new one, no other",
    "kill_in_pull": "the owner was killed meanwhile: each byte may be the old or the new one, no other",
    "kill_in_push": "the target was killed, and its memory with it; the source is compared",
}
"""Steps whose transfer may be cut off, and what is not compared of it then."""


def missing(
    claimed: Mapping[str, object], steps: Mapping[str, int], compared: Mapping[str, Compared]
) -> list[str]:
    """Kinds of transfer among ``claimed`` of which too little was compared, one line each."""
    found = []
    for kind in (*EACH, *SOME):
        done, transfers = steps.get(kind, 0), compared.get(kind, Compared()).transfers
        if kind in claimed and (transfers == 0 or (kind in EACH and transfers < done)):
            found.append(f"{kind}: {transfers} transfers of {done} steps were compared")
    return found


def uncompared(steps: Mapping[str, int], compared: Mapping[str, Compared]) -> list[str]:
    """What could not be compared, and why; one line for each kind of transfer."""
    found = []
    for kind, why in (*((each, "see the problems") for each in EACH), *TORN.items()):
        left = steps.get(kind, 0) - compared.get(kind, Compared()).transfers
        if left > 0:
            found.append(f"{kind}: {left} of {steps[kind]}, {why}")
    return found


def table(compared: Mapping[str, Compared]) -> list[str]:
    """Lines for people, one per kind."""
    header = ("KIND", "COMPARED", "BYTES MOVED", "AROUND THEM", "LOST OR WRONG")
    rows = [
        (kind, found.transfers, found.moved, found.around, found.wrong)
        for kind, found in sorted(compared.items())
    ]
    return render(header, rows).splitlines()
