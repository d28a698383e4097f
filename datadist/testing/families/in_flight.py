"""Transfers that ended with an error: nothing of them lands later, or they say that it may."""

from __future__ import annotations

import time

import pytest

from datadist.testing import operations
from datadist.testing.families.kit import Kit, need_write, timed_out
from datadist.testing.rules import rule
from datadist.testing.testbed import MIB, SETTLE_SECONDS, Linked, Memory, Testbed
from datadist.transport import Access, TransferError

BIG = 8 * MIB
WAIT = 0.3
"""Seconds of a timeout, times the scale."""
LOOKS, PAUSE = 5, 0.15
"""How often, and how many seconds apart, memory is looked at that must not change."""


class InFlight(Kit):
    """`TransportError.in_flight` and `Link.force`."""

    @rule("Link.read", "TransportError.in_flight", "InFlight.settled", "Link.force")
    @pytest.mark.parametrize("how", ["wait", "force"])
    def test_a_read_that_timed_out_lands_nowhere_later(self, testbed: Testbed, how: str) -> None:
        """Not in the memory of a later read from another rank, once nothing is in flight."""
        linked, memory = _three(testbed, Access.READ)
        mine, theirs, third = memory
        other = testbed.link(linked.members, {rank: [m] for rank, m in enumerate(memory)})
        stopped = not testbed.ask_link().passive_target
        with timed_out(
            testbed, linked, mine, theirs, write=False, wait=WAIT, stopped=stopped
        ) as outcome:
            settled = not outcome.in_flight or linked.settled(0, 0.1)
            if not settled and how == "force" and linked.force(0, 1):
                settled = linked.settled(0, SETTLE_SECONDS)
                assert settled, "in_flight.settled() is False although force has returned"
            if settled:
                _read_from_third(other, mine, third)
        if not settled:
            linked.settle(0, 1)
            _read_from_third(other, mine, third)
        for _ in range(LOOKS):
            time.sleep(PAUSE)
            mine.check([mine.expected_write(third, [(0, 0, BIG)])])
        linked.close_all()
        other.close_all()

    @rule("Link.close", "TransportError.in_flight")
    def test_a_read_that_timed_out_is_over_after_close(self, testbed: Testbed) -> None:
        """After `close` nothing that was started here touches memory."""
        linked, (mine, theirs, _) = _three(testbed, Access.READ)
        stopped = not testbed.ask_link().passive_target
        with timed_out(testbed, linked, mine, theirs, write=False, wait=WAIT, stopped=stopped):
            linked.close(0)
            mine.refill(7001)
        for _ in range(LOOKS):
            time.sleep(PAUSE)
            mine.check()
        linked.close_all()

    @rule("Link.read", "Link.abort", "TransportError.in_flight")
    def test_a_read_that_was_aborted_lands_nowhere_later(self, testbed: Testbed) -> None:
        """As after a timeout."""
        linked, (mine, theirs, _) = _three(testbed, Access.READ)
        order = linked.order(0, 1, mine, theirs, [(0, 0, BIG)] * 16, timeout=30)
        process, wait = linked.members[0], 30.0 * testbed.scale
        process.do(operations.start, "read", operations.move_until_failure, order, wait)
        time.sleep(0.1)
        linked.abort(0, 1)
        outcome = process.do(operations.finish, "read", wait, timeout=60)
        outcome.must_be(TransferError, "a read that was aborted")
        linked.settle(0, 1)
        mine.refill(7004)
        for _ in range(LOOKS):
            time.sleep(PAUSE)
            mine.check()
        linked.close_all()

    @rule("Link.write", "TransportError.in_flight", "InFlight.settled", "Link.force")
    @pytest.mark.parametrize("how", ["wait", "force"])
    def test_a_write_that_timed_out_lands_nowhere_later(self, testbed: Testbed, how: str) -> None:
        """Once nothing is in flight: also where the owner was stopped, and takes the bytes by itself."""
        need_write(testbed)
        linked, (mine, theirs, _) = _three(testbed, Access.READ_WRITE)
        stopped = not testbed.ask_link().passive_target
        with timed_out(
            testbed, linked, mine, theirs, write=True, wait=WAIT, stopped=stopped
        ) as outcome:
            if outcome.in_flight and how == "force" and not linked.settled(0, 0.1):
                forced = linked.force(0, 1)
                assert not forced or linked.settled(0, SETTLE_SECONDS), (
                    "in_flight.settled() is False although force has returned"
                )
            settled = not outcome.in_flight or linked.settled(0, 0.1)
        _check_nothing_lands(linked, theirs, settled, stopped)
        mine.check()
        linked.close_all()

    @rule("Link.write", "Link.abort", "TransportError.in_flight")
    def test_a_write_that_was_aborted_lands_nowhere_later(self, testbed: Testbed) -> None:
        """As after a timeout: to give up the connection does not stop an owner that takes the bytes."""
        need_write(testbed)
        linked, (mine, theirs, _) = _three(testbed, Access.READ_WRITE)
        stopped = not testbed.ask_link().passive_target
        process, wait = linked.members[0], 30.0 * testbed.scale
        order = linked.order(0, 1, mine, theirs, [(0, 0, BIG)] * 16, write=True, timeout=30)
        if stopped:
            linked.members[1].pause()
        try:
            process.do(operations.start, "write", operations.move_until_failure, order, wait)
            time.sleep(0.1)
            linked.abort(0, 1)
            outcome = process.do(operations.finish, "write", wait, timeout=60)
            settled = not outcome.in_flight or linked.settled(0, 0.1)
        finally:
            linked.members[1].resume()
        outcome.must_be(TransferError, "a write that was aborted")
        _check_nothing_lands(linked, theirs, settled, stopped)
        linked.close_all()

    @rule("Link.force")
    def test_force_ends_one_path(self, testbed: Testbed) -> None:
        """Or is not supported; twice, and when nothing is in flight; other links go on."""
        linked, (mine, theirs, third) = _three(testbed, Access.READ)
        memory = {0: [mine], 1: [theirs], 2: [third]}
        other = testbed.link(linked.members, memory)
        forced = linked.force_path(0, 1)
        outcome = linked.move(0, 1, mine, theirs, [(0, 0, 1000)])
        if forced.ok or forced.is_a(TransferError):
            outcome.must_be(TransferError, "over a path that force has ended")
        else:
            outcome.must_succeed("after force raised Unsupported")
        outcome = other.move(0, 2, mine, third, [(0, 0, 1000)])
        outcome.must_succeed("with another rank, over another link than the one that was forced")
        linked.close_all()
        other.close_all()


def _three(testbed: Testbed, access: Access) -> tuple[Linked, list[Memory]]:
    """A link of three ranks, with the memory of each; transfers have run over all its paths."""
    members = testbed.processes(3)
    memory = [testbed.allocate(members[rank], BIG) for rank in members]
    linked = testbed.link(members, {rank: [m] for rank, m in enumerate(memory)}, access)
    for other in (1, 2):
        outcome = linked.move(0, other, memory[0], memory[other], [(0, 0, 4096)])
        outcome.must_succeed(f"a first read from rank {other}")
    memory[0].refill(7000)
    return linked, memory


def _check_nothing_lands(linked: Linked, theirs: Memory, settled: bool, stopped: bool) -> None:
    """Of a write of rank 0, which was settled before its owner went on if that was ``stopped``."""
    if not settled:
        linked.settle(0, 1)
    if not (settled and stopped):  # else nothing of it has landed, and nothing may
        theirs.refill(7002)
    for _ in range(LOOKS):
        time.sleep(PAUSE)
        theirs.check()


def _read_from_third(linked: Linked, mine: Memory, third: Memory) -> None:
    """Use the memory again over another link, as core does when nothing is in flight any more."""
    mine.refill(7003)
    outcome = linked.move(0, 2, mine, third, [(0, 0, BIG)])
    outcome.must_succeed("from another rank than the one that timed out")
