"""A pull during which its owner may have reused the memory does not succeed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from datadist import CacheDesc, DataType
from tests import nodes
from tests.faults import stage
from tests.nodes import MIB, Node

Start = Callable[..., Node]
REUSED = 0x6B6B6B6B


def _reading(start: Start, memory: str) -> tuple[Node, Node, int, int]:
    """An owner and a puller of its cache, in the middle; with the comm ids of both."""
    owner, puller = start(1, pool=16 * MIB), start(2, pool=16 * MIB, sync_kv_timeout=20_000)
    owner.do(nodes.make, "c", "cache", stage.SHAPE, stage.TENSORS, None, memory)
    owner.do(nodes.fill, "c", 1)
    puller.do(stage.prepare, 2)
    ours, theirs = nodes.link_pair(owner, puller)
    puller.do(stage.slow_down)
    puller.do(stage.begin, "mid-pull")
    return owner, puller, ours, theirs


def _reuse(here: nodes.Here) -> None:
    for array in here.arrays["c"]:
        array[:] = REUSED


def _reused_bytes(here: nodes.Here) -> int:
    return sum(int(np.count_nonzero(array == REUSED)) for array in here.arrays["c"])


def _begin_unlink(here: nodes.Here, comm_id: int) -> None:
    here.any["unlinking"] = threading.Thread(target=here.live.unlink, args=(comm_id,))
    here.any["unlinking"].start()
    engine = here.live._engine
    assert engine is not None
    while engine._links.domains:
        here.any["unlinking"].join(0.001)


def _end_unlink(here: nodes.Here) -> None:
    here.any["unlinking"].join(20)
    assert not here.any["unlinking"].is_alive()


def test_a_cache_unregistered_while_its_puller_is_stopped(start_node: Start) -> None:
    owner, puller, *_ = _reading(start_node, "numpy")
    puller.do(stage.half_open)  # what the owner says is not heard during the pull
    puller.pause()
    owner.do(nodes.unregister, "c")
    owner.do(_reuse)
    puller.resume()
    status, _, text = puller.do(stage.outcome)
    assert puller.do(_reused_bytes) > 0
    assert status == "LLM_KV_CACHE_NOT_EXIST"
    assert "unregistered there meanwhile" in text


def test_a_pool_cache_freed_during_a_pull_is_kept_until_it_ends(start_node: Start) -> None:
    owner, puller, *_ = _reading(start_node, "pool")
    puller.do(stage.half_open)
    owner.do(nodes.deallocate, "c")
    assert puller.do(stage.outcome)[0] == "OK"


def test_an_owner_whose_connection_is_cut(start_node: Start) -> None:
    owner, puller, *_ = _reading(start_node, "pool")
    puller.do(stage.half_open)
    owner.do(stage.give_up)
    owner.do(_reuse)
    status, _, text = puller.do(stage.outcome)
    assert puller.do(_reused_bytes) > 0
    assert status == "LLM_FAILED"
    assert "unlink and link again" in text


def test_both_unlink_during_a_pull(start_node: Start) -> None:
    owner, puller, ours, theirs = _reading(start_node, "numpy")
    puller.do(_begin_unlink, theirs)
    owner.do(nodes.unlink, ours)
    owner.do(nodes.unregister, "c")
    owner.do(_reuse)
    status, _, text = puller.do(stage.outcome)
    puller.do(_end_unlink)
    assert status == "LLM_KV_CACHE_NOT_EXIST"
    assert "unregistered there meanwhile" in text


def _say_much(here: nodes.Here) -> None:
    """More than a socket holds, and then be too busy to send the rest."""
    manager = here.live.cache_manager
    for _ in range(400):
        manager.deallocate_cache(manager.allocate_cache(CacheDesc(1, [1, 1], DataType.DT_INT8)))
    nodes.unregister(here, "c")
    engine = here.live._engine
    assert engine is not None
    engine._reactor.post(lambda: time.sleep(1))


def test_what_the_owner_said_last_waits_behind_a_full_socket(start_node: Start) -> None:
    owner, puller, *_ = _reading(start_node, "numpy")
    puller.pause()
    owner.do(_say_much)
    owner.do(_reuse)
    puller.resume()
    status, _, text = puller.do(stage.outcome)
    assert puller.do(_reused_bytes) > 0
    assert status == "LLM_KV_CACHE_NOT_EXIST", text


def _begin_unlink_clusters(here: nodes.Here, port: int) -> None:
    def unlink() -> None:
        here.any["codes"] = nodes.unlink_clusters(here, [(1, port)], 10_000)

    here.any["unlinking"] = threading.Thread(target=unlink)
    here.any["unlinking"].start()
    engine = here.live._engine
    assert engine is not None
    while engine._clusters.pairs:
        here.any["unlinking"].join(0.001)


def test_unlink_clusters_lets_a_pull_of_ours_end(
    start_node: Start, free_ports: Callable[[int], list[int]]
) -> None:
    settings = {"pool": 16 * MIB, "sync_kv_timeout": 20_000, "local_comm_res": ""}
    (port,) = free_ports(1)
    owner = start_node(1, listen_ip_info=f"127.0.0.1:{port}", **settings)
    puller = start_node(2, **settings)
    for node, seed in ((owner, 1), (puller, 2)):
        node.do(stage.prepare, seed)
    puller.do(nodes.link_clusters, [(1, port)])
    puller.do(stage.slow_down)
    puller.do(stage.begin, "mid-pull")
    puller.do(_begin_unlink_clusters, port)
    status, _, text = puller.do(stage.outcome)
    puller.do(_end_unlink)
    assert status == "OK", text
