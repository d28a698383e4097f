"""Deadlines, aborts, and peers that stop or die."""

from __future__ import annotations

import time

import pytest

from datadist.base.texts import in_seconds
from datadist.testing import operations
from datadist.testing.families.kit import GRACE, Kit, need_passive, need_write, pair, timed_out
from datadist.testing.outcome import Outcome
from datadist.testing.rules import rule
from datadist.testing.testbed import MIB, Linked, Memory, Segments, Testbed
from datadist.transport import (
    Access,
    PeerLost,
    TransferError,
    TransferTimeout,
    TransportError,
)

BIG = 8 * MIB
LONG_WAIT = 2.5
"""Seconds of a timeout that is long compared with the tolerance, times the scale."""
FAR = 8.0
"""Seconds of a timeout that must not be used up, times the scale."""
NOTICED = 3.0
"""Seconds after which a peer's death must be noticed at the latest, times the scale: it should take
about one; the rest is for busy machines."""


class Failures(Kit):
    """Every call ends by its deadline with the correct result."""

    @rule("Link.read", "TransferTimeout")
    def test_a_deadline_that_has_passed(self, testbed: Testbed) -> None:
        """Ends at once: with a timeout or, if it was quick enough, with all bytes."""
        linked, mine, theirs = pair(testbed)
        outcome = linked.move(0, 1, mine, theirs, [(0, 0, 1000)], timeout=0)
        if not outcome.ok:
            outcome.must_be(TransferTimeout, "a read whose timeout is 0")
        outcome.must_end_within(GRACE * testbed.scale, "a read whose timeout is 0")
        linked.close_all()

    @rule("Link.read", "TransferTimeout")
    def test_a_long_transfer_ends_by_its_deadline(self, testbed: Testbed) -> None:
        """With `TransferTimeout`, not at twice the time; then the peer can be reached if it says so."""
        self._end_by_the_deadline(testbed, write=False)

    @rule("Link.write", "TransferTimeout")
    def test_a_long_write_ends_by_its_deadline(self, testbed: Testbed) -> None:
        """As a read."""
        self._end_by_the_deadline(testbed, write=True)

    def _end_by_the_deadline(self, testbed: Testbed, *, write: bool) -> None:
        linked, mine, theirs = pair(testbed, size=BIG, write=write)
        wait = LONG_WAIT * testbed.scale
        with timed_out(
            testbed, linked, mine, theirs, write=write, wait=LONG_WAIT, stopped=False
        ) as outcome:
            pass
        outcome.must_end_within(1.5 * wait, f"a transfer with a timeout of {in_seconds(wait)}")
        linked.settle(0, 1)
        _check_both(mine, theirs, [(0, 0, BIG)], write)
        mine.refill(5004)
        theirs.refill(5005)
        _check_usable(testbed, linked, mine, theirs, bool(outcome.link_usable))

    @rule("Capabilities.passive_target")
    @pytest.mark.parametrize("direction", ["read", "write"])
    def test_a_stopped_peer_is_reached(self, testbed: Testbed, direction: str) -> None:
        """Its memory can be accessed without its processor."""
        need_passive(testbed, True)
        linked, mine, theirs = pair(testbed, write=direction == "write")
        linked.members[1].pause()
        try:
            outcome = linked.move(
                0, 1, mine, theirs, [(0, 0, MIB)], write=direction == "write", timeout=5
            )
        finally:
            linked.members[1].resume()
        outcome.must_succeed("capabilities.passive_target is True")
        _check_both(mine, theirs, [(0, 0, MIB)], direction == "write", whole=True)
        linked.close_all()

    @rule("Capabilities.passive_target", "TransferTimeout")
    @pytest.mark.parametrize("direction", ["read", "write"])
    def test_a_stopped_peer_is_a_timeout(self, testbed: Testbed, direction: str) -> None:
        """At the deadline, not later; and nothing arrives here when it goes on."""
        need_passive(testbed, False)
        linked, mine, theirs = pair(testbed, size=BIG, write=direction == "write")
        linked.members[1].pause()
        try:
            order = linked.order(
                0, 1, mine, theirs, [(0, 0, BIG)], write=direction == "write", timeout=LONG_WAIT
            )
            outcome = linked.members[0].do(operations.move, order)
            if direction == "read" and not outcome.in_flight:
                mine.check_torn([mine.expected_write(theirs, [(0, 0, BIG)])])
                mine.refill(5002)
        finally:
            linked.members[1].resume()
        outcome.must_be(TransferTimeout, "the peer was stopped")
        outcome.must_end_within(1.5 * order.timeout, "the peer was stopped")
        linked.settle(0, 1)
        time.sleep(0.2)
        if direction == "read":
            if outcome.in_flight:
                mine.refill(5002)
            mine.check()
            theirs.check()
        else:
            _check_both(mine, theirs, [(0, 0, BIG)], True)
            theirs.refill(5003)
        _check_usable(testbed, linked, mine, theirs, bool(outcome.link_usable))

    @rule("Link.abort")
    def test_abort_ends_what_is_in_flight(self, testbed: Testbed) -> None:
        """Within milliseconds, from another thread."""
        linked, mine, theirs = pair(testbed, size=BIG)
        stop = not testbed.ask_link().passive_target
        process = linked.members[0]
        if stop:
            linked.members[1].pause()
        try:
            order = linked.order(0, 1, mine, theirs, [(0, 0, BIG)] * 16, timeout=30)
            process.do(
                operations.start, "read", operations.move_until_failure, order, 30.0 * testbed.scale
            )
            time.sleep(0.1)
            begin = time.monotonic()
            linked.abort(0, 1)
            outcome = process.do(operations.finish, "read", GRACE * testbed.scale)
        finally:
            linked.members[1].resume()
        outcome.must_be(TransferError, "aborted")
        seconds = time.monotonic() - begin
        assert seconds < GRACE * testbed.scale, (
            f"a read ended {seconds:.2f} s after abort, within {in_seconds(GRACE * testbed.scale)} "
            "was expected"
        )
        _check_both(mine, theirs, [(0, 0, BIG)], False)
        linked.close_all()

    @rule("Link.abort")
    def test_abort_is_for_good_and_for_one_rank(self, testbed: Testbed) -> None:
        """What follows fails at once; other ranks are still reached."""
        members = testbed.processes(3)
        memory = {rank: testbed.allocate(members[rank]) for rank in members}
        linked = testbed.link(members, {rank: [m] for rank, m in memory.items()})
        linked.abort(0, 1)
        outcome = linked.move(0, 1, memory[0], memory[1], [(0, 0, 100)])
        outcome.must_be(TransferError, "after an abort")
        outcome = linked.move(0, 2, memory[0], memory[2], [(0, 0, 100)])
        outcome.must_succeed("to another rank than the aborted one")
        linked.close_all()

    @rule("Link.close")
    def test_close_ends_what_is_in_flight(self, testbed: Testbed) -> None:
        """Also while the peer is stopped; nothing is written here afterwards."""
        linked, mine, theirs = pair(testbed, size=BIG)
        process = linked.members[0]
        linked.members[1].pause()
        try:
            order = linked.order(0, 1, mine, theirs, [(0, 0, BIG)] * 4, timeout=30)
            process.do(
                operations.start, "read", operations.move_until_failure, order, 30.0 * testbed.scale
            )
            time.sleep(0.1)
            linked.close(0)
            outcome = process.do(operations.finish, "read", GRACE * testbed.scale)
            outcome.must_be(TransferError, "the link was closed")
            mine.check_torn([mine.expected_write(theirs, [(0, 0, BIG)])])
            mine.refill(2001)
        finally:
            linked.members[1].resume()
        time.sleep(0.2)
        mine.check()
        theirs.check()
        linked.close_all()

    @rule("Link.read", "PeerLost")
    def test_a_peer_that_was_killed_is_lost(self, testbed: Testbed) -> None:
        """Reported by its rank; others are still reached; then a new process links again."""
        members = testbed.processes(3)
        memory = {rank: testbed.allocate(members[rank]) for rank in members}
        linked = testbed.link(members, {rank: [m] for rank, m in memory.items()})
        linked.kill(1)
        for _ in range(2):
            outcome = linked.move(0, 1, memory[0], memory[1], [(0, 0, 1000)], timeout=FAR)
            _check_lost(outcome)
            _check_noticed(outcome.seconds, testbed.scale, outcome)
        linked.settle(0, 1)
        memory[0].check_torn([memory[0].expected_write(memory[1], [(0, 0, 1000)])])
        memory[0].refill(5001)  # a read that failed may have moved a part
        outcome = linked.move(0, 2, memory[0], memory[2], [(0, 0, 1000)])
        outcome.must_succeed("to a peer that lives")
        linked.close_all()
        _check_link_again(testbed, memory)

    @rule("Link.read", "Link.write", "PeerLost")
    @pytest.mark.parametrize("direction", ["read", "write"])
    @pytest.mark.parametrize("state", ["moving", "stopped"])
    def test_a_peer_that_dies_in_a_transfer_is_noticed(
        self, testbed: Testbed, state: str, direction: str
    ) -> None:
        """The call fails within a second or two, long before its deadline."""
        write = direction == "write"
        linked, mine, theirs = pair(testbed, size=BIG, write=write)
        order = linked.order(0, 1, mine, theirs, [(0, 0, BIG)] * 8, write=write, timeout=FAR)
        process = linked.members[0]
        process.do(
            operations.start, "move", operations.move_until_failure, order, 60.0 * testbed.scale
        )
        time.sleep(0.1)
        if state == "stopped":
            linked.members[1].pause()
            time.sleep(0.3)
        begin = time.monotonic()
        linked.kill(1)
        wait = 2 * FAR * testbed.scale
        outcome = process.do(operations.finish, "move", wait, timeout=2 * FAR + 30)
        outcome.must_be(TransferError, "the peer died in the transfer")
        _check_noticed(time.monotonic() - begin, testbed.scale, outcome)
        linked.settle(0, 1)
        mine.check_torn([] if write else [mine.expected_write(theirs, [(0, 0, BIG)])])
        linked.close_all()

    @rule("Transport.peer_lost", "Transport.disconnect", "Link.abort", "Link.close")
    @pytest.mark.parametrize("state", ["killed", "stopped"])
    def test_a_peer_that_core_has_lost_is_given_up(self, testbed: Testbed, state: str) -> None:
        """`peer_lost` and `abort` do not block; `close` and `disconnect` end; others are reached."""
        members = testbed.processes(3)
        memory = {rank: testbed.allocate(members[rank]) for rank in members}
        linked = testbed.link(members, {rank: [m] for rank, m in memory.items()})
        for other in (1, 2):
            outcome = linked.move(0, other, memory[0], memory[other], [(0, 0, 1000)])
            outcome.must_succeed("before rank 1 was lost")
        if state == "killed":
            members[1].kill()
            linked.forget(1)
        else:
            members[1].pause()
        try:
            linked.lose(0, 1)
            outcome = linked.move(0, 1, memory[0], memory[1], [(0, 0, 1000)])
            outcome.must_be(TransferError, "from a peer that core has lost")
            outcome = linked.move(0, 2, memory[0], memory[2], [(0, 0, 1000)])
            outcome.must_succeed("from another peer than the lost one")
            linked.close(0)
        finally:
            members[1].resume()
        linked.close_all()

    @rule("Link.attach", "Link.close")
    def test_a_link_with_a_dead_peer_can_be_made_and_closed(self, testbed: Testbed) -> None:
        """The peer died between its offer and our attaching it."""
        if testbed.capabilities.self_bootstrapping:
            pytest.skip("capabilities.self_bootstrapping is True")
        members = testbed.processes(2)
        mine, theirs = testbed.allocate(members[0]), testbed.allocate(members[1])
        linked = testbed.open(members, {0: [mine], 1: [theirs]})
        with testbed.offered(linked, 1, 0) as (data, fds):
            members[1].kill()
            linked.forget(1)
            outcome = members[0].do(operations.attach, linked.name, 1, data, fds=fds)
        if outcome.ok:
            outcome = linked.move(0, 1, mine, theirs, [(0, 0, 100)], timeout=5)
        outcome.must_be(TransportError, "the peer is dead")
        linked.close_all()

    @rule("Link.read", "Link.write")
    @pytest.mark.parametrize("direction", ["read", "write"])
    def test_the_gil_is_released(self, testbed: Testbed, direction: str) -> None:
        """Other threads run while a call copies or waits."""
        write = direction == "write"
        if write:
            need_write(testbed)
        for _ in range(3):  # a busy machine may not run the other thread
            linked, mine, theirs = pair(testbed, size=BIG, write=write)
            outcome, tenths = _long_call(testbed, linked, mine, theirs, write)
            linked.close_all()
            if tenths >= 5:
                break
        assert tenths >= 5, (
            f"another thread ran in {tenths} tenths of a call of {outcome.seconds:.2f} s, in at "
            f"least 5 was expected"
        )


def _check_both(
    mine: Memory, theirs: Memory, segments: Segments, write: bool, whole: bool = False
) -> None:
    """Compare every byte of both memories after a transfer that had to stop, or was ``whole``."""
    target, source = (theirs, mine) if write else (mine, theirs)
    expected_write = [target.expected_write(source, segments, into_remote=write)]
    if whole:
        target.check(expected_write)
    else:
        target.check_torn(expected_write)
    source.check()


def _check_noticed(seconds: float, scale: float, outcome: Outcome) -> None:
    """The end of a process is noticed, and not waited for until the deadline."""
    limit = NOTICED * scale
    assert seconds < limit, (
        f"the peer's death was noticed after {seconds:.1f} s, within {in_seconds(limit)} was "
        f"expected: {outcome}"
    )


def _long_call(
    testbed: Testbed, linked: Linked, mine: Memory, theirs: Memory, write: bool
) -> tuple[Outcome, int]:
    """A call of at least 0.3 s: a wait for a stopped peer, or many copies of the same bytes."""
    process, repeat = linked.members[0], 8
    if not testbed.ask_link().passive_target:
        order = linked.order(
            0, 1, mine, theirs, [(0, 0, BIG)], write=write, timeout=0.5 / testbed.scale
        )
        linked.members[1].pause()
        try:
            outcome, tenths = process.do(operations.move_and_tick, order)
        finally:
            linked.members[1].resume()
        outcome.must_be(TransferTimeout, "the peer was stopped")
        return outcome, tenths
    while True:
        order = linked.order(0, 1, mine, theirs, [(0, 0, BIG)] * repeat, write=write, timeout=60)
        outcome, tenths = process.do(operations.move_and_tick, order, timeout=90)
        outcome.must_succeed("a long call")
        if outcome.seconds > 0.3:
            return outcome, tenths
        repeat *= 2


def _check_lost(outcome: Outcome) -> None:
    outcome.must_be(TransferError, "the peer was killed")
    assert outcome.link_usable is False, (
        f"the peer was killed: expected link_usable False, it is {outcome.link_usable} of {outcome}"
    )
    if outcome.is_a(PeerLost):
        assert outcome.rank == 1, f"PeerLost names rank {outcome.rank}, which was rank 1"


def _check_link_again(testbed: Testbed, memory: dict[int, Memory]) -> None:
    members = testbed.processes(3)
    fresh = {**memory, 1: testbed.allocate(members[1])}
    linked = testbed.link(members, {rank: [m] for rank, m in fresh.items()}, Access.READ)
    outcome = linked.move(0, 1, fresh[0], fresh[1], [(0, 0, 1000)])
    outcome.must_succeed("from the process that took the place of the killed one")
    fresh[0].check([
        fresh[0].expected_write(fresh[2], [(0, 0, 1000)]),
        fresh[0].expected_write(fresh[1], [(0, 0, 1000)]),
    ])  # fmt: skip
    linked.close_all()


def _check_usable(
    testbed: Testbed, linked: Linked, mine: Memory, theirs: Memory, usable: bool
) -> None:
    """After a timeout: a usable link works, and nothing of the old transfer shows."""
    outcome = linked.move(0, 1, mine, theirs, [(3, 5, 1000)])
    if usable:
        outcome.must_succeed("the timeout said that the link is usable")
        mine.check([mine.expected_write(theirs, [(3, 5, 1000)])])
    elif not outcome.ok:
        outcome.must_be(TransferError, "after a timeout that broke the link")
    linked.close_all()
