"""What the processes of a soak do; all that is moved is compared, byte by byte, with what is around."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from datadist import BlocksCacheKey, CacheDesc, CacheKey, CacheKeyByIdAndIndex, DataType, Placement
from tests import nodes
from tests.nodes import MIB, pattern
from tests.soak.comparing import Difference

SLOTS, WIDTH, TENSORS = 4, 16 << 10, 4
BLOCKS, BLOCK_WIDTH = 32, 1024
GUARD = 61
OWN, BLOCKS_OWN, INTO, BLOCKS_INTO, INBOX = 1, 2, 3, 4, 5
"""Cache ids, in the order in which they are made."""


def start(here: nodes.Here, cluster: int, one_sided: bool, seed: int) -> None:
    """An engine with caches to pull from, to pull into, and to be pushed into."""
    nodes.init(
        here, cluster, 32 * MIB, enable_remote_cache_accessible=one_sided, sync_kv_timeout=20_000,
        link_total_time=60,
    )  # fmt: skip
    nodes.make(here, "own", "cache", [SLOTS, WIDTH], TENSORS)
    nodes.make(here, "blocks", "blocks", [BLOCKS, BLOCK_WIDTH], TENSORS, BlocksCacheKey(cluster, 7))
    nodes.make(here, "into", "cache", [SLOTS, WIDTH], TENSORS)
    nodes.make(here, "blocks into", "blocks", [BLOCKS, BLOCK_WIDTH], TENSORS)
    nodes.make(here, "inbox", "cache", [8, WIDTH], TENSORS)
    for label in ("own", "blocks"):
        nodes.fill(here, label, seed)
    for label in ("into", "blocks into", "inbox"):
        nodes.fill(here, label, GUARD)


def difference(
    here: nodes.Here, label: str, seed: int, rows: dict[int, int], whole: bool = True
) -> Difference:
    """Compare: ``rows`` hold the peer's, all others the guard. Everything holds that afterwards.

    Not ``whole``: the transfer had to stop. Each element of those rows may be the guard's as well,
    and nothing counts as moved.
    """
    moved = compared = wrong = 0
    for index, array in enumerate(here.arrays[label]):
        expected = pattern(GUARD, index, array.shape)
        before = expected.copy()
        shape = (SLOTS if label != "blocks into" else BLOCKS, array.shape[1])
        theirs = pattern(seed, index, shape)
        for mine, row in rows.items():
            expected[mine] = theirs[row]
            moved += array[mine].nbytes if whole else 0
        if not whole:
            expected = np.where(array == expected, expected, before)
        compared += array.nbytes
        wrong += int(np.count_nonzero(array.view(np.uint8) != expected.view(np.uint8)))
    nodes.fill(here, label, GUARD)
    return Difference(moved, compared - moved, wrong)


def key_of(owner: int, slot: int) -> CacheKeyByIdAndIndex:
    """A slot of the cache that a cluster has to pull from."""
    return CacheKeyByIdAndIndex(owner, OWN, slot)


def pull(here: nodes.Here, owner: int, seed: int, slot: int) -> tuple[float, Difference]:
    """Pull a slot; seconds, and what differs."""
    started = time.perf_counter()
    nodes.pull_cache(here, key_of(owner, slot), "into", 1)
    seconds = time.perf_counter() - started
    return seconds, difference(here, "into", seed, {1: slot})


def pull_blocks(
    here: nodes.Here, owner: int, seed: int, source: list[int], target: list[int]
) -> tuple[float, Difference]:
    """Pull blocks by key; as :func:`pull`."""
    started = time.perf_counter()
    nodes.pull_blocks(here, BlocksCacheKey(owner, 7), "blocks into", source, target)
    seconds = time.perf_counter() - started
    rows = dict(zip(target, source, strict=True))
    return seconds, difference(here, "blocks into", seed, rows)


def push(here: nodes.Here, target: int, slot: int) -> float:
    """Push slot 2 of our cache into a slot of the target's; seconds."""
    started = time.perf_counter()
    key = CacheKeyByIdAndIndex(target, INBOX, slot)
    nodes.push_cache(here, key, "own", 2, range(2), range(2))
    return time.perf_counter() - started


def check_inbox(here: nodes.Here, seed: int, slot: int) -> Difference:
    """What came by :func:`push`."""
    return difference(here, "inbox", seed, {slot: 2})


def hand_over(here: nodes.Here, cluster: int, request: int, seed: int) -> None:
    """A cache that only its request key keeps."""
    desc = CacheDesc(TENSORS, [1, WIDTH], DataType.DT_INT32, Placement.DEVICE)
    cache = here.live.cache_manager.allocate_cache(desc, [CacheKey(cluster, request)])
    for index, array in enumerate(cache.numpy()):
        array[0] = pattern(seed, index, (SLOTS, WIDTH))[0]
    here.live.cache_manager.deallocate_cache(cache)


def take_over(here: nodes.Here, owner: int, request: int, seed: int) -> tuple[float, Difference]:
    """Pull what was handed over, which frees it; as :func:`pull`."""
    started = time.perf_counter()
    nodes.pull_cache(here, CacheKey(owner, request), "into", 1, WIDTH * 4)
    seconds = time.perf_counter() - started
    return seconds, difference(here, "into", seed, {1: 0})


def torn(here: nodes.Here, owner: int, seed: int, slot: int) -> tuple[str, Difference]:
    """A pull whose owner is harmed meanwhile: its status, and what differs."""
    try:
        _, found = pull(here, owner, seed, slot)
    except Exception as error:
        code = getattr(error, "status_code", None)
        found = difference(here, "into", seed, {1: slot}, whole=False)
        return (code.name if code is not None else repr(error)), found
    return "OK", found


def check_own(here: nodes.Here, seed: int) -> Difference:
    """Whether what others pull and we push is as it was; nothing of it counts as moved."""
    arrays = here.arrays["own"]
    same = [a == pattern(seed, index, a.shape) for index, a in enumerate(arrays)]
    wrong = 4 * sum(int((~each).sum()) for each in same)
    return Difference(0, sum(a.nbytes for a in arrays), wrong)


def torn_push(here: nodes.Here, target: int, slot: int, seed: int) -> tuple[str, Difference]:
    """A push whose target is killed meanwhile: its status, and the source, which is left to look at."""
    status = "OK"
    try:
        push(here, target, slot)
    except Exception as error:
        code = getattr(error, "status_code", None)
        status = code.name if code is not None else repr(error)
    return status, check_own(here, seed)


def cut(here: nodes.Here, cluster: int) -> None:
    """Cut the control connection to a cluster."""
    engine = here.live._engine
    assert engine is not None
    for view in list(engine.views.values()):
        if view.session.cluster_id == cluster:
            view.session._sock.shutdown(socket.SHUT_RDWR)


def link(here: nodes.Here, name: str, mapping: dict[int, int]) -> float:
    """Link and wait; seconds."""
    started = time.perf_counter()
    here.any[name] = nodes.link_and_wait(here, name, mapping)
    return time.perf_counter() - started


def unlink(here: nodes.Here, name: str) -> float:
    """Unlink; seconds."""
    started = time.perf_counter()
    here.live.unlink(here.any.pop(name))
    return time.perf_counter() - started


def lost(here: nodes.Here, name: str) -> float:
    """Wait until a link is known to be broken; seconds."""
    started = time.perf_counter()
    while here.live.link_error(here.any[name]) is None:
        if time.perf_counter() - started > nodes.SECONDS / 2:
            raise TimeoutError(f"{name}: the loss of a member was not noticed")
        time.sleep(0.001)
    return time.perf_counter() - started


def pages_used(here: nodes.Here) -> int:
    """Pages in use once everything that is coming back has come."""
    deadline = time.monotonic() + nodes.SECONDS / 2
    while True:
        pool: dict[str, int] = here.live.stats()["pools"]["DEVICE"]
        if not pool["allocations_returning"] or time.monotonic() > deadline:
            return pool["pages_used"]
        time.sleep(0.01)


def end(here: nodes.Here) -> dict[str, Any]:
    """Finalize; what is left afterwards, and lines of the log that speak of defects."""
    here.arrays.clear()
    here.caches.clear()
    here.live.finalize()
    deadline = time.monotonic() + nodes.SECONDS / 2
    while any((found := _left()).values()) and time.monotonic() < deadline:
        time.sleep(0.01)  # a thread that looks at pages unmaps what it has looked at last
    defects = [line for line in here.log if "report it" in line or "defect" in line]
    return {**found, "defects": defects}


def _left() -> dict[str, Any]:
    """What this process holds of engines."""
    gc.collect()
    left = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            left.append(os.readlink(f"/proc/self/fd/{name}"))
    maps = Path("/proc/self/maps").read_text()
    return {
        "threads": [t.name for t in threading.enumerate() if t.name.startswith("datadist")],
        "descriptors": [d for d in left if "memfd" in d or "pidfd" in d or "eventfd" in d],
        "sockets": sum(d.startswith("socket:") for d in left) - 1,  # the pipe to the soak
        "mappings": maps.count("memfd:datadist"),
    }
