"""Operations on transports that the kit's processes run; each function runs in such a process."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from datadist.rank_table import parse_rank_table
from datadist.testing.child import State, Task, WithFds
from datadist.testing.outcome import Outcome, outcome_of
from datadist.transport import (
    Access,
    Availability,
    Capabilities,
    Group,
    Link,
    Offer,
    Peer,
    TransportError,
    TransportOptions,
)
from datadist.transports.loader import load_transport

# -- the transport -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Declared:
    """The declarations of a transport class."""

    distribution: str
    version: str
    requirements: Mapping[str, tuple[str, ...]]
    """Of each distribution that the transport comes from."""
    qualname: str
    api_version: object
    priority: object
    probe: Availability
    probe_seconds: float


def declared(state: State, name: str) -> Declared:
    """Load the class and read its declarations."""
    backend, loaded = load_transport(name)
    begin = time.monotonic()
    probe = loaded.probe()
    return Declared(
        distribution=backend.distribution,
        version=backend.version,
        requirements={name: tuple(metadata.requires(name) or ()) for name in backend.distributions},
        qualname=f"{loaded.__module__}.{loaded.__qualname__}",
        api_version=loaded.api_version,
        priority=loaded.priority,
        probe=probe,
        probe_seconds=time.monotonic() - begin,
    )


def set_up(state: State, name: str, options: TransportOptions) -> Capabilities:
    """Make the transport, unless there is one."""
    if state.transport is None:
        state.transport = load_transport(name)[1](options)
    return state.transport.capabilities


def close_transport(state: State) -> None:
    """Close it, and once more, which must change nothing."""
    if state.transport is not None:
        state.transport.close()
        state.transport.close()
    state.transport = None


def finalize_engine(state: State) -> None:
    """End what a test of whole engines left."""
    if state.engine is not None:
        state.engine.finalize()
    state.engine = None
    state.any.clear()


def describe(state: State) -> Mapping[str, Any]:
    """Facts for people."""
    return dict(state.live.describe())


def check_table(state: State, table: str, rank: int) -> Outcome:
    """What the transport says to a rank table."""
    return outcome_of(lambda: state.live.check_table(parse_rank_table(table), rank))


# -- links -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupPlan:
    """What a process must know about a link's members; lists are by rank."""

    name: str
    pids: Mapping[int, int]
    table: str | None
    seconds: float
    addresses: Mapping[int, str] = field(default_factory=dict)
    """Addresses of the peers that this process meets over the network."""
    network: bool = False
    """Whether all meet over the network this time, although they are on one host."""

    def incarnation(self, rank: int) -> str:
        """That of a rank's engine, equal at all ranks."""
        return f"engine-{self.pids[rank]}" + ("@network" if self.network else "")


def open_link(
    state: State, link: str, plan: GroupPlan, rank: int, labels: Sequence[str], access: Access
) -> Outcome:
    """Make this rank's side."""
    peers = {rank: Peer(rank, plan.incarnation(rank))}

    def call() -> None:
        for other, pid in plan.pids.items():
            if other != rank:
                peers[other] = state.peers.take(
                    state.live, link, other, plan.incarnation(other), pid, plan.addresses.get(other)
                )
        group = Group(
            name=plan.name, rank=rank, peers=dict(sorted(peers.items())),
            table=None if plan.table is None else parse_rank_table(plan.table),
            deadline=time.monotonic() + plan.seconds,
        )  # fmt: skip
        regions = [state.regions[label] for label in labels]
        state.links[link] = state.live.open(group, regions, access)
        state.added[link] = set()

    outcome = outcome_of(call)
    if not outcome.ok:
        state.peers.give_back(state.live, link)
    return outcome


def capabilities_of(state: State, link: str, rank: int) -> Capabilities:
    """What a link can do with a peer."""
    own = state.links[link].capabilities_of(rank)
    return state.live.capabilities if own is None else own


def open_links(
    state: State, plans: Sequence[GroupPlan], rank: int, labels: Sequence[str], access: Access
) -> list[Outcome]:
    """As :func:`open_link`, several at the same moment."""
    start = threading.Barrier(len(plans))

    def opened(plan: GroupPlan) -> Outcome:
        start.wait(10)
        return open_link(state, plan.name, plan, rank, labels, access)

    with ThreadPoolExecutor(len(plans)) as pool:
        return list(pool.map(opened, plans))


def offer(state: State, link: str, rank: int) -> WithFds:
    """The offer for a peer: its bytes, with the descriptors."""
    made = state.links[link].offer(rank)
    return WithFds(bytes(made.data), list(made.fds))


def attach(state: State, link: str, rank: int, data: bytes) -> Outcome:
    """Take a peer's offer, whose descriptors came with the call: at once, or else as a worker does."""
    taken, offer = state.links[link], Offer(data, state.take_fds())

    def call() -> None:
        if not _attached_at_once(taken, rank, offer):
            taken.attach(rank, offer)

    return outcome_of(call)


def _attached_at_once(link: Link, rank: int, offer: Offer) -> bool:
    """Whether the offer was taken; if not, it has to be as it was."""
    before = [os.fstat(fd) for fd in offer.fds]
    try:
        taken = link.attach_at_once(rank, offer)
    except Exception as error:
        raise AssertionError(f"attach_at_once raised {type(error).__name__}: {error}") from error
    assert type(taken) is bool, f"attach_at_once returned {taken!r}, expected True or False"
    for fd, file in zip(offer.fds, before, strict=True):
        if not taken:
            assert os.path.samestat(os.fstat(fd), file), "attach_at_once closed what it left"
    return taken


def join(state: State, link: str, timeout: float) -> Outcome:
    """Connect to the peers, for self-bootstrapping transports."""
    return outcome_of(lambda: state.links[link].join(timeout))


def exchange(state: State, link: str, data: bytes) -> list[bytes]:
    """Swap blobs after join."""
    return state.links[link].exchange(data)


@dataclass(frozen=True)
class Move:
    """One read or write."""

    link: str
    rank: int
    write: bool
    local: array[int]
    remote: array[int]
    length: array[int]
    timeout: float


def _run(link: Link, order: Move, vectors: Sequence[Any]) -> bool | None:
    method = link.write if order.write else link.read
    return method(order.rank, vectors[0], vectors[1], vectors[2], order.timeout)


def control(state: State, link: str, rank: int, what: str) -> None:
    """Send to, read from, or end the socket that stands for core's connection to a peer."""
    connection = state.peers.of(link, rank)
    if what == "arrives":
        connection.remote.send(b"news")
    elif what == "is taken":
        connection.core.recv(100)
    else:
        connection.remote.close()


def move(state: State, order: Move) -> Outcome:
    """Read or write."""
    link = state.links[order.link]
    vectors = order.local, order.remote, order.length
    return outcome_of(lambda: _run(link, order, vectors), _keep(state, order))


def _keep(state: State, order: Move) -> Callable[[TransportError], None]:
    def keep(error: TransportError) -> None:
        if error.in_flight is not None:
            state.in_flight.append((order.link, order.rank, error.in_flight))

    return keep


def all_settled(state: State) -> bool:
    """Whether nothing of the transfers that have failed here is in flight."""
    for link, rank, in_flight in list(state.in_flight):
        settled = in_flight.settled()
        assert type(settled) is bool, f"in_flight.settled() returned {settled!r}, expected a bool"
        if settled:
            state.in_flight.remove((link, rank, in_flight))
    return not state.in_flight


def wait_settled(state: State, seconds: float) -> bool:
    """As :func:`all_settled`, after ``seconds`` at most."""
    end = time.monotonic() + seconds
    while not all_settled(state):
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def force(state: State, link: str, rank: int) -> Outcome:
    """Force, twice."""

    def call() -> None:
        state.links[link].force(rank)
        state.links[link].force(rank)

    return outcome_of(call)


def lose(state: State, link: str, rank: int) -> float:
    """Do what core does when it has lost a peer; returns the seconds of its control thread."""
    connection = state.peers.of(link, rank)
    begin = time.monotonic()
    if not connection.lost:
        connection.lost = True
        state.live.peer_lost(connection.peer)
    for name in sorted(connection.links & set(state.links)):
        state.links[name].abort(rank)
    return time.monotonic() - begin


def move_with(state: State, order: Move, kind: str) -> Outcome:
    """Read or write with vectors of another type that has the buffer protocol."""
    makers: dict[str, Callable[[array[int]], Any]] = {
        "ctypes": lambda v: (ctypes.c_int64 * len(v))(*v),
        "memoryview": memoryview,
        "read-only": lambda v: memoryview(v.tobytes()).cast("q"),
    }
    vectors = [makers[kind](v) for v in (order.local, order.remote, order.length)]
    return outcome_of(lambda: _run(state.links[order.link], order, vectors))


def move_all(state: State, orders: Sequence[Move]) -> list[Outcome]:
    """Several at once, each on a thread of its own."""
    tasks = [Task(lambda order=order: move(state, order)) for order in orders]  # type: ignore[misc]
    return [t.result(order.timeout + 30) for t, order in zip(tasks, orders, strict=True)]


def move_until_failure(state: State, order: Move, seconds: float) -> Outcome:
    """Repeat a read or write until it fails, or ``seconds`` have passed; the link may be closed."""
    end = time.monotonic() + seconds
    link = state.links[order.link]
    vectors = order.local, order.remote, order.length
    outcome = Outcome()
    while outcome.ok and time.monotonic() < end:
        outcome = outcome_of(lambda: _run(link, order, vectors), _keep(state, order))
    return outcome


def move_and_tick(state: State, order: Move) -> tuple[Outcome, int]:
    """A read or write, and in how many tenths of its time another thread ran."""
    stop = threading.Event()
    ticks: list[float] = []

    def tick() -> None:
        while not stop.wait(0.001):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.monotonic()
    outcome = move(state, order)
    seconds = time.monotonic() - begin
    stop.set()
    thread.join()
    tenths = {int((tick - begin) / seconds * 10) for tick in ticks}
    return outcome, len(tenths & set(range(10)))


def start(state: State, task: str, function: Callable[..., Any], *args: Any) -> None:
    """Run another function of this module on a thread."""
    state.tasks[task] = Task(lambda: function(state, *args))


def finish(state: State, task: str, timeout: float) -> Any:
    """Its result."""
    return state.tasks.pop(task).result(timeout)


def abort(state: State, link: str, rank: int) -> float:
    """Abort, twice; returns the seconds it took."""
    begin = time.monotonic()
    state.links[link].abort(rank)
    state.links[link].abort(rank)
    return time.monotonic() - begin


@dataclass(frozen=True)
class Closed:
    """The end of one side of a link."""

    possible_writers: frozenset[int]
    """The ranks that may still write our memory."""
    seconds: float
    """What `close` took."""
    disconnecting: float = 0.0
    """What the slowest `disconnect` took, where this was the last link with a peer."""


def close_link(state: State, link: str) -> Closed:
    """Close, twice; forces what is in flight before, and disconnects afterwards, as core does."""
    for rank in {rank for name, rank, _ in state.in_flight if name == link}:
        if not all_settled(state):
            force(state, link, rank)
    begin = time.monotonic()
    closing = state.links[link]  # stays there meanwhile: other threads are moving over it
    possible_writers = closing.close()
    seconds = time.monotonic() - begin
    del state.links[link]
    state.added.pop(link, None)
    assert isinstance(possible_writers, frozenset), (
        f"close returned {possible_writers!r}, expected a frozenset of ranks"
    )
    again = closing.close()
    assert again <= possible_writers, (
        f"close said {set(possible_writers)}, and {set(again)} when called again"
    )
    return Closed(possible_writers, seconds, state.peers.give_back(state.live, link))


def move_after_close(state: State, order: Move) -> Outcome:
    """Read or write on a link that was closed just before."""
    link = state.links[order.link]
    close_link(state, order.link)
    return outcome_of(lambda: _run(link, order, (order.local, order.remote, order.length)))


def close_links(state: State) -> None:
    """Close what is left."""
    for link in list(state.links):
        close_link(state, link)


# -- what a process holds ----------------------------------------------------------------------


@dataclass(frozen=True)
class ResourceUsage:
    """Descriptors, threads and mappings of a process."""

    descriptors: int
    threads: int
    mappings: int
    details: str = field(compare=False, default="")


def resource_usage(state: State) -> ResourceUsage:
    """Count after a garbage collection."""
    gc.collect()
    targets = []
    for name in os.listdir("/proc/self/fd"):
        try:
            targets.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue  # the descriptor of this listing
    return ResourceUsage(
        descriptors=len(targets),
        threads=len(os.listdir("/proc/self/task")),
        mappings=len(Path("/proc/self/maps").read_text().splitlines()),
        details=", ".join(sorted(targets)),
    )
