"""Engines in processes of their own, linked with each other, for one test."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from typing import Any, overload

from pytest_datadist import remote
from pytest_datadist.errors import WorkerError
from pytest_datadist.isolation import Isolation
from pytest_datadist.pool import Pool
from pytest_datadist.worker import Worker

ROLES = ("MIX", "PROMPT", "DECODER")
MAX_LINKED = 4
"""Members of a communication domain."""
MAX_WORKERS = 16
MIB = 1 << 20
POOL = 16 * MIB
NAME = "pytest"
END_SECONDS = 30.0
"""How long an engine may take to end."""


@dataclass(frozen=True)
class Shape:
    """What a test asks for. Raises ``TypeError``, ``ValueError``."""

    count: int
    roles: Sequence[Any] | None = None
    """Members of ``LLMRole`` or their names; None: the first is a PROMPT, the others are DECODERs."""
    pool: int = POOL
    """Bytes of the device pool of each engine; 0 for none."""
    options: Mapping[str, str] = field(default_factory=dict)
    """For ``init``, over those of the fixture."""
    link: bool = True
    engines: bool = True

    def __post_init__(self) -> None:
        most = MAX_LINKED if self.links else MAX_WORKERS
        if not isinstance(self.count, int) or not 1 <= self.count <= most:
            more = ", of which a communication domain has no more (link=False permits 16)"
            raise ValueError(
                f"the number of workers is {self.count!r}, expected 1 to {most}"
                + (more if self.links else "")
            )
        if self.roles is not None and len(self.roles) != self.count:
            raise ValueError(f"roles has {len(self.roles)} names for {self.count} workers")
        for role in self.roles or ():
            if _name(role) not in ROLES:
                raise ValueError(f"a role is {role!r}, expected one of {', '.join(ROLES)}")
        for name, value in self.options.items():
            if not isinstance(name, str) or not isinstance(value, str):
                raise TypeError(f"options has {name!r}: {value!r}, names and values are text")

    @property
    def links(self) -> bool:
        """Whether the fixture links the engines."""
        return self.link and self.engines and self.count != 1

    def role(self, index: int) -> str | None:
        """The role of an engine; None where there are no engines."""
        if not self.engines:
            return None
        if self.roles is None:
            return "DECODER" if index else "PROMPT"
        return _name(self.roles[index])

    def engine_options(self) -> dict[str, str]:
        """Options for ``init``."""
        made = {
            "llm.EnableCacheManager": "1",
            "llm.LinkTotalTime": "60",
            "llm.SyncKvCacheWaitTime": "5000",
        }
        if self.pool:
            made["llm.MemPoolConfig"] = json.dumps({"memory_size": self.pool, "page_shift": 12})
        return {**made, **self.options}


def shape_of(count: int, settings: Mapping[str, Any]) -> Shape:
    """What a test asks for by arguments with names. Raises ``TypeError``, ``ValueError``."""
    known = [each.name for each in fields(Shape) if each.name != "count"]
    for name in settings:
        if name not in known:
            raise TypeError(
                f"{name} is no argument of datadist_cluster, which has {', '.join(known)}"
            )
    return Shape(count, **settings)


def _name(role: Any) -> str:
    return str(getattr(role, "name", role))


class Cluster(Sequence[Worker]):
    """Workers by rank. The cluster ids of a test's workers are 1, 2 and so on."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = tuple(workers)

    def __len__(self) -> int:
        return len(self._workers)

    @overload
    def __getitem__(self, index: int) -> Worker: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Worker]: ...

    def __getitem__(self, index: int | slice) -> Worker | Sequence[Worker]:
        return self._workers[index]

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers)

    def run_all(
        self,
        function: Callable[..., Any],
        *args: Any,
        timeout: float | None = None,
        **options: Any,
    ) -> list[Any]:
        """Run a function in all workers at the same time; the results, by rank."""
        __tracebackhide__ = True
        calls = [worker.start(function, *args, **options) for worker in self]
        return [call.result(timeout) for call in calls]

    def cut(self, first: Worker, second: Worker) -> int:
        """Break all connections between two workers, as a fault of the network does, while both live.

        That is their sockets: the session of the two engines, and what the transport has besides.
        Returns how many there were. Raises :class:`WorkerError` where there were none.
        """
        by, other = (second, first) if first.stopped else (first, second)
        if by is other or by.stopped:
            raise WorkerError(
                f"{first!r} and {second!r}: give two workers, at most one of them stopped"
            )
        found = by.cut(other)
        if not found:
            raise WorkerError(f"{first!r} and {second!r} have no connection: link them first")
        return found

    def __repr__(self) -> str:
        return f"Cluster({', '.join(map(repr, self))})"


def make(pool: Pool, shape: Shape, isolation: Isolation, seconds: float, first_id: int) -> Cluster:
    """Take processes, initialise engines and link them; :func:`end` undoes it."""
    processes = pool.take(shape.count)
    workers: list[Worker] = []
    try:
        for index, process in enumerate(processes):
            cluster_id = first_id + index
            workers.append(Worker(process, cluster_id, shape.role(index), isolation, seconds))
        for worker in workers:
            worker.begin(_setup(shape, worker))
        _answers(workers)
        if shape.links:
            _link(workers)
    except BaseException:
        for process in processes:
            pool.discard(process)
        for worker in workers:
            worker.release()
        raise
    return Cluster(workers)


def _setup(shape: Shape, worker: Worker) -> remote.Setup:
    options, environ = shape.engine_options(), dict(os.environ)
    return remote.Setup(
        worker.role, worker.cluster_id, options, environ, os.getcwd(), list(sys.path)
    )


def _link(workers: Sequence[Worker]) -> None:
    mapping = {worker.cluster_id: rank for rank, worker in enumerate(workers)}
    for worker in workers:
        worker.ask("link", remote.link, NAME, mapping, table_of(len(workers)))
    for worker, comm_id in zip(workers, _answers(workers), strict=True):
        worker.comm_id = comm_id


def _answers(workers: Sequence[Worker]) -> list[Any]:
    """The answers of all, of which the first failure is raised when all have come."""
    found, failures = [], []
    for worker in workers:
        try:
            found.append(worker.answer())
        except Exception as error:
            failures.append(error)
    if failures:
        raise failures[0]
    return found


def table_of(count: int) -> str:
    """A rank table of one server with a device for each rank."""
    devices = [{"device_id": str(rank), "rank_id": str(rank)} for rank in range(count)]
    server = {"server_id": NAME, "device": devices}
    return json.dumps(
        {"version": "1.0", "status": "completed", "server_count": "1", "server_list": [server]}
    )


def end(pool: Pool, cluster: Cluster, isolation: Isolation, check_pools: bool) -> list[str]:
    """End the engines and give back the processes; what the test has left in them, in words.

    A process in which something was left, or a fault was injected, is not used again.
    """
    texts: list[str] = []
    good: list[Worker] = []
    with ExitStack() as stack:
        for worker in cluster:
            faulted = worker.faulted  # by the test: what is found now is not meant
            state = _state(worker)
            if state is None and not faulted:
                good.append(worker)
                continue
            texts += [] if state is None or faulted else [state]
            isolation.expect_end(worker.pid, worker.cluster_id)
            stack.callback(pool.discard, worker.release())
    asked = [_asked_to_finish(worker, check_pools) for worker in good]
    with ExitStack() as stack:
        for worker, failure in zip(good, asked, strict=True):
            left = [failure] if failure else _finished(worker)
            texts += left
            then = pool.discard if left else pool.give_back
            stack.callback(then, worker.release())
    return texts


def _state(worker: Worker) -> str | None:
    """Why a worker cannot be used again, in words, or None."""
    ended = worker.ended_by_itself()
    if ended is not None:
        return ended
    if worker.busy:
        return worker.ended_in_call() or (
            f"{worker!r}, which still runs {worker.busy} or whose result nobody took"
        )
    return None


def _asked_to_finish(worker: Worker, check_pools: bool) -> str | None:
    """Have a worker finish; why it cannot, in words, or None."""
    try:
        worker.ask("finish", remote.finish, check_pools)
    except WorkerError as error:
        return str(error)
    return None


def _finished(worker: Worker) -> list[str]:
    try:
        return [f"{text}; in {worker!r}" for text in worker.answer(END_SECONDS)]
    except Exception as error:
        return [f"{worker!r}, which did not end its engine: {error}"]
