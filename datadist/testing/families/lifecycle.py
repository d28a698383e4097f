"""No leaks: descriptors, threads, mappings."""

from __future__ import annotations

import time

from datadist.testing import memory_operations, operations
from datadist.testing.families.kit import Kit, pair
from datadist.testing.operations import ResourceUsage
from datadist.testing.processes import Process
from datadist.testing.testbed import Linked, Memory, Testbed
from datadist.transport import LinkError

ROUNDS = 12
SLACK_MAPPINGS = ROUNDS // 2
"""Tolerance for the arenas of Python's allocator."""


class Lifecycle(Kit):
    """Made and closed many times."""

    def test_transports_leave_nothing(self, testbed: Testbed) -> None:
        """Open, allocate, release, close; close is called twice each time."""
        process = testbed.process(0)

        def once() -> None:
            process.do(operations.close_transport)
            testbed.process(0)
            memory = testbed.allocate(process)
            process.do(memory_operations.release, memory.label)

        _check_leaks([process], once, self.timeout_scale)

    def test_links_leave_nothing(self, testbed: Testbed) -> None:
        """Link, move, close; close is called twice each time."""
        members = testbed.processes(2)
        memory = {rank: testbed.allocate(members[rank]) for rank in members}

        def once() -> None:
            linked = testbed.link(members, {rank: [m] for rank, m in memory.items()})
            _move_both_ways(linked, memory)
            linked.close_all()

        _check_leaks(list(members.values()), once, self.timeout_scale)

    def test_half_made_links_leave_nothing(self, testbed: Testbed) -> None:
        """An offer that nobody took, and a link that was only opened."""
        members = testbed.processes(2)
        memory = testbed.allocate(members[0])

        def once() -> None:
            linked = testbed.open(members, {0: [memory]})
            with testbed.offered(linked, 0, 1):
                pass
            linked.close_all()

        _check_leaks(list(members.values()), once, self.timeout_scale)

    def test_refused_offers_leave_nothing(self, testbed: Testbed) -> None:
        """`attach` owns the descriptors also when it fails."""
        members = testbed.processes(2)
        memory = testbed.allocate(members[0])

        def once() -> None:
            linked = testbed.open(members, {0: [memory]})
            with testbed.offered(linked, 0, 1) as (_, fds):
                outcome = members[1].do(operations.attach, linked.name, 0, b"no offer", fds=fds)
            if not testbed.capabilities.self_bootstrapping:
                assert outcome.is_a(LinkError), f"bytes that are no offer: {outcome}"
            linked.close_all()

        _check_leaks(list(members.values()), once, self.timeout_scale)

    def test_failed_moves_leave_nothing(self, testbed: Testbed) -> None:
        """Wrong addresses."""
        linked, mine, theirs = pair(testbed)

        def once() -> None:
            assert not linked.move(0, 1, mine, theirs, [(0, theirs.size, 1)]).ok

        _check_leaks(list(linked.members.values()), once, self.timeout_scale)
        linked.close_all()


def _move_both_ways(linked: Linked, memory: dict[int, Memory]) -> None:
    for rank, other in ((0, 1), (1, 0)):
        outcome = linked.move(rank, other, memory[rank], memory[other], [(0, 0, 100)])
        assert outcome.ok, str(outcome)


def _check_leaks(processes: list[Process], once: object, scale: float) -> None:
    assert callable(once)
    for _ in range(3):  # what is made once and kept is no leak
        once()
    before = [process.do(operations.resource_usage) for process in processes]
    for _ in range(ROUNDS):
        once()
    for process, old in zip(processes, before, strict=True):
        new = _settled(process, old, scale)
        assert new.descriptors <= old.descriptors, (
            f"{process.name} has {new.descriptors - old.descriptors} more descriptors after "
            f"{ROUNDS} rounds: {new.details}"
        )
        assert new.threads <= old.threads, (
            f"{process.name} has {new.threads - old.threads} more threads after {ROUNDS} rounds"
        )
        assert new.mappings <= old.mappings + SLACK_MAPPINGS, (
            f"{process.name} has {new.mappings - old.mappings} more mappings after {ROUNDS} rounds"
        )


def _settled(process: Process, old: ResourceUsage, scale: float) -> ResourceUsage:
    """What a process holds; threads and descriptors get a moment to go."""
    end = time.monotonic() + 2 * scale
    while True:
        new: ResourceUsage = process.do(operations.resource_usage)
        quiet = new.descriptors <= old.descriptors and new.threads <= old.threads
        if quiet or time.monotonic() > end:
            return new
        time.sleep(0.05)
