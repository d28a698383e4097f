"""No leaks: descriptors, threads, mappings."""

from __future__ import annotations

import time

from datadist.testing import acts, memory_acts
from datadist.testing.acts import Held
from datadist.testing.bench import Bench, Linked, Memory
from datadist.testing.families.kit import Kit, pair
from datadist.testing.processes import Process
from datadist.transport import LinkError

ROUNDS = 12
SLACK_MAPPINGS = ROUNDS // 2
"""Tolerance for the arenas of Python's allocator."""


class Lifecycle(Kit):
    """Made and closed many times."""

    def test_transports_leave_nothing(self, bench: Bench) -> None:
        """Open, allocate, release, close; close is called twice each time."""
        process = bench.process(0)

        def once() -> None:
            process.do(acts.close_transport)
            bench.process(0)
            memory = bench.allocate(process)
            process.do(memory_acts.release, memory.label)

        _check_leaks([process], once, self.timeout_scale)

    def test_links_leave_nothing(self, bench: Bench) -> None:
        """Link, move, close; close is called twice each time."""
        members = bench.processes(2)
        memory = {rank: bench.allocate(members[rank]) for rank in members}

        def once() -> None:
            linked = bench.link(members, {rank: [m] for rank, m in memory.items()})
            _move_both_ways(linked, memory)
            linked.close_all()

        _check_leaks(list(members.values()), once, self.timeout_scale)

    def test_half_made_links_leave_nothing(self, bench: Bench) -> None:
        """An offer that nobody took, and a link that was only opened."""
        members = bench.processes(2)
        memory = bench.allocate(members[0])

        def once() -> None:
            linked = bench.open(members, {0: [memory]})
            with bench.offered(linked, 0, 1):
                pass
            linked.close_all()

        _check_leaks(list(members.values()), once, self.timeout_scale)

    def test_refused_offers_leave_nothing(self, bench: Bench) -> None:
        """`attach` owns the descriptors also when it fails."""
        members = bench.processes(2)
        memory = bench.allocate(members[0])

        def once() -> None:
            linked = bench.open(members, {0: [memory]})
            with bench.offered(linked, 0, 1) as (_, fds):
                outcome = members[1].do(acts.attach, linked.name, 0, b"no offer", fds=fds)
            if not bench.capabilities.self_bootstrapping:
                assert outcome.is_a(LinkError), f"bytes that are no offer: {outcome}"
            linked.close_all()

        _check_leaks(list(members.values()), once, self.timeout_scale)

    def test_failed_moves_leave_nothing(self, bench: Bench) -> None:
        """Wrong addresses."""
        linked, mine, theirs = pair(bench)

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
    before = [process.do(acts.held) for process in processes]
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


def _settled(process: Process, old: Held, scale: float) -> Held:
    """What a process holds; threads and descriptors get a moment to go."""
    end = time.monotonic() + 2 * scale
    while True:
        new: Held = process.do(acts.held)
        quiet = new.descriptors <= old.descriptors and new.threads <= old.threads
        if quiet or time.monotonic() > end:
            return new
        time.sleep(0.05)
