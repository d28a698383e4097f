"""A measured engine, in this process or in a separate one."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import select
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datadist import (
    BlocksCacheKey,
    Cache,
    CacheKeyByIdAndIndex,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
    Placement,
    empty,
)
from datadist.base.shielded import start_shielded
from datadist.base.texts import in_seconds
from datadist.bench.shapes import Shape, fill, verify
from datadist.bench.tcp_stream import StreamServer
from datadist.engine.engine import Engine
from datadist.testing.far_hosts import LISTEN_PORT, Host
from datadist.transfers.block_lists import Blocks
from datadist.transport import Link, Transport

PEER, OWN = 1, 2
"""Ids of the two clusters of most workloads: a process of its own, and this process."""
SECONDS = 300.0
STAMP = struct.Struct("d")


class BenchError(Exception):
    """A measurement cannot be made; the text says why."""


@dataclass(frozen=True)
class Settings:
    """What all engines of a run have in common."""

    backend: str = "auto"
    memory: str = "pool"
    """``pool``, ``registered`` (memory of the process), or ``empty`` (of `datadist.empty`)."""
    direction: str = "pull"
    """``pull`` or ``push``."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Options of `init` beside those that the benchmark sets itself."""
    hosts: tuple[Host, ...] = ()
    """Those of the clusters in turn; none where all are on this host."""
    places: str = ""
    """What these hosts are, for people."""
    placement: Placement = Placement.DEVICE

    def host(self, cluster: int) -> Host | None:
        """Where a cluster is; None for this host."""
        return self.hosts[(cluster - 1) % len(self.hosts)] if self.hosts else None


@lru_cache
def table(clusters: int, hosts: tuple[Host, ...] = ()) -> str:
    """A rank table of one server, or of a server for each host in use."""
    devices = [{"device_id": str(r), "rank_id": str(r)} for r in range(clusters)]
    places = [host.address for host in hosts[:clusters]] or ["127.0.0.1"]
    servers = [
        {"server_id": place, "device": devices[n :: len(places)]} for n, place in enumerate(places)
    ]
    count = str(len(servers))
    return json.dumps(
        {"version": "1.0", "status": "completed", "server_count": count, "server_list": servers}
    )


class MeasuredEngine:
    """An engine with its caches; every method can be called in another process by name."""

    def __init__(self, cluster: int, settings: Settings) -> None:
        self.cluster = cluster
        self.settings = settings
        self.engine = LLMDataDist(LLMRole.MIX, cluster)
        self.caches: dict[str, Cache] = {}
        self._arrays: dict[str, list[NDArray[Any]]] = {}
        self._more: dict[str, Any] = (
            {"tensor_num_per_layer": 1} if settings.direction == "push" else {}
        )

    # -- set-up ------------------------------------------------------------------------------

    def start(self, pool: int) -> float:
        """Initialise with a pool of ``pool`` bytes; the seconds that it took."""
        config = LLMConfig()
        config.enable_cache_manager = True
        config.transfer_backend = self.settings.backend
        config.enable_remote_cache_accessible = self.settings.direction == "push"
        config.sync_kv_timeout = int(SECONDS * 1000)
        config.link_total_time = int(SECONDS)
        sizes = json.dumps({"memory_size": pool})
        if self.settings.placement is Placement.HOST:
            config.host_mem_pool_cfg = sizes
        else:
            config.mem_pool_cfg = sizes
        host, given = self.settings.host(self.cluster), self.settings.options
        if host is not None:
            config.listen_ip_info = f"{host.address}:{LISTEN_PORT + self.cluster}"
            given = {key: host.fill(value) for key, value in given.items()}
        began = time.perf_counter()
        self.engine.init({**config.generate_options(), **given})
        seconds = time.perf_counter() - began
        if host is not None and self.transport.capabilities.same_host_only:
            raise BenchError(
                f"{self.backend()} links processes of one host only (capabilities.same_host_only): "
                "measure it without --far"
            )
        return seconds

    def stop(self) -> None:
        """Finalize."""
        self.engine.finalize()
        self.caches.clear()
        self._arrays.clear()

    def backend(self) -> str:
        """The transport in use."""
        return str(self.engine.backend)

    @property
    def core(self) -> Engine:
        """The engine behind the API."""
        return self.engine._live(LLMStatusCode.LLM_FAILED)

    @property
    def transport(self) -> Transport:
        """The transport in use."""
        return self.core.transport

    def forget_routes(self) -> None:
        """Have each transfer's route looked up again."""
        self.core.route_cache.clear()

    def link_to(self, peer: int) -> Link:
        """The transport's link to a cluster."""
        link = self.core.transfers.routes(peer, time.monotonic() + 10)[0].attempt.link
        assert link is not None
        return link

    def make(self, label: str, shape: Shape, filled: bool, at_once: bool = False) -> int:
        """A cache of a shape in the memory of the run, filled or zeroed; its id.

        A blocks cache is bound to the model id that :func:`model_of` gives for its shape. Unless it is to
        be there ``at_once``, pages are waited for: who writes before that makes them, and small ones.
        """
        manager = self.engine.cache_manager
        key = (
            BlocksCacheKey(self.cluster, model_of(shape)) if filled == self._key_is_filled else None
        )
        if self.settings.memory == "pool":
            cache = (
                manager.allocate_cache(shape.desc(self.settings.placement))
                if shape.contiguous
                else manager.allocate_blocks_cache(shape.desc(self.settings.placement), key)
            )
            arrays = cache.numpy()
        else:
            arrays = self._arrays_of(shape)
            addresses = [array.ctypes.data for array in arrays]
            cache = (
                manager.register_cache(shape.desc(self.settings.placement), addresses)
                if shape.contiguous
                else manager.register_blocks_cache(
                    shape.desc(self.settings.placement), addresses, key
                )
            )
        self.caches[label], self._arrays[label] = cache, arrays
        if not at_once:
            self.core.memory.wait_filled(SECONDS)
        self.fill(label, shape) if filled else self.clear(label)
        return cache.cache_id

    def _arrays_of(self, shape: Shape) -> list[NDArray[Any]]:
        """Memory of our own for the tensors of a shape."""
        size = (shape.blocks, shape.block_bytes)
        if self.settings.memory == "empty":
            return list(empty((shape.tensors, *size), np.uint8))
        return [np.zeros(size, np.uint8) for _ in range(shape.tensors)]

    @property
    def _key_is_filled(self) -> bool:
        """Whether keys name the filled caches: for pulls peers read these, for pushes they write
        the others.
        """
        return self.settings.direction == "pull"

    def drop(self, label: str) -> None:
        """Free a cache."""
        cache = self.caches.pop(label)
        manager = self.engine.cache_manager
        self._arrays.pop(label)
        if self.settings.memory != "pool":
            manager.unregister_cache(cache.cache_id)
        elif cache.is_blocks_cache:
            manager.deallocate_blocks_cache(cache)
        else:
            manager.deallocate_cache(cache)

    def fill(self, label: str, shape: Shape) -> None:
        """Write the content of every block."""
        fill(shape, self._arrays[label])

    def clear(self, label: str) -> None:
        """Zero a cache."""
        for array in self._arrays[label]:
            array[:] = 0

    def link(self, name: str, clusters: int) -> int:
        """Begin to link with the clusters 1 to ``clusters``."""
        ranks = table(clusters, self.settings.hosts)
        return self.engine.link(name, {r + 1: r for r in range(clusters)}, ranks)

    def link_many(self, names: list[str], clusters: int) -> None:
        """Link several domains at once, until all are OK."""
        for comm_id in [self.link(name, clusters) for name in names]:
            self.wait(comm_id)

    def wait(self, comm_id: int) -> None:
        """Until a link is OK."""
        self.engine.wait_link(comm_id)

    def unlink(self, comm_id: int) -> None:
        """Leave a domain."""
        self.engine.unlink(comm_id)

    # -- moving ------------------------------------------------------------------------------

    def move(
        self, label: str, shape: Shape, peer: int, cache_id: int, lists: tuple[Blocks, Blocks]
    ) -> float:
        """One transfer between a cache of ours and cache ``cache_id`` of a peer; its seconds."""
        manager, cache = self.engine.cache_manager, self.caches[label]
        pull = self.settings.direction == "pull"
        source, target = lists
        operate: Callable[..., None]
        if shape.contiguous:
            slot = CacheKeyByIdAndIndex(peer, cache_id)
            operate = manager.pull_cache if pull else manager.push_cache
            began = time.perf_counter()
            operate(slot, cache, **self._more)
        else:
            key = BlocksCacheKey(peer, model_of(shape))
            operate = manager.pull_blocks if pull else manager.push_blocks
            began = time.perf_counter()
            operate(key, cache, source, target, **self._more)
        return time.perf_counter() - began

    def move_each(
        self, label: str, shape: Shape, peer: int, lists: Sequence[tuple[list[int], list[int]]]
    ) -> list[float]:
        """One transfer of blocks after another; the seconds of each."""
        manager, cache = self.engine.cache_manager, self.caches[label]
        key = BlocksCacheKey(peer, model_of(shape))
        operate: Callable[..., None] = (
            manager.pull_blocks if self.settings.direction == "pull" else manager.push_blocks
        )
        if self._more:
            operate = partial(operate, **self._more)
        clock, seconds = time.perf_counter, []
        for source, target in lists:
            began = clock()
            operate(key, cache, source, target)
            seconds.append(clock() - began)
        return seconds

    def move_many(self, label: str, shape: Shape, peer: int, cache_id: int, times: int) -> float:
        """Several transfers; the seconds of all."""
        return sum(self.move(label, shape, peer, cache_id, shape.lists(n)) for n in range(times))

    # -- messages ----------------------------------------------------------------------------

    def send_paced(self, peer: int, count: int, nbytes: int, pause: float) -> None:
        """Messages that say when they were sent, with pauses of some seconds."""
        rest = bytes(nbytes - STAMP.size)
        for _ in range(count):
            if pause:
                time.sleep(pause)
            self.engine.send_message(peer, STAMP.pack(time.monotonic()) + rest)

    def receive(self, count: int) -> list[float]:
        """Take so many; the seconds since each was sent, by the clock of the machine."""
        seconds: list[float] = []
        while len(seconds) < count:
            if not select.select([self.engine.messages_fileno()], [], [], SECONDS)[0]:
                raise BenchError(f"no message came within {in_seconds(SECONDS)}")
            messages, now = self.engine.messages(), time.monotonic()
            seconds += [now - STAMP.unpack_from(message.data)[0] for message in messages]
        return seconds

    def problems(self, label: str, shape: Shape, lists: tuple[list[int], list[int]]) -> list[str]:
        """What is wrong in a cache that was zeroed before one transfer."""
        if shape.contiguous:
            lists = ([0], [0])
        return verify(shape, self._arrays[label], *lists)

    def cpu(self) -> float:
        """Seconds of processor time that this process has used."""
        return time.process_time()

    def open_stream(self, secret: bytes) -> tuple[str, int]:
        """Serve a TCP connection, to measure the network; its address."""
        host = self.settings.host(self.cluster)
        address = "127.0.0.1" if host is None else host.address
        return address, StreamServer(address, secret).port

    def place(self, label: str) -> tuple[int, list[int]]:
        """Process id, and the addresses of a cache's tensors."""
        return os.getpid(), list(self.caches[label].tensor_addrs)


def model_of(shape: Shape) -> int:
    """The model id of a shape's blocks key, so that several fit into one engine."""
    return hash((shape.tensors, shape.blocks, shape.block_bytes)) & 0x7FFFFFFF


class RemoteEngine:
    """A :class:`MeasuredEngine`, or one of a ``kind`` of it, in a process of its own."""

    def __init__(
        self, cluster: int, settings: Settings, kind: type[MeasuredEngine] = MeasuredEngine
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(theirs, kind, cluster, settings),
            name=f"cluster-{cluster}",
            daemon=True,
        )
        start_shielded(self._process.start)
        theirs.close()

    def begin(self, method: str, *args: Any) -> None:
        """Start a method of the side."""
        self._pipe.send((method, args))

    def result(self) -> Any:
        """What it returned. Raises :class:`BenchError`."""
        if not self._pipe.poll(SECONDS):
            raise BenchError(f"{self._process.name} did not answer for {in_seconds(SECONDS)}")
        try:
            ok, value = self._pipe.recv()
        except EOFError:
            raise BenchError(f"the process {self._process.name} has ended") from None
        if not ok:
            raise BenchError(f"{self._process.name}: {value}")
        return value

    def call(self, method: str, *args: Any) -> Any:
        """Run a method of the side and return its result."""
        self.begin(method, *args)
        return self.result()

    def close(self) -> None:
        """End the process; kill it when it does not end."""
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(pipe: Connection, kind: type[MeasuredEngine], cluster: int, settings: Settings) -> None:
    logging.getLogger("datadist").setLevel(logging.CRITICAL)  # errors are sent over the pipe
    host = settings.host(cluster)
    if host is not None:
        host.enter()
        os.environ.update(host.environ)
    side = kind(cluster, settings)
    while True:
        try:
            method, args = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = (True, getattr(side, method)(*args))
        except Exception as error:
            answer = (False, f"{type(error).__name__}: {error}")
        try:
            pipe.send(answer)
        except OSError:  # the other end has failed and reports why
            return
