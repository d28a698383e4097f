"""Calls of several threads at once: what goes on together, and what ends what."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from datadist import (
    BlocksCacheKey,
    CacheKeyByIdAndIndex,
    LayerSynchronizer,
    LLMException,
    TransferWithCacheKeyConfig,
)
from tests import nodes
from tests.nodes import Node, pattern

Start = Callable[..., Node]
MIB = 1 << 20
LARGE = [1, 8 * MIB]
"""32 MiB per tensor of int32."""


def _link_all(first: Node, others: dict[int, Node]) -> dict[int, int]:
    comm_ids = {}
    for cluster, node in others.items():
        mapping = {1: 0, cluster: 1}
        node.begin(nodes.link_and_wait, f"with {cluster}", mapping)
        comm_ids[cluster] = first.do(nodes.link_and_wait, f"with {cluster}", mapping)
        node.result()
    return comm_ids


def _pull_from_both(here: nodes.Here) -> tuple[int, list[str]]:
    """Small pulls from cluster 3 that end while one large pull from cluster 2 is under way."""
    inside, errors = 0, []
    began, ended = threading.Event(), threading.Event()

    def large() -> None:
        try:
            began.set()
            for _ in range(4):
                nodes.pull_cache(here, CacheKeyByIdAndIndex(2, 1), "large")
        except Exception as error:
            errors.append(repr(error))
        finally:
            ended.set()

    thread = threading.Thread(target=large)
    thread.start()
    began.wait(10)
    while not ended.is_set():
        nodes.pull_cache(here, CacheKeyByIdAndIndex(3, 1), "small")
        if not ended.is_set():
            inside += 1
    thread.join()
    return inside, errors


def test_pulls_from_two_peers_go_on_together(start_node: Start) -> None:
    puller = start_node(1, pool=192 * MIB, sync_kv_timeout=30_000)
    first, second = start_node(2, pool=160 * MIB), start_node(3)
    first.do(nodes.make, "large", "cache", LARGE, 4)
    second.do(nodes.make, "small", "cache", [1, 64], 4)
    puller.do(nodes.make, "large", "cache", LARGE, 4)
    puller.do(nodes.make, "small", "cache", [1, 64], 4)
    second.do(nodes.fill, "small", 5)
    _link_all(puller, {2: first, 3: second})
    inside, errors = puller.do(_pull_from_both)
    assert errors == []
    assert inside >= 3
    np.testing.assert_array_equal(puller.do(nodes.read, "small")[2], pattern(5, 2, (1, 64)))


def _pull_until_it_fails(here: nodes.Here) -> None:
    """Start pulling in a thread; `_outcome` tells how many pulls ended well, and what ended them."""
    here.any["pulls"], here.any["error"] = 0, None
    manager = here.live.cache_manager  # none can be had once the engine was finalized

    def pull() -> None:
        try:
            while True:
                manager.pull_cache(CacheKeyByIdAndIndex(2, 1), here.caches["large"])
                here.any["pulls"] += 1
        except LLMException as error:
            here.any["error"] = (error.status_code.name, str(error))
        except Exception as error:
            here.any["error"] = (type(error).__name__, str(error))

    here.any["thread"] = threading.Thread(target=pull)
    here.any["thread"].start()
    deadline = time.monotonic() + 20
    while not here.any["pulls"] and here.any["error"] is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def _outcome(here: nodes.Here) -> tuple[int, tuple[str, str]]:
    here.any["thread"].join(20)
    assert not here.any["thread"].is_alive()
    return here.any["pulls"], here.any["error"]


def _pulling_pair(start: Start) -> tuple[Node, Node, int]:
    puller, owner = start(1, pool=160 * MIB), start(2, pool=160 * MIB)
    for node in (puller, owner):
        node.do(nodes.make, "large", "cache", LARGE, 4)
    owner.do(nodes.fill, "large", 7)
    comm_id = _link_all(puller, {2: owner})[2]
    puller.do(_pull_until_it_fails)
    return puller, owner, comm_id


def test_unlink_lets_the_pull_in_progress_end(start_node: Start) -> None:
    puller, owner, comm_id = _pulling_pair(start_node)
    puller.do(nodes.unlink, comm_id)
    pulls, (status, text) = puller.do(_outcome)
    assert pulls >= 1
    assert status == "LLM_NOT_YET_LINK", text
    np.testing.assert_array_equal(puller.do(nodes.read, "large")[3], pattern(7, 3, (1, 8 * MIB)))
    _link_all(puller, {2: owner})


def test_the_owner_unlinks_during_a_pull(start_node: Start) -> None:
    puller, owner, _ = _pulling_pair(start_node)
    owner.do(nodes.unlink, 1)
    _pulls, (status, text) = puller.do(_outcome)
    assert status in ("LLM_NOT_YET_LINK", "LLM_FAILED"), text
    assert "unlink" in text


def test_finalize_during_a_pull(start_node: Start) -> None:
    puller, owner, _ = _pulling_pair(start_node)
    puller.do(nodes.finalize)
    _pulls, (status, text) = puller.do(_outcome)
    assert status in ("LLM_NOT_YET_LINK", "LLM_FAILED", "LLM_ENGINE_FINALIZED"), text
    puller.do(nodes.init, 1)
    _link_all(puller, {2: owner})


def test_the_owner_finalizes_during_a_pull(start_node: Start) -> None:
    puller, owner, _ = _pulling_pair(start_node)
    owner.do(nodes.finalize)
    _pulls, (status, text) = puller.do(_outcome)
    assert status in ("LLM_NOT_YET_LINK", "LLM_FAILED"), text


def test_the_owner_frees_a_cache_during_a_pull(start_node: Start) -> None:
    """Pulls end with an error, and what they wrote is from before: the memory was not reused."""
    puller, owner, _ = _pulling_pair(start_node)
    owner.do(nodes.deallocate, "large")
    owner.do(nodes.make, "reused", "cache", LARGE, 4)
    owner.do(nodes.fill, "reused", 9)
    _pulls, (status, text) = puller.do(_outcome)
    assert status == "LLM_KV_CACHE_NOT_EXIST", text
    for tensor, array in enumerate(puller.do(nodes.read, "large")):
        np.testing.assert_array_equal(array, pattern(7, tensor, (1, 8 * MIB)))


class Slow(LayerSynchronizer):
    """Lets layers pass one by one, each after a moment."""

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        time.sleep(0.2)
        return True


def _send_slowly(here: nodes.Here) -> None:
    config = TransferWithCacheKeyConfig(BlocksCacheKey(2, 0), range(20), range(20))
    here.any["task"] = here.live.cache_manager.transfer_cache_async(
        here.caches["c"], Slow(), [config]
    )


def _task_result(here: nodes.Here) -> str:
    code = here.any["task"].synchronize(20_000)
    return str(code.name)


@pytest.mark.parametrize("end", ["unlink", "finalize"])
def test_a_task_ends_with_its_link(start_node: Start, end: str) -> None:
    sender, target = start_node(1, local_comm_res=""), start_node(2, local_comm_res="")
    sender.do(nodes.make, "c", "blocks", [4, 8], 40)
    target.do(nodes.make, "c", "blocks", [4, 8], 40, BlocksCacheKey(2, 0))
    comm_id = _link_all(sender, {2: target})[2]
    sender.do(_send_slowly)
    if end == "unlink":
        sender.do(nodes.unlink, comm_id)
    else:
        sender.do(nodes.finalize)
    ends = ("LLM_NOT_YET_LINK", "LLM_FAILED", "LLM_KV_CACHE_NOT_EXIST", "LLM_ENGINE_FINALIZED")
    assert sender.do(_task_result) in ends
