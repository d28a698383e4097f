"""Owners that move the bytes themselves: they trust nobody, and outlive whom they serve."""

from __future__ import annotations

import itertools
import time

import pytest

from datadist.testing import operations, transfer_operations
from datadist.testing.families.kit import Kit, need_passive, need_write
from datadist.testing.offers import widened
from datadist.testing.processes import Process
from datadist.testing.rules import rule
from datadist.testing.testbed import MIB, Linked, Memory, Testbed
from datadist.transport import Access, AddressError, LinkError, TransportError

BIG = 8 * MIB
NOWHERE = 1 << 46
"""An address that no process has mapped."""
CASES = [(place, way) for place in ("hidden", "beyond", "nowhere") for way in ("read", "write")]
CASES.append(("granted", "write"))
"""Other memory of the owner, a range that begins in offered memory and ends behind it, one where
nothing is mapped, and offered memory, to be written where READ was granted."""
ATTEMPTS = 2


class Owners(Kit):
    """What an owner must bear from its peers."""

    @rule("Link.read", "Link.write")
    @pytest.mark.parametrize(("place", "direction"), CASES)
    def test_the_owner_itself_refuses(self, testbed: Testbed, place: str, direction: str) -> None:
        """An asker that checks nothing gets no byte beyond what was offered, and writes none.

        The kit widens the ranges inside the offer where it finds them. Otherwise the author names
        a function that has the asker skip its checks, ``trusting_asker``.
        """
        need_passive(testbed, False)
        write = direction == "write"
        if write:
            need_write(testbed)
        access = Access.READ_WRITE if write and place != "granted" else Access.READ
        members = testbed.processes(3)
        mine, shown, hidden, third = (testbed.allocate(members[rank]) for rank in (0, 1, 1, 2))
        linked = _link_without_checks(testbed, members, (mine, shown, hidden, third), place, access)
        at = {"hidden": hidden.address, "beyond": shown.address + MIB - 10, "nowhere": NOWHERE}
        order = linked.order(0, 1, mine, shown, [(0, 0, 1000)], write=write, timeout=5)
        order.remote[0] = at.get(place, shown.address)
        outcome = members[0].do(operations.move, order)
        outcome.must_be(TransportError, f"a {direction} that the owner had to refuse")
        for memory in (mine, shown, hidden):
            memory.check()
        _check_serves(linked, third, shown)
        if testbed.settings.trusting_asker is not None:
            order = linked.order(0, 1, mine, shown, [(0, 0, 1000)], timeout=0.3)
            order.remote[0] = NOWHERE
            _check_asks(members, order)
        linked.close_all()

    @rule("Link.read", "Link.write", "PeerLost")
    @pytest.mark.parametrize("direction", ["read", "write"])
    @pytest.mark.parametrize("moment", ["idle", "moving", "stopped"])
    def test_an_owner_outlives_its_peers(
        self, testbed: Testbed, moment: str, direction: str
    ) -> None:
        """A peer is killed after transfers, in one, or in one and stopped; the owner serves others.

        Also before that, while the peer is stopped in the middle of what it sends or takes.
        """
        if direction == "write":
            need_write(testbed)
        for attempt in range(1 if moment == "idle" else ATTEMPTS):
            self._kill_a_peer(testbed, moment, direction == "write", 0.02 + 0.03 * attempt)
            testbed.clean()

    def _kill_a_peer(self, testbed: Testbed, moment: str, write: bool, delay: float) -> None:
        members = testbed.processes(3)
        access = Access.READ_WRITE if write else Access.READ
        mine, busy, quiet = (testbed.allocate(members[r], n) for r, n in _OWNED)
        third = testbed.allocate(members[2])
        linked = testbed.link(members, {0: [mine], 1: [busy, quiet], 2: [third]}, access)
        for _ in range(3):
            outcome = linked.move(0, 1, mine, busy, [(0, 0, BIG)], write=write)
            outcome.must_succeed("before the peer was killed")
        _check_serves(linked, third, quiet)
        if moment != "idle":
            order = linked.order(0, 1, mine, busy, [(0, 0, BIG)] * 8, write=write)
            process, wait = members[0], 60.0 * testbed.scale
            process.do(operations.start, "move", operations.move_until_failure, order, wait)
            time.sleep(delay)
        if moment == "stopped":
            members[0].pause()
            time.sleep(0.05)
            _check_serves(linked, third, quiet)
        members[0].kill()
        linked.forget(0)
        for _ in range(3):
            time.sleep(0.03)
            _check_serves(linked, third, quiet)
        linked.lose(1, 0)
        linked.lose(2, 0)
        _check_serves(linked, third, quiet)
        linked.close_all()


_OWNED = ((0, BIG), (1, BIG), (1, MIB))
"""Rank and size of the memory of a test: the peer's, and two of the owner."""


def _link_without_checks(
    testbed: Testbed, members: dict[int, Process], memory: tuple[Memory, ...], place: str,
    access: Access,
) -> Linked:  # fmt: skip
    """A link whose rank 0 asks rank 1 for anything; skips where the kit has no means for that."""
    mine, shown, hidden, third = memory
    exposed = {0: [mine], 1: [shown], 2: [third]}
    author = testbed.settings.trusting_asker
    if author is not None:
        linked = testbed.link(members, exposed, access)
        members[0].do(transfer_operations.skip_checks, linked.name, 1, author)
        return linked
    if place == "granted":
        pytest.skip("trusting_asker names no function")
    low = min(shown.address, hidden.address)
    high = max(shown.address + shown.size, hidden.address + hidden.size) + MIB
    if place == "nowhere":
        low, high = min(low, NOWHERE), max(high, NOWHERE + MIB)
    linked = testbed.open(members, exposed, access)
    refusal = _attach_widened(testbed, linked, shown, (low, high))
    if refusal:
        linked.close_all()
        pytest.skip(f"{refusal}, and trusting_asker names no function")
    return linked


def _check_asks(members: dict[int, Process], order: operations.Move) -> None:
    """While the owner is stopped, only the asker itself can refuse; the link may be lost by that."""
    members[1].pause()
    try:
        outcome = members[0].do(operations.move, order)
    finally:
        members[1].resume()
    assert not outcome.is_a(AddressError), (
        "trusting_asker has to switch off the checks of the link, but the asker itself refused a "
        f"range while the owner was stopped: {outcome.text}"
    )


def _attach_widened(
    testbed: Testbed, linked: Linked, shown: Memory, to: tuple[int, int]
) -> str | None:
    """Attach all offers, for rank 0 with larger ranges of rank 1; why that cannot be done."""
    changed: list[bool] = []

    def change(data: bytes) -> bytes:
        new = widened(data, shown.address, shown.size, to)
        changed.append(new != data)
        return new

    for rank, owner in itertools.permutations(linked.members, 2):
        if (rank, owner) == (0, 1):
            outcome = testbed.attach(linked, rank, owner, change)
            if outcome.is_a(LinkError) and changed[-1]:
                return f"attach refuses an offer whose ranges were changed ({outcome.text})"
        else:
            outcome = testbed.attach(linked, rank, owner)
        outcome.must_succeed(f"rank {rank} attaching the offer of rank {owner}")
    testbed.join(linked)
    return None if any(changed) else "the kit finds no ranges in the offer"


def _check_serves(linked: Linked, third: Memory, owned: Memory) -> None:
    """The owner, rank 1, lives, and its memory can be read by rank 2."""
    third.refill(third.seed + 1)
    outcome = linked.move(2, 1, third, owned, [(5, 7, 100_000)])
    outcome.must_succeed("a third rank reads from the owner")
    third.check([third.expected_write(owned, [(5, 7, 100_000)])])
