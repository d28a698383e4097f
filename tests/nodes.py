"""Real processes for tests: a node runs functions of the test module, one after another."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from datadist import (
    Cache,
    CacheDesc,
    DataType,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    Placement,
    RegisterMemStatus,
)

MIB = 1 << 20
SECONDS = 60.0
MARGIN, EDGE = 1024, 0x5A5A5A5A
"""Numbers around registered arrays that nobody may change."""
PRELOADED = [
    "hypothesis", "pytest", "datadist.api.cache_manager", "datadist.engine.engine",
    "stevedore.driver", "tests.nodes",
]  # fmt: skip
"""What nodes need not import each for themselves."""
OF_THE_TESTS = "DATADIST_TESTS_"
"""Begins variables for the tests themselves. A transport called "tests" would read them as options."""


class RemoteError(Exception):
    """An exception in a node: its type's name, its status code's name, its text."""

    def __init__(self, kind: str, status: str | None, text: str) -> None:
        super().__init__(f"{kind} ({status}): {text}")
        self.kind = kind
        self.status = status
        self.text = text


class Here:
    """What a node keeps between the functions that it runs."""

    def __init__(self) -> None:
        self.engine: LLMDataDist | None = None
        self.caches: dict[str, Cache] = {}
        self.arrays: dict[str, list[NDArray[Any]]] = {}
        self.log: list[str] = []
        self.any: dict[str, Any] = {}

    @property
    def live(self) -> LLMDataDist:
        """The engine, which has been initialised."""
        assert self.engine is not None
        return self.engine


class AnyNode(Protocol):
    """A node, here or in another machine."""

    def do(
        self, function: Callable[..., Any], *args: Any, timeout: float = ..., **options: Any
    ) -> Any:
        """Run a function and return its result."""

    def kill(self) -> None:
        """End the process without a chance to clean up."""


class Node:
    """The test's side of a process.

    Nodes are forked from a process that has imported what they need and has done nothing else: it
    has one thread and no engine. A node has the environment and the working directory of the test, but
    for :data:`OF_THE_TESTS`.
    ``modules`` are imported beforehand too; those of the first node of a test run count. ``serve_by``
    is a function that calls :func:`serve` in the process, and further arguments of it.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        modules: Sequence[str] = (),
        serve_by: Sequence[Any] = (),
    ) -> None:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy starts no thread to be forked
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOADED, *modules])
        self._pipe, theirs = context.Pipe()
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(OF_THE_TESTS)
        }
        surroundings = {**inherited, **environ}, os.getcwd()
        function, *more = serve_by or (serve,)
        self._process = context.Process(
            target=function, args=(theirs, *surroundings, *more), daemon=True
        )
        self._process.start()
        theirs.close()
        self._busy = False

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process runs, or is stopped."""
        return self._process.is_alive()

    @property
    def exit_code(self) -> int | None:
        """Of the process; negative, a signal; None while it runs."""
        return self._process.exitcode

    def begin(self, function: Callable[..., Any], *args: Any, **options: Any) -> None:
        """Start ``function(here, *args, **options)`` in the node."""
        assert not self._busy
        self._pipe.send((function, args, options))
        self._busy = True

    def result(self, timeout: float = SECONDS) -> Any:
        """What the function returned. Raises :class:`RemoteError` for what it raised."""
        if not self._pipe.poll(timeout):
            raise TimeoutError(f"node {self.pid} did not answer in {timeout} s")
        self._busy = False
        ok, value = self._pipe.recv()
        if not ok:
            raise RemoteError(*value)
        return value

    def do(
        self, function: Callable[..., Any], *args: Any, timeout: float = SECONDS, **options: Any
    ) -> Any:
        """Run a function and return its result."""
        self.begin(function, *args, **options)
        return self.result(timeout)

    def kill(self) -> None:
        """End the process without a chance to clean up."""
        self._process.kill()
        self._process.join(SECONDS)

    def pause(self) -> None:
        """SIGSTOP, until every thread has stopped."""
        stop(self.pid)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """End the process in order; kill it when it does not end."""
        self._pipe.close()
        self._process.join(0 if self._busy else 10)
        if self._process.is_alive():
            with contextlib.suppress(ProcessLookupError):  # it may end now
                self.resume()
            self._process.kill()
            self._process.join()
        self._process.close()


def stop(pid: int) -> None:
    """Stop a process; on a crowded machine its threads go on for a while after the signal."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + SECONDS
    while not all(_is_stopped(task) for task in Path(f"/proc/{pid}/task").iterdir()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} did not stop")
        time.sleep(0.001)


def _is_stopped(task: Path) -> bool:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0] in "TtZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def serve(pipe: Connection, environ: dict[str, str], directory: str) -> None:
    """What a node does: run functions, until the pipe is closed."""
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(directory)
    # it is ignored where the tests were started in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
    here = Here()
    _collect_log(here)
    while True:
        try:
            function, args, options = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer: Any = (True, function(here, *args, **options))
        except Exception as error:
            status = getattr(error, "status_code", None)
            answer = (False, (type(error).__name__, status.name if status else None, str(error)))
        pipe.send(answer)


def _collect_log(here: Here) -> None:
    import logging

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            engine = f"{getattr(record, 'datadist_engine', '')} "
            here.log.append(f"{record.levelname} {record.getMessage().removeprefix(engine)}")

    logger = logging.getLogger("datadist")
    logger.addHandler(Collector())
    logger.setLevel(logging.DEBUG)


# -- functions that run in nodes ---------------------------------------------------------------


def table_for(mapping: Mapping[int, int]) -> str:
    """A rank table of one server with one device per rank."""
    devices = [{"device_id": str(r), "rank_id": str(r)} for r in mapping.values()]
    server = {"server_id": "host", "device": devices}
    return json.dumps(
        {"version": "1.0", "status": "completed", "server_count": "1", "server_list": [server]}
    )


def init(here: Here, cluster: int, pool: int = 8 * MIB, **settings: Any) -> None:
    """Initialise an engine on shm; ``settings`` are properties of the configuration."""
    config = LLMConfig()
    config.enable_cache_manager = True
    config.transfer_backend = "shm"
    config.link_total_time = 30
    config.sync_kv_timeout = 5000
    if pool:
        config.mem_pool_cfg = json.dumps({"memory_size": pool, "page_shift": 12})
    for name, value in settings.items():
        setattr(config, name, value)
    here.engine = LLMDataDist(LLMRole.MIX, cluster)
    here.any["options"] = config.generate_options()
    here.engine.init(here.any["options"])


def link(here: Here, name: str, mapping: dict[int, int], table: str | None = None) -> int:
    """Call link with a table made for the mapping."""
    return here.live.link(name, mapping, table_for(mapping) if table is None else table)


def wait(here: Here, comm_id: int, timeout: int | None = None) -> None:
    """Wait until a link is OK."""
    here.live.wait_link(comm_id, timeout)


def link_and_wait(here: Here, name: str, mapping: dict[int, int]) -> int:
    """Link and wait until it is OK."""
    comm_id = link(here, name, mapping)
    here.live.wait_link(comm_id)
    return comm_id


def link_pair(first: Node, second: Node, name: str = "pair") -> tuple[int, int]:
    """Link the nodes of clusters 1 and 2, from here; the id of the link at each."""
    first.begin(link_and_wait, name, {1: 0, 2: 1})
    theirs = second.do(link_and_wait, name, {1: 0, 2: 1})
    return first.result(), theirs


def unlink(here: Here, comm_id: int) -> None:
    """Unlink."""
    here.live.unlink(comm_id)


def status(here: Here, comm_id: int) -> RegisterMemStatus:
    """Status of a link."""
    return here.live.query_register_mem_status(comm_id)


def link_error(here: Here, comm_id: int) -> str | None:
    """Why a link failed or broke."""
    return here.live.link_error(comm_id)


def finalize(here: Here) -> None:
    """Finalize the engine."""
    here.live.finalize()


def log_of(here: Here, level: str = "") -> list[str]:
    """What was logged, lines that begin with ``level``, without the engine, which is this one."""
    return [line for line in here.log if line.startswith(level)]


def warnings_of(here: Here) -> list[str]:
    """Without that of a link whose members are waited for, as those of a slow machine are."""
    return [line for line in log_of(here, "WARNING") if "is not complete after" not in line]


def said(node: Node, level: str, *words: str) -> str:
    """The first line of that level that has all these words; another process may say it later."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        for line in node.do(log_of, level):
            if all(word in line for word in words):
                return str(line)
        time.sleep(0.02)
    raise AssertionError(f"no {level} with {words}: {node.do(log_of)}")


def make(
    here: Here,
    label: str,
    kind: str,
    shape: list[int],
    tensors: int = 4,
    keys: Any = None,
    memory: str = "pool",
    placement: Placement = Placement.DEVICE,
    **options: Any,
) -> int:
    """A cache of int32 named ``label``: kind "cache" or "blocks", memory "pool" or "numpy"."""
    manager = here.live.cache_manager
    desc = CacheDesc(tensors, shape, DataType.DT_INT32, placement)
    extra = () if keys is None else (keys,)
    if memory == "pool":
        allocate = manager.allocate_cache if kind == "cache" else manager.allocate_blocks_cache
        cache = allocate(desc, *extra)
        here.arrays[label] = cache.numpy()
    else:
        around = [np.full(int(np.prod(shape)) + 2 * MARGIN, EDGE, np.int32) for _ in range(tensors)]
        here.any.setdefault("edges", []).extend(around)
        arrays = [each[MARGIN:-MARGIN].reshape(shape) for each in around]
        for array in arrays:
            array[:] = 0
        register = manager.register_cache if kind == "cache" else manager.register_blocks_cache
        cache = register(desc, [int(a.ctypes.data) for a in arrays], *extra, **options)
        here.arrays[label] = arrays
    here.caches[label] = cache
    return cache.cache_id


def has(here: Here, label: str) -> bool:
    """Whether there is a cache of that name."""
    return label in here.arrays


def clear(here: Here, label: str) -> None:
    """Fill a cache with zeros."""
    for array in here.arrays[label]:
        array[:] = 0


def fill(here: Here, label: str, seed: int) -> None:
    """Fill a cache with numbers that :func:`pattern` foretells."""
    for index, array in enumerate(here.arrays[label]):
        array[:] = pattern(seed, index, array.shape)


def pattern(seed: int, tensor: int, shape: tuple[int, ...]) -> NDArray[np.int32]:
    """Distinct numbers for every element of every tensor."""
    count = int(np.prod(shape))
    start = (seed * 64 + tensor) * 1_000_003 % (1 << 30)
    return (np.arange(start, start + count) & 0x7FFFFFFF).astype(np.int32).reshape(shape)


def read(here: Here, label: str) -> list[NDArray[np.int32]]:
    """A copy of a cache's tensors; checks the numbers before and behind registered arrays, too."""
    for each in here.any.get("edges", ()):
        assert (each[:MARGIN] == EDGE).all(), "written before a tensor"
        assert (each[-MARGIN:] == EDGE).all(), "written behind a tensor"
    return [array.copy() for array in here.arrays[label]]


def pull_cache(here: Here, key: Any, label: str, *args: Any, **kwargs: Any) -> None:
    """Pull into a contiguous cache."""
    here.live.cache_manager.pull_cache(key, here.caches[label], *args, **kwargs)


def pull_blocks(here: Here, key: Any, label: str, *args: Any, **kwargs: Any) -> None:
    """Pull into a blocks cache."""
    here.live.cache_manager.pull_blocks(key, here.caches[label], *args, **kwargs)


def push_cache(here: Here, key: Any, label: str, *args: Any, **kwargs: Any) -> None:
    """Push a contiguous cache."""
    here.live.cache_manager.push_cache(key, here.caches[label], *args, **kwargs)


def push_blocks(here: Here, key: Any, label: str, *args: Any, **kwargs: Any) -> None:
    """Push a blocks cache."""
    here.live.cache_manager.push_blocks(key, here.caches[label], *args, **kwargs)


def cluster_info(
    cluster: int, *ports: int, address: str = "127.0.0.1", local: bool = True
) -> LLMClusterInfo:
    """A cluster to link with, listening at each port."""
    info = LLMClusterInfo()
    info.remote_cluster_id = cluster
    if local:
        info.append_local_ip_info("127.0.0.1", 0)
    for port in ports:
        info.append_remote_ip_info(address, port)
    return info


def link_clusters(
    here: Here,
    clusters: Sequence[tuple[int, int]],
    timeout: int = 30_000,
    address: str = "127.0.0.1",
) -> tuple[str, list[str]]:
    """Link with (cluster, port) pairs; the names of the results."""
    infos = [cluster_info(cluster, port, address=address) for cluster, port in clusters]
    result, results = here.live.link_clusters(infos, timeout)
    return result.name, [code.name for code in results]


def unlink_clusters(
    here: Here, clusters: Sequence[tuple[int, ...]], timeout: int = 30_000, force: bool = False
) -> tuple[str, list[str]]:
    """Unlink (cluster, port...) tuples; the names of the results."""
    infos = [cluster_info(cluster, *ports) for cluster, *ports in clusters]
    result, results = here.live.unlink_clusters(infos, timeout, force)
    return result.name, [code.name for code in results]


def switch_role(here: Here, role: LLMRole, port: int | None = None) -> None:
    """Switch the role, listening on a port."""
    options = LLMConfig()
    if port is not None:
        options.listen_ip_info = f"127.0.0.1:{port}"
    here.live.switch_role(role, options.generate_options() if port is not None else None)


def unregister(here: Here, label: str) -> None:
    """Forget a cache; the handle and the arrays stay."""
    here.live.cache_manager.unregister_cache(here.caches[label].cache_id)


def deallocate(here: Here, label: str) -> None:
    """Free a cache of the pool."""
    manager, cache = here.live.cache_manager, here.caches.pop(label)
    here.arrays.pop(label)
    (manager.deallocate_blocks_cache if cache.is_blocks_cache else manager.deallocate_cache)(cache)
