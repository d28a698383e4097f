"""Nothing grows with use: Python memory, the C heap, descriptors, mappings and threads."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LLMStatusCode,
)
from tests import descriptors, nodes, tasks
from tests.nodes import Node

Start = Callable[..., Node]
PAIR = {1: 0, 2: 1}
ROUNDS = 60
LOOKS = 10
COUNTED = ("descriptors", "mappings", "threads")


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def _heap() -> int:
    """Bytes that the C library's heap has given out."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    return int(found.uordblks + found.hblkhd)


def _usage(here: nodes.Here, before: dict[str, int] | None = None) -> dict[str, int]:
    """The least of several looks: what a thread or a timer holds for a moment only is no growth.

    What is counted gets the time to come down to what it was ``before``.
    """
    looks, deadline = list[dict[str, int]](), time.monotonic() + nodes.SECONDS
    while True:
        here.log.clear()
        gc.collect()
        looks.append(_look())
        least = {name: min(look[name] for look in looks) for name in looks[0]}
        fallen = before is None or all(least[name] <= before[name] for name in COUNTED)
        if len(looks) >= LOOKS and (fallen or time.monotonic() > deadline):
            return least
        time.sleep(0.1)


def _look() -> dict[str, int]:
    return {
        "python": tracemalloc.get_traced_memory()[0],
        "heap": _heap(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mappings": Path("/proc/self/maps").read_text().count("memfd:"),
        "threads": tasks.count(),
    }


def _growth(here: nodes.Here, rounds: Callable[[int], None]) -> dict[str, int]:
    """Growth by the later ones of many rounds; the first ones fill caches.

    Of memory the smaller growth of two: what leaks grows each time, what the allocator keeps does not.
    """
    rounds(ROUNDS // 2)
    tracemalloc.start()
    rounds(ROUNDS // 2)
    usage = [_usage(here)]
    for _ in range(2):
        rounds(ROUNDS)
        usage.append(_usage(here, usage[-1]))
    tracemalloc.stop()
    first, second = ({n: b[n] - a[n] for n in b} for a, b in itertools.pairwise(usage))
    return {
        name: (min if name in ("python", "heap") else max)(first[name], second[name])
        for name in first
    }


def _check(growth: dict[str, int], per_round: int) -> None:
    """A leak of one object per round is more than ``per_round`` bytes each."""
    assert all(growth[name] <= 0 for name in COUNTED), growth
    assert growth["python"] < per_round * ROUNDS, growth
    assert growth["heap"] < (per_round + 1024) * ROUNDS, growth


def _use_links(here: nodes.Here) -> dict[str, int]:
    def rounds(count: int) -> None:
        for _ in range(count):
            nodes.pull_cache(here, CacheKeyByIdAndIndex(1, 1, 0), "c")
            here.live.unlink(nodes.link_and_wait(here, "round", PAIR))

    return _growth(here, rounds)


def _answer_links(here: nodes.Here) -> dict[str, int]:
    def rounds(count: int) -> None:
        for _ in range(count):
            here.live.unlink(nodes.link_and_wait(here, "round", PAIR))

    return _growth(here, rounds)


@pytest.mark.parametrize("memory", ["pool", "numpy"])
def test_links_and_pulls(start_node: Start, memory: str) -> None:
    owner, puller = start_node(1), start_node(2)
    for node in (owner, puller):
        node.do(nodes.make, "c", "cache", [1, 64], 4, None, memory)
    owner.begin(_stay_linked)
    puller.do(_stay_linked)
    owner.result()
    owner.begin(_answer_links)
    _check(puller.do(_use_links, timeout=600), 300)
    _check(owner.result(600), 300)


def _descriptors_of_processes(_here: nodes.Here) -> int:
    """Of other processes: each tells of the death of one, and keeps its number from reuse."""
    return sum("pidfd" in target for target in descriptors.targets())


def test_after_unlink_no_descriptor_of_the_peers_process_stays(start_node: Start) -> None:
    owner, puller = start_node(1), start_node(2)
    owner.do(nodes.make, "b", "blocks", [4, 64], 4, BlocksCacheKey(1))
    puller.do(nodes.make, "b", "blocks", [4, 64], 4)
    before = puller.do(_descriptors_of_processes)
    _, comm_id = nodes.link_pair(owner, puller)
    for _ in range(2):  # the second one by what was remembered of the first
        puller.do(nodes.pull_blocks, BlocksCacheKey(1), "b", [1], [2])
    assert puller.do(_descriptors_of_processes) > before
    puller.do(nodes.unlink, comm_id)
    owner.do(nodes.finalize)
    deadline = time.monotonic() + nodes.SECONDS
    while puller.do(_descriptors_of_processes) > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _links_in_timers(here: nodes.Here, rounds: int) -> int:
    """Timers of domains that are unlinked, right after the last one."""
    for _ in range(rounds):
        here.live.unlink(nodes.link_and_wait(here, "round", PAIR))
    timers = here.live._live(LLMStatusCode.LLM_FAILED)._reactor._timers
    return sum("on_ok" in getattr(timer.call, "__qualname__", "") for _, _, timer in list(timers))


def test_a_link_that_ended_is_in_no_timer(start_node: Start) -> None:
    owner, puller = start_node(1), start_node(2)
    owner.begin(_links_in_timers, 10)
    assert puller.do(_links_in_timers, 10) == owner.result() == 0


def _stay_linked(here: nodes.Here) -> None:
    """A link of its own keeps the session, as in a serving process."""
    nodes.link_and_wait(here, "stays", PAIR)


def _hand_over(here: nodes.Here, cluster: int) -> dict[str, int]:
    desc = CacheDesc(4, [1, 64], DataType.DT_INT32)

    def rounds(count: int) -> None:
        for number in range(count):
            key = CacheKey(cluster, number)
            cache = here.live.cache_manager.allocate_cache(desc, [key])
            here.live.cache_manager.remove_cache_key(key)
            here.live.cache_manager.deallocate_cache(cache)
        here.live.cache_manager.allocate_cache(desc)

    return _growth(here, rounds)


def test_caches_and_keys_that_a_peer_hears_of(start_node: Start) -> None:
    owner, peer = start_node(1), start_node(2)
    owner.begin(_stay_linked)
    peer.do(_stay_linked)
    owner.result()
    growth = owner.do(_hand_over, 1, timeout=600)
    _check(growth, 400)


def _engines(here: nodes.Here) -> dict[str, int]:
    def rounds(count: int) -> None:
        for _ in range(count):
            nodes.init(here, 1, 1 << 20)
            cache: Any = here.live.cache_manager.allocate_cache(
                CacheDesc(4, [1, 64], DataType.DT_INT32)
            )
            del cache
            here.live.finalize()

    return _growth(here, rounds)


def test_engines_that_come_and_go(start_node: Start) -> None:
    _check(start_node().do(_engines, timeout=600), 300)
