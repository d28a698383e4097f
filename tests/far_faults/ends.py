"""What the processes of a round do: engines that move caches, and the memory that they use again."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datadist import CacheDesc, CacheKeyByIdAndIndex, DataType, LLMException, Placement
from tests import nodes
from tests.far_faults.cases import Move
from tests.far_faults.settings import (
    CALL_SECONDS,
    LINK_SECONDS,
    SIZE,
    SYNC_SECONDS,
    TENSOR,
    TENSORS,
    Memory,
    Setting,
)
from tests.nodes import MIB, Here

BEFORE, SOURCE, FRESH = 0x11111111, 0x5A5A5A5A, 0x22222222
"""What a destination holds, what is moved, and what memory that is used again is filled with: that
number and the cluster's id, since a late write may bring what the other end has filled in meanwhile."""
MOVED, SMALL = "moved", "small"
PLACEMENT = Placement.HOST
PORT = 26000
END_SECONDS = 20.0
"""Threads may take so long to end after finalize."""
BLOCK = 8 * MIB
SAMPLES = 64
"""Elements of each tensor that are looked at, to see how far a transfer is."""
SMALL_SHAPE = [2, 256 << 10]


@dataclass(frozen=True)
class Use:
    """What a process has open."""

    threads: int
    descriptors: list[str]


def prepare(_here: Here, evidence: str) -> None:
    """Write what the process says itself, and its stacks at SIGUSR2, to files that begin so."""
    said = os.open(f"{evidence}.said", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    os.close(said)
    stacks = open(f"{evidence}.stacks", "w")  # noqa: SIM115 - open as long as the process
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR2, stacks, all_threads=True)


def start(here: Here, cluster: int, address: str, setting: Setting, move: Move) -> None:
    """An engine, in a process that has had one before: what libraries keep for good is no leak."""
    for module in ("datadist.transport", "datadist.links.in_flight"):
        vars(importlib.import_module(module))["FORCE_SECONDS"] = setting.force_seconds
    if setting.defect is not None:
        from tests.far_faults import defects

        defects.install(setting.backend, setting.defect)
    here.any["value"] = FRESH + cluster
    _init(here, cluster, address, setting, move)
    nodes.finalize(here)
    here.any["use"] = use(here)
    _init(here, cluster, address, setting, move)
    here.any["blocks"] = _take_pool(here, {})
    _drop_pool(here)


def _init(here: Here, cluster: int, address: str, setting: Setting, move: Move) -> None:
    """Peers may write its memory only where something is pushed: else it is used again sooner."""
    nodes.init(
        here, cluster, 0, transfer_backend=setting.backend, link_total_time=LINK_SECONDS,
        sync_kv_timeout=int(SYNC_SECONDS * 1000), enable_remote_cache_accessible=move == "push",
        listen_ip_info=f"{address}:{PORT}", host_mem_pool_cfg=json.dumps({"memory_size": SIZE}),
    )  # fmt: skip


def use(_here: Here) -> Use:
    """Threads, and what the descriptors are of."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(entry).partition(":")[0])
        except OSError:  # of the listing itself
            continue
    return Use(len(os.listdir("/proc/self/task")), sorted(found))


def make(here: Here, memory: Memory, content: int) -> int:
    """The cache that moves, and a small one; the id of the first."""
    where = "pool" if memory == "pool" else "numpy"
    open_to_peers: dict[str, Any] = {} if memory == "pool" else {"remote_accessible": True}
    shape = [1, TENSOR // 4]
    cache_id = nodes.make(
        here, MOVED, "cache", shape, TENSORS, None, where, PLACEMENT, **open_to_peers
    )
    for array in here.arrays[MOVED]:
        array[:] = content
    nodes.make(
        here, SMALL, "cache", SMALL_SHAPE, 1, None, "numpy", PLACEMENT, remote_accessible=True
    )
    return cache_id


def link(here: Here, name: str, mapping: dict[int, int], table: str) -> int:
    """Link, and wait until the link is OK."""
    comm_id = here.live.link(name, mapping, table)
    here.live.wait_link(comm_id)
    return comm_id


# -- the transfer that the fault hits ------------------------------------------------------------


def begin(here: Here, move: Move, cluster: int, cache_id: int, limited: bool) -> float:
    """Start the transfer in a thread; when it was called (CLOCK_MONOTONIC, which processes share)."""
    key = CacheKeyByIdAndIndex(cluster, cache_id, 0)
    limit = {"timeout_in_millis": int(CALL_SECONDS * 1000)} if limited else {}
    function = nodes.pull_cache if move == "pull" else nodes.push_cache

    def run() -> None:
        try:
            function(here, key, MOVED, 0, **limit)
            here.any["outcome"] = ("OK", time.monotonic(), "")
        except Exception as error:
            here.any["outcome"] = (status_of(error), time.monotonic(), str(error))

    here.any["thread"] = thread = threading.Thread(target=run)
    called = time.monotonic()
    thread.start()
    return called


def await_landing(here: Here) -> bool:
    """Wait for the first bytes of the transfer; whether others have still to come."""
    deadline = time.monotonic() + SYNC_SECONDS
    while not (landed := _landed(here)):
        if time.monotonic() > deadline:
            raise TimeoutError("no byte of the transfer came")
        time.sleep(0.001)
    return landed < TENSORS * SAMPLES


def _landed(here: Here) -> int:
    places = np.linspace(0, TENSOR // 4 - 1, SAMPLES, dtype=np.int64)
    tensors = (array.reshape(-1)[places] for array in here.arrays[MOVED])
    return sum(int((tensor == SOURCE).sum()) for tensor in tensors)


def is_whole(here: Here) -> bool:
    """Whether every byte of the transfer has arrived."""
    return all(bool((array == SOURCE).all()) for array in here.arrays[MOVED])


def outcome(here: Here, seconds: float) -> tuple[str, float, str]:
    """Status, time and text of what :func:`begin` began."""
    here.any["thread"].join(seconds)
    if here.any["thread"].is_alive():
        raise TimeoutError(f"the call has not ended after {seconds:g} s")
    result: tuple[str, float, str] = here.any["outcome"]
    return result


def status_of(error: BaseException) -> str:
    """The status code's name; of what has none, the type's."""
    code = getattr(error, "status_code", None)
    return str(code.name) if code is not None else type(error).__name__


def await_loss(here: Here, comm_id: int, cluster: int, seconds: float) -> tuple[str, float, str]:
    """Wait until the link says that it is broken; the status of a pull over it, when, and the text."""
    deadline = time.monotonic() + seconds
    while (reason := here.live.link_error(comm_id)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the link has no error after {seconds:g} s")
        time.sleep(0.001)
    seen = time.monotonic()
    try:
        nodes.pull_cache(here, CacheKeyByIdAndIndex(cluster, 1, 0), SMALL, 0)
    except Exception as error:
        return status_of(error), seen, reason
    return "OK", seen, reason


# -- memory that is used again -------------------------------------------------------------------


def begin_reuse(here: Here, memory: Memory, seconds: float) -> None:
    """Give the memory of the transfer back, and use it and the whole pool again, in a thread."""
    deadline = time.monotonic() + seconds

    def run() -> None:
        try:
            _reuse(here, memory, deadline)
            here.any["reused"] = (time.monotonic(), "")
        except Exception as error:
            here.any["reused"] = (time.monotonic(), f"{status_of(error)}: {error}")

    here.any["fresh"] = {}
    here.any["reuse"] = thread = threading.Thread(target=run)
    thread.start()


def _reuse(here: Here, memory: Memory, deadline: float) -> None:
    fresh = here.any["fresh"]
    if memory == "pool":
        nodes.deallocate(here, MOVED)
    else:
        _unregister(here, deadline)
        for index, array in enumerate(here.arrays[MOVED]):
            array[:] = here.any["value"]
            fresh[index] = array
    while len(here.any.get("taken", ())) < here.any["blocks"]:
        refused = _take_pool(here, fresh)
        missing = here.any["blocks"] - refused
        if missing and time.monotonic() > deadline:
            raise TimeoutError(f"{missing} of {here.any['blocks']} blocks of the pool are not back")


def _unregister(here: Here, deadline: float) -> None:
    while True:
        try:
            nodes.unregister(here, MOVED)
        except LLMException:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def _take_pool(here: Here, fresh: dict[Any, Any]) -> int:
    """Allocate and fill until nothing is left; the number of all blocks that are taken."""
    desc = CacheDesc(1, [1, BLOCK // 4], DataType.DT_INT32, PLACEMENT)
    taken = here.any.setdefault("taken", [])
    while True:
        try:
            cache = here.live.cache_manager.allocate_cache(desc)
        except LLMException as error:
            if error.status_code.name != "LLM_OUT_OF_MEMORY":
                raise
            return len(taken)
        (fresh[cache.cache_id],) = cache.numpy()
        fresh[cache.cache_id][:] = here.any["value"]
        taken.append(cache)


def _drop_pool(here: Here) -> None:
    for cache in here.any.pop("taken"):
        here.live.cache_manager.deallocate_cache(cache)


def reused(here: Here, seconds: float) -> tuple[float, str]:
    """When all memory was in use again; the text says why not."""
    here.any["reuse"].join(seconds)
    if here.any["reuse"].is_alive():
        raise TimeoutError(f"giving memory back, or allocating it, hangs for {seconds:g} s")
    result: tuple[float, str] = here.any["reused"]
    return result


def changed(here: Here) -> list[str]:
    """Where memory that is used again is not as it was filled, or something beside it was written."""
    found = []
    for name, array in here.any["fresh"].items():
        flat = array.reshape(-1)
        wrong = np.flatnonzero(flat != here.any["value"])
        if wrong.size:
            first = int(wrong[0])
            found.append(f"{wrong.size} elements of {name}, first [{first}] = {flat[first]:#x}")
    for edge in here.any.get("edges", ()):
        if not (np.r_[edge[: nodes.MARGIN], edge[-nodes.MARGIN :]] == nodes.EDGE).all():
            found.append("a margin of registered memory")
    return found


# -- what works afterwards -----------------------------------------------------------------------


def fill_small(here: Here, seed: int) -> int:
    """Fill the small cache by a seed; its id."""
    nodes.fill(here, SMALL, seed)
    return here.caches[SMALL].cache_id


def pull_small(here: Here, cluster: int, cache_id: int, seed: int) -> None:
    """Pull a slot of the peer's small cache, which was filled by that seed, and verify it."""
    key = CacheKeyByIdAndIndex(cluster, cache_id, 0)
    nodes.pull_cache(here, key, SMALL, 1)
    theirs = nodes.pattern(seed, 0, tuple(SMALL_SHAPE))
    if not (here.arrays[SMALL][0][1] == theirs[0]).all():
        raise AssertionError(f"what was pulled from cluster {cluster} is wrong")


def push_small(here: Here, cluster: int, cache_id: int) -> None:
    """Push a slot of the small cache into the other one of the peer's."""
    there = CacheKeyByIdAndIndex(cluster, cache_id, 1)
    nodes.push_cache(here, there, SMALL, 0, tensor_num_per_layer=1)


def check_pushed(here: Here, seed: int) -> None:
    """Verify what :func:`push_small` pushed here, of a cache that was filled by that seed."""
    if not (here.arrays[SMALL][0][1] == nodes.pattern(seed, 0, tuple(SMALL_SHAPE))[0]).all():
        raise AssertionError("what was pushed is wrong")


def end(here: Here) -> list[str]:
    """Finalize; what the engine has left open, beside what was open before it was made."""
    nodes.finalize(here)
    before: Use = here.any["use"]
    deadline = time.monotonic() + END_SECONDS
    while True:
        gc.collect()
        left = _left(before, use(here))
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def _left(before: Use, now: Use) -> list[str]:
    found = []
    if now.threads > before.threads:
        found.append(f"{now.threads - before.threads} threads are left")
    if len(now.descriptors) > len(before.descriptors):
        left = list(now.descriptors)
        for name in before.descriptors:
            if name in left:
                left.remove(name)
        found.append(f"descriptors are left: {', '.join(left)}")
    return found
