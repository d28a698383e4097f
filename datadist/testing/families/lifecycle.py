"""No leaks: descriptors, threads, mappings."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from datadist.testing import memory_operations, operations, transfer_operations
from datadist.testing.families.kit import Kit, pair
from datadist.testing.operations import ResourceUsage
from datadist.testing.processes import Process
from datadist.testing.rules import rule
from datadist.testing.testbed import Linked, Memory, Testbed
from datadist.transport import AddressError, LinkError

ROUNDS = 12
WINDOWS = 4
"""Series of transfers after each of which the memory of a process is measured. A leak grows in all."""
MANY = 4000
WINDOW_SECONDS = 1.5
LEAK = 100.0
"""Bytes per transfer that are a leak, and no noise of an allocator."""
MANY_LINKS, FEW_LINKS = 100, 6
IDLE_SECONDS = 1.5
BUSY = 0.05
"""Part of one processor that many idle links may take more than one."""
SETTLING_SECONDS = 20.0
"""So long threads and descriptors may take to go, times the scale; a busy machine needs some of it."""
SLACK_MAPPINGS = ROUNDS // 2
"""Tolerance for the arenas of Python's allocator."""


class Lifecycle(Kit):
    """Made and closed many times."""

    @rule("Transport.close", "Transport.release")
    def test_transports_leave_nothing(self, testbed: Testbed) -> None:
        """Open, allocate, release, close; close is called twice each time."""
        process = testbed.process(0)

        def once() -> None:
            process.do(operations.close_transport)
            testbed.process(0)
            memory = testbed.allocate(process)
            process.do(memory_operations.release, memory.label)

        _check_leaks([process], once, self.timeout_scale)

    @rule("Link.close", "Transport.disconnect")
    def test_links_leave_nothing(self, testbed: Testbed) -> None:
        """Link, move, close; close is called twice each time."""
        members = testbed.processes(2)
        memory = {rank: testbed.allocate(members[rank]) for rank in members}

        def once() -> None:
            linked = testbed.link(members, {rank: [m] for rank, m in memory.items()})
            _move_both_ways(linked, memory)
            linked.close_all()

        _check_leaks(list(members.values()), once, self.timeout_scale)

    @rule("Link.close", "Link.offer")
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

    @rule("Link.attach", "Link.attach_at_once")
    def test_refused_offers_leave_nothing(self, testbed: Testbed) -> None:
        """`attach` owns the descriptors also when it fails."""
        members = testbed.processes(2)
        memory = testbed.allocate(members[0])

        def once() -> None:
            linked = testbed.open(members, {0: [memory]})
            with testbed.offered(linked, 0, 1) as (_, fds):
                outcome = members[1].do(operations.attach, linked.name, 0, b"no offer", fds=fds)
            if not testbed.capabilities.self_bootstrapping:
                outcome.must_be(LinkError, "bytes that are no offer")
            linked.close_all()

        _check_leaks(list(members.values()), once, self.timeout_scale)

    @rule("Link.read")
    def test_failed_moves_leave_nothing(self, testbed: Testbed) -> None:
        """Wrong addresses."""
        linked, mine, theirs = pair(testbed)
        _move_both_ways(linked, {0: mine, 1: theirs})  # a peer may connect as late as for that

        def once() -> None:
            outcome = linked.move(0, 1, mine, theirs, [(0, theirs.size, 1)])
            assert not outcome.ok, "a read behind the end of the offered memory succeeded"

        _check_leaks(list(linked.members.values()), once, self.timeout_scale)
        linked.close_all()

    @rule("Link.read", "Link.write")
    @pytest.mark.parametrize("kind", ["read", "write", "refused"])
    def test_transfers_leave_no_memory(self, testbed: Testbed, kind: str) -> None:
        """Thousands of them do not make either process grow, also where they fail."""
        linked, mine, theirs = pair(testbed, write=kind == "write")
        at = theirs.size if kind == "refused" else 0
        order = linked.order(0, 1, mine, theirs, [(0, at, 64)] * 4, write=kind == "write")
        members = list(linked.members.values())
        sizes, counts = [_resident(members)], []
        for _ in range(WINDOWS + 1):
            count, outcome = members[0].do(
                transfer_operations.move_many, order, MANY, WINDOW_SECONDS, timeout=120
            )
            if kind == "refused":
                outcome.must_be(AddressError, "a read behind the end of the offered memory")
            else:
                outcome.must_succeed(f"a {kind}")
            sizes.append(_resident(members))
            counts.append(count)
        for process, column in zip(members, zip(*sizes, strict=True), strict=True):
            slopes = [  # without the first, in which pools and caches are filled
                (after - before) / count
                for before, after, count in zip(column[1:-1], column[2:], counts[1:], strict=True)
            ]
            assert min(slopes) < LEAK, (
                f"{process.name} grew in each of {WINDOWS} series of about {min(counts)} transfers, "
                f"by {', '.join(f'{slope:.0f}' for slope in slopes)} bytes per transfer"
            )
        linked.close_all()

    @rule("Link")
    def test_many_idle_links_take_no_processor(self, testbed: Testbed) -> None:
        """A link that nobody uses costs no time, however many there are."""
        members = testbed.processes(2)
        memory = {rank: [testbed.allocate(members[rank])] for rank in members}
        links = [testbed.link(members, memory)]
        one = _idle(members)
        count = FEW_LINKS if testbed.capabilities.self_bootstrapping else MANY_LINKS
        while len(links) < count:
            links.append(testbed.link(members, memory))
        for name, (before, after) in _joined(one, _idle(members)).items():
            assert after < before + BUSY * IDLE_SECONDS, (
                f"{name} took {after:.2f} s of a processor in {IDLE_SECONDS} s with {count} idle "
                f"links, and {before:.2f} s with one: at most {BUSY * IDLE_SECONDS:.2f} s more "
                "were expected"
            )
        for linked in links:
            linked.close_all()


def _resident(members: list[Process]) -> list[int]:
    return [process.do(transfer_operations.resident_bytes) for process in members]


def _idle(members: dict[int, Process]) -> dict[str, float]:
    """Processor time of each process while all are idle."""
    for process in members.values():
        process.begin(transfer_operations.idle_seconds, IDLE_SECONDS)
    return {process.name: process.result() for process in members.values()}


def _joined(one: dict[str, float], many: dict[str, float]) -> dict[str, tuple[float, float]]:
    return {name: (one[name], many[name]) for name in one}


def _move_both_ways(linked: Linked, memory: dict[int, Memory]) -> None:
    for rank, other in ((0, 1), (1, 0)):
        outcome = linked.move(rank, other, memory[rank], memory[other], [(0, 0, 100)])
        outcome.must_succeed(f"rank {rank} reads from rank {other}")


def _check_leaks(processes: list[Process], once: Callable[[], None], scale: float) -> None:
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
    """What a process holds; what is only about to go gets the time for that."""
    end = time.monotonic() + SETTLING_SECONDS * scale
    while True:
        new: ResourceUsage = process.do(operations.resource_usage)
        quiet = new.descriptors <= old.descriptors and new.threads <= old.threads
        quiet = quiet and new.mappings <= old.mappings + SLACK_MAPPINGS
        if quiet or time.monotonic() > end:
            return new
        time.sleep(0.05)
