"""How long a transport may take for one transfer: ``sync_kv_timeout``, for pushes once per layer, or what
the call says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from datadist import (
    BlocksCacheKey,
    CacheKeyByIdAndIndex,
    LayerSynchronizer,
    LLMException,
    LLMStatusCode,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from datadist.transport import KnownWay
from tests import nodes
from tests.nodes import Node

TENSORS, SECONDS = 6, 1000
SLOTS, BLOCKS = CacheKeyByIdAndIndex(1, 1), BlocksCacheKey(1)


class Always(LayerSynchronizer):
    """Every layer is final."""

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True


def _note_limits(here: nodes.Here) -> None:
    """Note what the link is given; it moves as before."""
    (domain,) = here.live._live(LLMStatusCode.LLM_FAILED)._all_domains()
    assert domain.attempt is not None
    link: Any = domain.attempt.link
    limits = here.any["limits"] = []

    def noting(move: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            limits.append(args[-1])
            return move(*args)

        return noted

    def noting_way(way: KnownWay) -> Callable[..., Any]:
        move = known_way(way)

        def noted(*args: Any) -> Any:
            took = move(*args)
            limits.extend([] if took is None else [args[-1]])
            return took

        return noted

    known_way = link.known_way
    link.read, link.write, link.known_way = noting(link.read), noting(link.write), noting_way


def _limits(here: nodes.Here) -> list[float]:
    """Those of now, in units of sync_kv_timeout, rounded up: what passed before is little."""
    found = [-(-limit // SECONDS) for limit in here.any["limits"]]
    here.any["limits"].clear()
    return found


def _linked(start: Callable[..., Node], one_sided: bool) -> tuple[Node, Node]:
    pair = []
    for cluster in (1, 2):
        node = start(
            cluster, enable_remote_cache_accessible=one_sided, sync_kv_timeout=SECONDS * 1000
        )
        node.do(nodes.make, "slots", "cache", [1, 8], TENSORS)
        node.do(nodes.make, "blocks", "blocks", [4, 8], TENSORS, BlocksCacheKey(cluster))
        pair.append(node)
    nodes.link_pair(pair[0], pair[1])
    for node in pair:
        node.do(_note_limits)
    return pair[0], pair[1]


def _transfer(here: nodes.Here, configs: list[Any], **options: Any) -> str:
    task = here.live.cache_manager.transfer_cache_async(
        here.caches["slots"], Always(), configs, **options
    )
    return task.synchronize(60_000).name


def _addresses(here: nodes.Here) -> list[int]:
    return list(here.caches["slots"].tensor_addrs)


def test_pushes_have_it_for_each_layer(start_node: Callable[..., Node]) -> None:
    _, pusher = _linked(start_node, True)
    two = {"src_layer_range": range(0, 2), "dst_layer_range": range(1, 3)}
    cases: list[tuple[dict[str, Any], int]] = [
        ({}, 3),
        (two, 2),
        ({"tensor_num_per_layer": 1}, 6),
        ({"tensor_num_per_layer": 3}, 2),
        ({"tensor_num_per_layer": 6}, 1),
        ({"src_layer_range": range(2, 3), "dst_layer_range": range(0, 1)}, 1),
    ]
    for options, layers in cases:
        pusher.do(nodes.push_cache, SLOTS, "slots", **options)
        assert pusher.do(_limits) == [layers], options
        for _ in range(2):  # by the slow path, and where all is moved, by the known one
            pusher.do(nodes.push_blocks, BLOCKS, "blocks", [1], [2], **options)
            assert pusher.do(_limits) == [layers], options
    configs = [TransferWithCacheKeyConfig(SLOTS, range(3), range(3))]
    assert pusher.do(_transfer, configs) == "LLM_SUCCESS"
    assert pusher.do(_limits) == [1, 1, 1]


@pytest.mark.parametrize("one_sided", [False, True])
def test_pulls_have_it_once(start_node: Callable[..., Node], one_sided: bool) -> None:
    owner, puller = _linked(start_node, one_sided)
    puller.do(nodes.pull_cache, SLOTS, "slots")
    for options in ({}, {"tensor_num_per_layer": 1}):
        for _ in range(2):
            puller.do(nodes.pull_blocks, BLOCKS, "blocks", [1], [2], **options)
    puller.do(nodes.pull_blocks, BLOCKS, "blocks", [0, 1, 2], [2, 0, 1])
    assert puller.do(_limits) == [1] * 6
    if not one_sided:
        assert owner.do(_transfer, [TransferConfig(2, puller.do(_addresses))]) == "LLM_SUCCESS"
        assert puller.do(_limits) == [1, 1, 1]


OWN: dict[str, Any] = {"timeout_in_millis": 7_000_000}


def test_the_limit_of_a_call_is_that_of_all_its_layers(start_node: Callable[..., Node]) -> None:
    _, other = _linked(start_node, True)
    for _ in range(2):  # by the slow path, and by the cached route
        other.do(nodes.push_blocks, BLOCKS, "blocks", [1], [2], tensor_num_per_layer=1, **OWN)
        other.do(nodes.pull_blocks, BLOCKS, "blocks", [1], [2], **OWN)
        other.do(nodes.pull_blocks, BLOCKS, "blocks", [0, 1, 2], [2, 0, 1], **OWN)
    other.do(nodes.push_cache, SLOTS, "slots", **OWN)
    other.do(nodes.pull_cache, SLOTS, "slots", **OWN)
    assert other.do(_limits) == [7] * 8
    configs = [TransferWithCacheKeyConfig(SLOTS, range(3), range(3))]
    assert other.do(_transfer, configs, **OWN) == "LLM_SUCCESS"
    assert other.do(_limits) == [7] * 3
    assert other.do(_in_background) == [7] * 4
    other.do(nodes.pull_blocks, BLOCKS, "blocks", [1], [2])
    assert other.do(_limits) == [1]


def _in_background(here: nodes.Here) -> list[float]:
    manager, blocks, slots = here.live.cache_manager, here.caches["blocks"], here.caches["slots"]
    for task in (
        manager.pull_blocks_async(BLOCKS, blocks, [1], [2], **OWN),
        manager.push_blocks_async(BLOCKS, blocks, [1], [2], **OWN),
        manager.pull_cache_async(SLOTS, slots, **OWN),
        manager.push_cache_async(SLOTS, slots, **OWN),
    ):
        task.result(60)
    return _limits(here)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, "LLM_PARAM_INVALID"), (-1, "LLM_PARAM_INVALID"), (2**31, "LLM_PARAM_INVALID"),
        (True, "TypeError"), (1.5, "TypeError"), ("1000", "TypeError"),
    ],
)  # fmt: skip
def test_a_wrong_limit_is_refused_by_each_call(
    start_node: Callable[..., Node], value: object, error: str
) -> None:
    _, other = _linked(start_node, True)
    assert other.do(_refusals, value) == [error] * 9


def _refusals(here: nodes.Here, value: Any) -> list[str]:
    manager, blocks, slots = here.live.cache_manager, here.caches["blocks"], here.caches["slots"]
    wrong = {"timeout_in_millis": value}
    configs = [TransferWithCacheKeyConfig(SLOTS, range(3), range(3))]
    calls: list[Callable[[], object]] = [
        lambda: manager.transfer_cache_async(slots, Always(), configs, **wrong)
    ]
    for method in ("pull_blocks", "push_blocks", "pull_blocks_async", "push_blocks_async"):
        calls.append(lambda name=method: getattr(manager, name)(BLOCKS, blocks, [1], [2], **wrong))  # type: ignore[misc]
    for method in ("pull_cache", "push_cache", "pull_cache_async", "push_cache_async"):
        calls.append(lambda name=method: getattr(manager, name)(SLOTS, slots, **wrong))  # type: ignore[misc]
    found = []
    for call in calls:
        with pytest.raises((TypeError, LLMException)) as caught:
            call()
        assert str(value) in str(caught.value)
        found.append(getattr(getattr(caught.value, "status_code", None), "name", "TypeError"))
    return found


def test_a_limit_that_has_passed_names_itself(start_node: Callable[..., Node]) -> None:
    owner, other = _linked(start_node, True)
    missing = BlocksCacheKey(1, 99)
    owner.pause()
    try:
        with pytest.raises(nodes.RemoteError) as caught:
            other.do(nodes.pull_blocks, missing, "blocks", [1], [2], timeout_in_millis=20)
    finally:
        owner.resume()
    assert caught.value.status == "LLM_TIMEOUT"
    assert "timeout_in_millis (0.02 s)" in caught.value.text
