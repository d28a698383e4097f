"""The environment of the kit's tests: processes, their memory, and links between them."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from datadist.base.texts import in_seconds
from datadist.testing import memory_operations, operations
from datadist.testing.far_hosts import FarHosts
from datadist.testing.operations import GroupPlan, Move
from datadist.testing.outcome import Outcome
from datadist.testing.pattern import ExpectedWrite
from datadist.testing.processes import PeerError, Process
from datadist.transport import (
    Access,
    Capabilities,
    Placement,
    TransferError,
    TransportOptions,
    Unsupported,
)

MIB = 1 << 20
LINK_SECONDS = 30.0
SETTLE_SECONDS = 5.0
"""How long the kit waits for what is in flight before it has the link force it, times the scale."""
Segments = Sequence[tuple[int, int, int]]
"""Offset in the local memory, offset in the remote memory, bytes."""


@dataclass(frozen=True)
class Settings:
    """What a transport needs beyond its capabilities; made by ``TransportConformance``."""

    transport: str
    scale: float
    options: Callable[[int], TransportOptions]
    """By rank."""
    table: Callable[[int], str]
    """By number of ranks."""
    address: Callable[[int], str]
    """Network address by rank."""
    maker: str | None
    """Name of the function that makes memory of the user."""
    trusting_asker: str | None = None
    """Name of the function that has a link skip its own checks of what it asks for."""
    hosts: FarHosts | None = None
    """The hosts of the ranks; None where all run on this one."""


@dataclass(eq=False)
class Memory:
    """A region in a process, filled by ``seed``."""

    process: Process
    label: str
    address: int
    size: int
    seed: int

    def refill(self, seed: int) -> None:
        """Other content."""
        self.seed = seed
        self.process.do(memory_operations.fill, self.label, seed)

    def check(self, expected_write: Sequence[ExpectedWrite] = ()) -> None:
        """Raise ``AssertionError`` unless it has its pattern, changed only by these writes."""
        wrong = self.process.do(
            memory_operations.wrong, self.label, self.seed, list(expected_write)
        )
        assert wrong is None, f"memory of {self.process.name}: {wrong}"

    def check_torn(self, expected_write: Sequence[ExpectedWrite]) -> None:
        """As :meth:`check` after an interrupted transfer: any part of these writes may be missing."""
        wrong = self.process.do(memory_operations.torn, self.label, self.seed, list(expected_write))
        assert wrong is None, f"memory of {self.process.name}, after a part of a transfer: {wrong}"

    def expected_write(
        self, source: Memory, segments: Segments, into_remote: bool = False
    ) -> ExpectedWrite:
        """The arrival of ``segments`` of ``source`` here."""
        here, there, length = _columns(segments)
        if into_remote:
            here, there = there, here
        return ExpectedWrite(source.seed, source.size, here, there, length)


def _columns(segments: Segments) -> tuple[array[int], array[int], array[int]]:
    first, second, third = zip(*segments, strict=True)
    return array("q", first), array("q", second), array("q", third)


class Linked:
    """One link between processes, which are its ranks."""

    def __init__(
        self, testbed: Testbed, plan: GroupPlan, members: Mapping[int, Process], access: Access
    ) -> None:
        self.name = plan.name
        self.access = access
        self.members = members
        self._network = plan.network
        self._testbed = testbed
        self.scale = testbed.scale
        self._open = set(members)

    def order(
        self, rank: int, owner: int, local: Memory, remote: Memory, segments: Segments,
        *, write: bool = False, timeout: float = 20.0,
    ) -> Move:  # fmt: skip
        """A read of ``rank`` from ``owner``, or a write to it, to be handed to a process."""
        mine, theirs, length = _columns(segments)
        return Move(
            self.name, owner, write, array("q", [local.address + at for at in mine]),
            array("q", [remote.address + at for at in theirs]), length,
            timeout * self._testbed.scale,
        )  # fmt: skip

    def move(self, rank: int, owner: int, *args: Any, **kwargs: Any) -> Outcome:
        """Run :meth:`order` at once."""
        order = self.order(rank, owner, *args, **kwargs)
        outcome: Outcome = self.members[rank].do(operations.move, order, timeout=order.timeout + 30)
        return outcome

    def abort(self, rank: int, other: int) -> None:
        """Abort at ``rank`` what goes to ``other``; must be quick."""
        seconds = self.members[rank].do(operations.abort, self.name, other)
        assert seconds < self._testbed.scale, f"abort took {seconds:.2f} s, it must not block"

    def lose(self, rank: int, other: int) -> None:
        """Tell ``rank`` that ``other`` is lost, as core does; must be quick."""
        seconds = self.members[rank].do(operations.lose, self.name, other)
        assert seconds < self._testbed.scale, (
            f"peer_lost and abort took {seconds:.2f} s, they must not block"
        )

    def settled(self, rank: int, seconds: float) -> bool:
        """Whether nothing of the transfers that failed at ``rank`` is in flight, or goes on soon."""
        wait = seconds * self._testbed.scale
        done: bool = self.members[rank].do(operations.wait_settled, wait, timeout=seconds + 30)
        return done

    def force(self, rank: int, other: int) -> bool:
        """Force what is in flight to ``other``; whether the transport says that it has settled."""
        outcome = self.force_path(rank, other)
        return bool(outcome.ok)

    def force_path(self, rank: int, other: int) -> Outcome:
        """As :meth:`force`: TransferError where the path has ended, and a transfer goes on. Bounded."""
        outcome: Outcome = self.members[rank].do(operations.force, self.name, other)
        limit = 5 * self._testbed.scale
        if not (outcome.ok or outcome.is_a(TransferError)):
            outcome.must_be(Unsupported, "force, which does not end what is in flight")
        outcome.must_end_within(limit, "force")
        return outcome

    def settle(self, rank: int, other: int) -> None:
        """Wait until memory of a failed transfer may be used again: as core, with `force` at last."""
        if self.settled(rank, SETTLE_SECONDS):
            return
        forced = self.force(rank, other)
        assert self.settled(rank, SETTLE_SECONDS), (
            f"in_flight.settled() is False {in_seconds(2 * SETTLE_SECONDS * self._testbed.scale)} "
            f"after the transfer failed, {'also after' if forced else 'and there is no'} force"
        )

    def close(self, rank: int) -> frozenset[int]:
        """Close one side; the ranks that may still write its memory."""
        self._open.discard(rank)
        closed = self.members[rank].do(operations.close_link, self.name)
        limit = 5 * self._testbed.scale
        for what, seconds in (("close", closed.seconds), ("disconnect", closed.disconnecting)):
            assert seconds < limit, (
                f"{what} took {seconds:.1f} s, it must end within {in_seconds(limit)}"
            )
        return frozenset(closed.possible_writers)

    def close_all(self) -> None:
        """Close the sides that are left; who may not write may not be named."""
        for rank in sorted(self._open):
            possible_writers = self.close(rank)
            assert not possible_writers or self.access is Access.READ_WRITE, (
                f"close named {set(possible_writers)}, which were granted read access only"
            )

    def forget(self, rank: int) -> None:
        """The process of that rank is gone."""
        self._open.discard(rank)

    def kill(self, rank: int) -> None:
        """End the process of a rank. Core tells the transports of other hosts, as it does at once."""
        self.members[rank].kill()
        self.forget(rank)
        for other in sorted(self._open):
            if self._testbed.are_far(rank, other):
                self.lose(other, rank)

    def by_network(self, rank: int, other: int) -> bool:
        """Whether two ranks have met over the network: then no descriptors can be sent."""
        return self._network or self._testbed.are_far(rank, other)


class Testbed:
    """Up to four processes that are shared by all tests; each test cleans up after itself."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.scale = settings.scale
        self._directory = tempfile.mkdtemp(prefix="datadist-kit-")
        self._processes: dict[int, Process] = {}
        self._numbers = itertools.count(1)
        self._capabilities: Capabilities | None = None
        self._of_links: dict[tuple[int, int], Capabilities] = {}

    # -- processes -------------------------------------------------------------------------------

    def bare(self, rank: int) -> Process:
        """The process of a rank; the transport is not made."""
        process = self._processes.get(rank)
        if process is None or process.ended:
            if process is not None:
                process.close()
            process = self._processes[rank] = self._start(rank)
        return process

    def _start(self, rank: int) -> Process:
        name, hosts = f"rank {rank}", self.settings.hosts
        if hosts is None:
            return Process(name, {"DATADIST_RUNTIME_DIR": self._directory}, self.scale)
        host = hosts.host(rank)
        return Process(name, host.environ, self.scale, host.namespace)

    def are_far(self, rank: int, other: int) -> bool:
        """Whether two ranks are on different hosts."""
        hosts = self.settings.hosts
        return hosts is not None and hosts.host(rank) != hosts.host(other)

    def process(self, rank: int) -> Process:
        """The process of a rank, with its transport."""
        process = self.bare(rank)
        process.do(operations.set_up, self.settings.transport, self.settings.options(rank))
        return process

    def processes(self, count: int) -> dict[int, Process]:
        """Processes of the ranks 0 to ``count`` - 1; they start at the same time."""
        for rank in range(count):
            self.bare(rank)
        return {rank: self.process(rank) for rank in range(count)}

    @property
    def capabilities(self) -> Capabilities:
        """What the transport declares: of memory, and of all links alike."""
        if self._capabilities is None:
            process = self.bare(0)
            self._capabilities = process.do(
                operations.set_up, self.settings.transport, self.settings.options(0)
            )
        return self._capabilities

    def ask_link(self, rank: int = 0, other: int = 1) -> Capabilities:
        """What counts for transfers between two ranks: what their link says, as core asks it."""
        pair = rank, other
        if pair not in self._of_links:
            linked = self.open(self.processes(max(pair) + 1), {})
            self._of_links[pair] = linked.members[rank].do(
                operations.capabilities_of, linked.name, other
            )
            linked.close_all()
        return self._of_links[pair]

    # -- memory ----------------------------------------------------------------------------------

    def placement(self) -> Placement:
        """The placement that tests use which do not care."""
        return min(self.capabilities.placements)

    def allocate(
        self, process: Process, size: int = MIB, placement: Placement | None = None,
        foreign: bool = False,
    ) -> Memory:  # fmt: skip
        """Memory of the transport, or of the user (``foreign``) and registered; filled."""
        number = next(self._numbers)
        where = self.placement() if placement is None else placement
        if foreign:
            outcome = process.do(
                memory_operations.register, f"m{number}", size, where, self.settings.maker
            )
        else:
            outcome = process.do(memory_operations.allocate, f"m{number}", size, where)
        outcome.must_succeed(f"{size} bytes of {where} memory at {process.name}")
        memory = Memory(process, f"m{number}", outcome.value[0], size, seed=number)
        memory.refill(number)
        return memory

    # -- links -----------------------------------------------------------------------------------

    def link(
        self, members: Mapping[int, Process], memory: Mapping[int, Sequence[Memory]],
        access: Access = Access.READ, *, over_network: bool = False,
    ) -> Linked:  # fmt: skip
        """A link that is ready on all ranks, which expose ``memory``."""
        linked = self.open(members, memory, access, over_network=over_network)
        for rank, owner in itertools.permutations(members, 2):
            outcome = self.attach(linked, rank, owner)
            outcome.must_succeed(f"rank {rank} attaching the offer of rank {owner}")
        self.join(linked)
        return linked

    def open(
        self, members: Mapping[int, Process], memory: Mapping[int, Sequence[Memory]],
        access: Access = Access.READ, *, over_network: bool = False,
    ) -> Linked:  # fmt: skip
        """A link that every rank has opened, and nothing more."""
        return self.open_at_once(1, members, memory, access, over_network=over_network)[0]

    def open_at_once(
        self, count: int, members: Mapping[int, Process], memory: Mapping[int, Sequence[Memory]],
        access: Access = Access.READ, *, over_network: bool = False,
    ) -> list[Linked]:  # fmt: skip
        """Links that every rank has opened, all of them at the same moment."""
        plans = [
            GroupPlan(
                name=f"kit-{os.getpid()}-{next(self._numbers)}",
                pids={rank: process.pid for rank, process in members.items()},
                table=self.settings.table(len(members)), seconds=LINK_SECONDS * self.scale,
                network=over_network,
            )
            for _ in range(count)
        ]  # fmt: skip
        links = [Linked(self, plan, members, access) for plan in plans]
        for rank, process in members.items():
            labels = [m.label for m in memory.get(rank, ())]
            met = [r for r in members if r != rank and links[0].by_network(rank, r)]
            addresses = {r: self.settings.address(r) for r in met}
            ours = [replace(plan, addresses=addresses) for plan in plans]
            for outcome in process.do(operations.open_links, ours, rank, labels, access):
                outcome.must_succeed(f"open at rank {rank}")
        return links

    @contextmanager
    def offered(self, linked: Linked, owner: int, rank: int) -> Iterator[tuple[bytes, list[int]]]:
        """The offer that ``owner`` makes for ``rank``, and its descriptors, closed at the end."""
        process = linked.members[owner]
        process.begin(operations.offer, linked.name, rank)
        data, fds = process.result_with_fds()
        try:
            assert not fds or not linked.by_network(owner, rank), (
                f"the offer of rank {owner} for rank {rank} has {len(fds)} descriptors, which cannot "
                "be sent to another host"
            )
            yield data, fds
        finally:
            for fd in fds:
                os.close(fd)

    def attach(
        self, linked: Linked, rank: int, owner: int, change: Callable[[bytes], bytes] = bytes
    ) -> Outcome:
        """Hand the offer of ``owner`` to ``rank``, changed."""
        with self.offered(linked, owner, rank) as (data, fds):
            outcome: Outcome = linked.members[rank].do(
                operations.attach, linked.name, owner, change(data), fds=fds
            )
        return outcome

    def join(self, linked: Linked) -> None:
        """Have all ranks join, which have attached all offers."""
        for process in linked.members.values():
            process.begin(operations.join, linked.name, LINK_SECONDS * self.scale)
        results = {r: p.result(LINK_SECONDS + 30) for r, p in linked.members.items()}
        failed = [
            f"join at rank {r}: {outcome}" for r, outcome in results.items() if not outcome.ok
        ]
        assert not failed, "\n".join(failed)

    # -- the end ---------------------------------------------------------------------------------

    def clean(self) -> None:
        """Close links and release memory in every process, also after a failed test.

        Raises :class:`PeerError` for a process that ended although no test ended it.
        """
        crashed = [process.crash() for process in self._processes.values() if process.crashed()]
        for rank, process in list(self._processes.items()):
            if process.ended:
                continue
            try:
                process.do(operations.finalize_engine)
                process.do(operations.close_links)
                assert process.do(operations.wait_settled, SETTLE_SECONDS), "it stays in flight"
                process.do(memory_operations.release_all)
            except (PeerError, AssertionError):
                process.kill()
                del self._processes[rank]
                process.close()
        if crashed:
            raise crashed[0]

    def close(self) -> None:
        """End all processes; closing a transport must not fail."""
        try:
            for process in self._processes.values():
                if not process.ended and not process.busy:  # busy after an interrupt
                    process.do(operations.close_transport)
        finally:
            for process in self._processes.values():
                process.close()
            shutil.rmtree(self._directory, ignore_errors=True)
