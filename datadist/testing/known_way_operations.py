"""What the kit asks of :meth:`Link.known_way`; the operations run in a process of the kit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datadist.testing.child import State
from datadist.testing.list_operations import Indexed, Whole
from datadist.transport import KnownCall, KnownWay

__all__ = ["CHANGES", "MANY", "Blocks", "call_known_way", "has_known_way", "refused_lists"]

BLOCKS, ODD = 8, [-1, 8, 1 << 63, 1 << 70, True, 1.0, None, Whole(1), Indexed()]
"""Blocks of either side, and what is none of them."""
MANY = 1 << 12
"""More transfers than permits of any link."""
CHANGES = ("attribute", "key-goes", "key-comes")
"""Conditions that do not hold any more."""


@dataclass(frozen=True)
class Blocks:
    """A route between memory of ours and of a peer, both seen as one tensor of :data:`BLOCKS` blocks."""

    link: str
    rank: int
    write: bool
    block_bytes: int
    local: int
    remote: int
    timeout: float


class _Watched:
    """What a call has to look at."""

    def __init__(self) -> None:
        self.version = 1 << 40
        self.keys: dict[int, object] = {1: "there"}

    def change(self, what: str | None) -> None:
        if what == "attribute":
            self.version += 1
        elif what == "key-goes":
            del self.keys[1]
        elif what == "key-comes":
            self.keys[2] = "there"


def _made(state: State, route: Blocks, watched: _Watched) -> KnownCall | None:
    way = KnownWay(
        route.rank, route.write, route.block_bytes,
        (route.local,), route.block_bytes, BLOCKS, (route.remote,), route.block_bytes, BLOCKS,
        ((watched, "version", 1 << 40),),
        ((watched.keys, 1, True), (watched.keys, 2, False)),
    )  # fmt: skip
    return state.links[route.link].known_way(way)


def has_known_way(state: State, route: Blocks) -> bool:
    """Whether the link has such a call for this route."""
    return _made(state, route, _Watched()) is not None


def call_known_way(
    state: State, route: Blocks, theirs: list[int], ours: list[int], times: int = 1,
    change: str | None = None,
) -> list[float | None]:  # fmt: skip
    """What ``times`` calls returned after a ``change``."""
    watched = _Watched()
    call = _made(state, route, watched)
    assert call is not None, "known_way returns None for a route for which it returned a call"
    watched.change(change)
    return [call(theirs, ours, route.timeout) for _ in range(times)]


def refused_lists(state: State, route: Blocks) -> list[str]:
    """Lists that are not in order, and that were not refused."""
    call = _made(state, route, _Watched())
    assert call is not None, "known_way returns None for a route for which it returned a call"
    twice = ([1, 1], [2, 3]) if route.write else ([1, 2], [3, 3])
    cases: list[tuple[Any, Any]] = [
        ([], []), ([1], []), ([], [1]), ([1, 2], [1]), twice, ((1,), [1]), ([1], (1,)), (None, [1]),
        ([1], "1"), *(([odd], [1]) for odd in ODD), *(([1], [odd]) for odd in ODD),
        *(([1, odd], [1, 2]) for odd in ODD),
    ]  # fmt: skip
    return [f"{t!r}, {o!r}" for t, o in cases if call(t, o, route.timeout) is not None]
