"""Calls of several threads at once: what ends what. What goes on together: test_parallel.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from datadist import (
    BlocksCacheKey,
    CacheKeyByIdAndIndex,
    LayerSynchronizer,
    LLMException,
    TransferWithCacheKeyConfig,
)
from tests import nodes, torn
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
    deadline = time.monotonic() + 60
    while not here.any["pulls"] and here.any["error"] is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def _outcome(here: nodes.Here) -> tuple[int, tuple[str, str]]:
    here.any["thread"].join(50)
    assert not here.any["thread"].is_alive()
    return here.any["pulls"], here.any["error"]


def _pulling_pair(start: Start) -> tuple[Node, Node, int]:
    puller, owner = (start(n, pool=160 * MIB, sync_kv_timeout=60_000) for n in (1, 2))
    for node in (puller, owner):
        node.do(nodes.make, "large", "cache", LARGE, 4)
    owner.do(nodes.fill, "large", 7)
    puller.do(nodes.fill, "large", 3)
    comm_id = _link_all(puller, {2: owner})[2]
    puller.do(_pull_until_it_fails)
    return puller, owner, comm_id


def _check_torn(puller: Node, owner: Node | None) -> None:
    """Every element is from before or after a pull, and the source, if it is there, as it was."""
    old, new = ([pattern(seed, t, (1, 8 * MIB)) for t in range(4)] for seed in (3, 7))
    torn.check_torn(puller.do(nodes.read, "large"), old, new, "what was pulled")
    if owner is not None:
        torn.check_unchanged(owner.do(nodes.read, "large"), new, "the source")


def test_unlink_lets_the_pull_in_progress_end(start_node: Start) -> None:
    puller, owner, comm_id = _pulling_pair(start_node)
    puller.do(nodes.unlink, comm_id)
    pulls, (status, text) = puller.do(_outcome)
    assert pulls >= 1
    assert status == "LLM_NOT_YET_LINK", text
    _check_whole(puller)
    _check_torn(puller, owner)
    _link_all(puller, {2: owner})


def _check_whole(puller: Node) -> None:
    for tensor, array in enumerate(puller.do(nodes.read, "large")):
        np.testing.assert_array_equal(array, pattern(7, tensor, (1, 8 * MIB)))


def test_the_owner_unlinks_during_a_pull(start_node: Start) -> None:
    puller, owner, _ = _pulling_pair(start_node)
    owner.do(nodes.unlink, 1)
    _pulls, (status, text) = puller.do(_outcome)
    assert status in ("LLM_NOT_YET_LINK", "LLM_FAILED"), text
    assert "unlink" in text
    _check_torn(puller, owner)


def test_finalize_during_a_pull(start_node: Start) -> None:
    puller, owner, _ = _pulling_pair(start_node)
    puller.do(nodes.finalize)
    _pulls, (status, text) = puller.do(_outcome)
    assert status in ("LLM_NOT_YET_LINK", "LLM_FAILED", "LLM_ENGINE_FINALIZED"), text
    torn.check_unchanged(
        owner.do(nodes.read, "large"), [pattern(7, t, (1, 8 * MIB)) for t in range(4)], "the source"
    )
    puller.do(nodes.init, 1)
    _link_all(puller, {2: owner})


def test_the_owner_finalizes_during_a_pull(start_node: Start) -> None:
    puller, owner, _ = _pulling_pair(start_node)
    owner.do(nodes.finalize)
    _pulls, (status, text) = puller.do(_outcome)
    assert status in ("LLM_NOT_YET_LINK", "LLM_FAILED"), text
    _check_torn(puller, None)


def test_the_owner_frees_a_cache_during_a_pull(start_node: Start) -> None:
    """Pulls end with an error, and what they wrote is from before: the memory was not reused."""
    puller, owner, _ = _pulling_pair(start_node)
    owner.do(nodes.deallocate, "large")
    owner.do(nodes.make, "reused", "cache", LARGE, 4)
    owner.do(nodes.fill, "reused", 9)
    _pulls, (status, text) = puller.do(_outcome)
    assert status == "LLM_KV_CACHE_NOT_EXIST", text
    _check_whole(puller)


LAYERS = 20
"""Of two tensors each."""


class Slow(LayerSynchronizer):
    """Lets layers pass one by one, each after a moment, and the last one when it is told to."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        if layer_index < LAYERS - 1:
            self.over.wait(0.2)
            return True
        return self.over.wait(60)


def _after_layers(count: int) -> list[NDArray[np.int32]]:
    """The target's cache when so many of the 20 layers, of two tensors each, have come."""
    seeds = [1 if tensor < 2 * count else 2 for tensor in range(2 * LAYERS)]
    return [pattern(seed, tensor, (4, 8)) for tensor, seed in enumerate(seeds)]


def _send_slowly(here: nodes.Here) -> None:
    config = TransferWithCacheKeyConfig(BlocksCacheKey(2, 0), range(LAYERS), range(LAYERS))
    here.any["slow"] = Slow()
    here.any["task"] = here.live.cache_manager.transfer_cache_async(
        here.caches["c"], here.any["slow"], [config]
    )


def _task_result(here: nodes.Here) -> str:
    here.any["slow"].over.set()
    code = here.any["task"].synchronize(50_000)
    return str(code.name)


@pytest.mark.parametrize("end", ["unlink", "finalize"])
def test_a_task_ends_with_its_link(start_node: Start, end: str) -> None:
    sender, target = start_node(1, local_comm_res=""), start_node(2, local_comm_res="")
    sender.do(nodes.make, "c", "blocks", [4, 8], 2 * LAYERS)
    target.do(nodes.make, "c", "blocks", [4, 8], 2 * LAYERS, BlocksCacheKey(2, 0))
    for node, seed in ((sender, 1), (target, 2)):
        node.do(nodes.fill, "c", seed)
    comm_id = _link_all(sender, {2: target})[2]
    sender.do(_send_slowly)
    if end == "unlink":
        sender.do(nodes.unlink, comm_id)
    else:
        sender.do(nodes.finalize)
    ends = ("LLM_NOT_YET_LINK", "LLM_FAILED", "LLM_KV_CACHE_NOT_EXIST", "LLM_ENGINE_FINALIZED")
    assert sender.do(_task_result) in ends
    torn.check_torn(
        target.do(nodes.read, "c"), _after_layers(0), _after_layers(LAYERS), "the target"
    )
    if end == "unlink":
        torn.check_unchanged(sender.do(nodes.read, "c"), _after_layers(LAYERS), "the source")
