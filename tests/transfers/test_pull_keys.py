"""What a pull leaves of a key: all of it, a part of the tensors, or nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest

from datadist import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    LLMException,
    LLMStatusCode,
)
from datadist.keys import INVALID_ID
from datadist.transfers.transfer import Transfers
from datadist.transport import TransferTimeout
from tests import held, nodes
from tests.nodes import Node, RemoteError, pattern

Start = Callable[..., Node]
WIDTH, TENSORS, BLOCKS = 40, 6, 8
KEY = CacheKey(1, 10)


def _linked(start: Start, pullers: int = 1) -> list[Node]:
    """An owner of a cache that only its key keeps, and those who pull it."""
    group = [start(cluster) for cluster in range(1, pullers + 2)]
    group[0].do(nodes.make, "src", "cache", [1, WIDTH], TENSORS, [KEY])
    group[0].do(nodes.fill, "src", 1)
    group[0].do(nodes.deallocate, "src")
    mapping = {cluster: cluster - 1 for cluster in range(1, pullers + 2)}
    for node in group[1:]:
        node.do(nodes.make, "dst", "cache", [1, WIDTH], TENSORS)
    for node in group:
        node.begin(nodes.link_and_wait, "keys", mapping)
    for node in group:
        node.result()
    return group


def _layers(node: Node, layers: range, key: Any = KEY) -> None:
    node.do(nodes.pull_cache, key, "dst", src_layer_range=layers, dst_layer_range=layers)


def _pages_used(here: nodes.Here) -> int:
    return int(here.live.stats()["pools"]["DEVICE"]["pages_used"])


def _heard(here: nodes.Here) -> None:
    """Wait until the owner has taken all that this engine has sent."""
    engine = here.live._live(LLMStatusCode.LLM_FAILED)
    assert all(view.synchronize(20) for view in list(engine.views.values()))


def _pages_left(owner: Node, *pullers: Node) -> int:
    """Pages of the owner once everything was said: consumed, told, acknowledged."""
    for node in pullers:
        node.do(_heard)
    owner.do(_heard)
    return int(owner.do(_pages_used))


def test_keys_that_differ_in_one_number_name_different_caches(start_node: Start) -> None:
    owner, puller = start_node(1), start_node(2)
    keys = [
        CacheKey(1, 10), CacheKey(1, 11), CacheKey(1, 10, 1),
        CacheKey(1, INVALID_ID, 0, 20), CacheKey(1, INVALID_ID, 0, 21),
        CacheKey(1, INVALID_ID, 1, 20),
    ]  # fmt: skip
    for seed, key in enumerate(keys):
        owner.do(nodes.make, str(seed), "cache", [1, WIDTH], TENSORS, [key])
        owner.do(nodes.fill, str(seed), seed)
    puller.do(nodes.make, "dst", "cache", [1, WIDTH], TENSORS)
    nodes.link_pair(owner, puller)
    for seed, key in enumerate(keys):
        puller.do(nodes.pull_cache, key, "dst")
        for tensor, array in enumerate(puller.do(nodes.read, "dst")):
            np.testing.assert_array_equal(array, pattern(seed, tensor, (1, WIDTH)), str(key))


def test_layers_that_were_pulled_twice_count_once(start_node: Start) -> None:
    owner, puller = _linked(start_node)
    for layers in (range(0, 2), range(0, 1), range(1, 2), range(0, 2)):
        _layers(puller, layers)
    assert _pages_left(owner, puller) == TENSORS
    _layers(puller, range(1, 3))  # the rest, and one again
    for index, array in enumerate(puller.do(nodes.read, "dst")):
        np.testing.assert_array_equal(array, pattern(1, index, (1, WIDTH)))
    with pytest.raises(RemoteError) as caught:
        _layers(puller, range(0, 1))
    assert caught.value.status == "LLM_KV_CACHE_NOT_EXIST"
    assert _pages_left(owner, puller) == 0


def test_a_part_by_its_id_counts_for_the_key_of_its_slot(start_node: Start) -> None:
    owner, puller = _linked(start_node)
    _layers(puller, range(0, 1), CacheKeyByIdAndIndex(1, 1, 0))
    _layers(puller, range(1, 3))
    with pytest.raises(RemoteError) as caught:
        puller.do(nodes.pull_cache, KEY, "dst")
    assert caught.value.status == "LLM_KV_CACHE_NOT_EXIST"
    assert _pages_left(owner, puller) == 0


def test_a_part_after_which_all_is_pulled(start_node: Start) -> None:
    owner, puller = _linked(start_node)
    _layers(puller, range(2, 3))
    puller.do(nodes.pull_cache, KEY, "dst")
    assert _pages_left(owner, puller) == 0


def test_parts_of_two_pullers_make_a_whole(start_node: Start) -> None:
    owner, one, two = _linked(start_node, 2)
    _layers(one, range(0, 2))
    assert _pages_left(owner, one, two) == TENSORS
    _layers(two, range(2, 3))
    assert _pages_left(owner, one, two) == 0
    for node in (one, two):
        with pytest.raises(RemoteError) as caught:
            _layers(node, range(0, 1))
        assert caught.value.status == "LLM_KV_CACHE_NOT_EXIST"


def test_a_pull_that_failed_consumes_nothing(start_node: Start) -> None:
    owner, puller = _linked(start_node)
    puller.do(nodes.make, "narrow", "cache", [1, WIDTH * 2], TENSORS)
    with pytest.raises(RemoteError) as caught:
        puller.do(nodes.pull_cache, KEY, "narrow")
    assert caught.value.status == "LLM_PARAM_INVALID"
    with pytest.raises(RemoteError) as caught:
        puller.do(_pull_in_vain)
    assert caught.value.status == "LLM_TIMEOUT"
    assert _pages_left(owner, puller) == TENSORS
    puller.do(nodes.pull_cache, KEY, "dst")
    assert _pages_left(owner, puller) == 0


def _pull_in_vain(here: nodes.Here) -> None:
    """A pull whose transport moves all, and then says that it did not."""
    (domain,) = here.live._live(LLMStatusCode.LLM_FAILED)._all_domains()
    assert domain.attempt is not None
    link: Any = domain.attempt.link
    read = link.read

    def fail(*args: Any) -> None:
        read(*args)
        raise TransferTimeout("for the test", link_usable=True)

    link.read = fail
    try:
        nodes.pull_cache(here, KEY, "dst")
    finally:
        del link.read


def test_the_first_bytes_of_all_tensors_consume_the_key(start_node: Start) -> None:
    owner, puller = _linked(start_node)
    puller.do(nodes.pull_cache, KEY, "dst", 0, 8)
    with pytest.raises(RemoteError) as caught:
        puller.do(nodes.pull_cache, KEY, "dst")
    assert caught.value.status == "LLM_KV_CACHE_NOT_EXIST"
    assert _pages_left(owner, puller) == 0


# -- blocks ------------------------------------------------------------------------------------


def _blocks(start: Start, memory: str = "pool") -> tuple[Node, Node]:
    owner, puller = start(1), start(2)
    owner.do(nodes.make, "src", "blocks", [BLOCKS, WIDTH], TENSORS, BlocksCacheKey(1, 3), memory)
    puller.do(nodes.make, "dst", "blocks", [BLOCKS, WIDTH], TENSORS)
    owner.do(nodes.fill, "src", 1)
    puller.do(nodes.fill, "dst", 2)
    nodes.link_pair(owner, puller)
    return owner, puller


def _expect(puller: Node, moved: dict[tuple[int, int], tuple[int, int]], seed: int = 1) -> None:
    """``moved``: (tensor, block) of ours from (tensor, block) of the owner's; the rest untouched."""
    for tensor, array in enumerate(puller.do(nodes.read, "dst")):
        expected = pattern(2, tensor, (BLOCKS, WIDTH))
        for (at, block), (source, number) in moved.items():
            if at == tensor:
                expected[block] = pattern(seed, source, (BLOCKS, WIDTH))[number]
        np.testing.assert_array_equal(array, expected)
    puller.do(nodes.fill, "dst", 2)


@pytest.mark.parametrize(
    "ranges",
    [
        {"src_layer_range": range(1, 2), "dst_layer_range": range(0, 1)},
        {"src_layer_range": range(0, 1), "dst_layer_range": range(2, 3)},
    ],
)
def test_a_part_of_the_layers_is_not_taken_for_all(
    start_node: Start, ranges: dict[str, Any]
) -> None:
    _, puller = _blocks(start_node)
    first, goal = ranges["src_layer_range"].start * 2, ranges["dst_layer_range"].start * 2
    part = {(goal + n, 6): (first + n, 5) for n in range(2)}
    whole = {(n, 6): (n, 5) for n in range(TENSORS)}
    key = BlocksCacheKey(1, 3)
    for _ in range(2):
        puller.do(nodes.pull_blocks, key, "dst", [5], [6], **ranges)
        _expect(puller, part)
        puller.do(nodes.pull_blocks, key, "dst", [5], [6])
        _expect(puller, whole)
    wrong: list[dict[str, Any]] = [
        {"src_layer_range": range(0, 1)}, {"dst_layer_range": range(0, 1)},
        {"tensor_num_per_layer": 0},
    ]  # fmt: skip
    for given in wrong:
        with pytest.raises(RemoteError) as caught:
            puller.do(nodes.pull_blocks, key, "dst", [5], [6], **given)
        assert caught.value.status == "LLM_PARAM_INVALID"
    _expect(puller, {})
    for count in (1, 3):
        layers: dict[str, Any] = {
            "src_layer_range": range(1, 2), "dst_layer_range": range(0, 1),
            "tensor_num_per_layer": count,
        }  # fmt: skip
        puller.do(nodes.pull_blocks, key, "dst", [5], [6], **layers)
        _expect(puller, {(n, 6): (count + n, 5) for n in range(count)})


def test_a_part_of_a_larger_cache_is_not_taken_for_all_of_it(start_node: Start) -> None:
    _, puller = _blocks(start_node)
    puller.do(nodes.deallocate, "dst")
    puller.do(nodes.make, "dst", "blocks", [BLOCKS, WIDTH], 2)
    puller.do(nodes.fill, "dst", 2)
    for _ in range(2):
        layers: dict[str, Any] = {"src_layer_range": range(1, 2)}
        puller.do(nodes.pull_blocks, BlocksCacheKey(1, 3), "dst", [5], [6], **layers)
        _expect(puller, {(n, 6): (n + 2, 5) for n in range(2)})
        with pytest.raises(RemoteError, match="give layer ranges of equal length") as caught:
            puller.do(nodes.pull_blocks, BlocksCacheKey(1, 3), "dst", [5], [6])
        assert caught.value.status == "LLM_PARAM_INVALID"
        _expect(puller, {})


@pytest.mark.parametrize("memory", ["pool", "numpy"])
def test_of_two_blocks_caches_with_one_key_the_last_is_pulled(
    start_node: Start, memory: str
) -> None:
    """Only registered caches may share a key; the one before it counts again when it is gone."""
    owner, puller = start_node(1), start_node(2)
    key = BlocksCacheKey(1, 3)
    owner.do(nodes.make, "first", "blocks", [BLOCKS, WIDTH], TENSORS, key, memory)
    for seed, label in ((5, "second"), (6, "third")):
        owner.do(nodes.make, label, "blocks", [BLOCKS, WIDTH], TENSORS, key, "numpy")
        owner.do(nodes.fill, label, seed)
    owner.do(nodes.fill, "first", 4)
    puller.do(nodes.make, "dst", "blocks", [BLOCKS, WIDTH], TENSORS)
    puller.do(nodes.fill, "dst", 2)
    nodes.link_pair(owner, puller)
    moved = {(n, 6): (n, 5) for n in range(TENSORS)}
    for seed, label in ((6, "third"), (5, "second"), (4, "first")):
        for _ in range(2):  # by the slow path, then by the known one
            puller.do(nodes.pull_blocks, key, "dst", [5], [6])
            _expect(puller, moved, seed)
        owner.do(nodes.unregister, label)
    with pytest.raises(RemoteError) as caught:
        puller.do(nodes.pull_blocks, key, "dst", [5], [6])
    assert caught.value.status == "LLM_KV_CACHE_NOT_EXIST"


def test_a_key_of_registered_memory_is_pulled_as_often_as_one_likes(start_node: Start) -> None:
    owner, puller = start_node(1), start_node(2)
    owner.do(nodes.make, "src", "cache", [1, WIDTH], TENSORS, [KEY], "numpy")
    owner.do(nodes.fill, "src", 1)
    puller.do(nodes.make, "dst", "cache", [1, WIDTH], TENSORS)
    nodes.link_pair(owner, puller)
    for _ in range(3):
        puller.do(nodes.fill, "dst", 9)
        puller.do(nodes.pull_cache, KEY, "dst")
        for index, array in enumerate(puller.do(nodes.read, "dst")):
            np.testing.assert_array_equal(array, pattern(1, index, (1, WIDTH)))


def _pull_in_two_threads(here: nodes.Here) -> list[str]:
    """How two pulls of the key end that have both found it before either could move."""
    engine = here.live._live(LLMStatusCode.LLM_FAILED)
    (domain,) = engine._links.domains.values()
    assert domain.attempt is not None
    found, outcomes, move = threading.Semaphore(0), [], Transfers.move

    def note(*args: Any, **kwargs: Any) -> None:
        found.release()
        move(*args, **kwargs)

    def pull(label: str) -> None:
        try:
            nodes.pull_cache(here, KEY, label)
            outcomes.append("OK")
        except LLMException as error:
            outcomes.append(error.status_code.name)

    threads = [threading.Thread(target=pull, args=(label,)) for label in ("dst", "other")]
    with mock.patch.object(Transfers, "move", note):
        held.take_permits(here, domain.attempt)
        for thread in threads:
            thread.start()
        for _ in threads:
            assert found.acquire(timeout=held.SECONDS)
        held.release_permits(here)
        for thread in threads:
            thread.join()
    return sorted(outcomes)


def _pull_inside_together(here: nodes.Here, calls: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """How pulls of the key end of which each was in the transport before any could end."""
    held.hold_moves(here, 1)
    for number, (label, options) in enumerate(calls):
        call = lambda here, label, options: nodes.pull_cache(here, KEY, label, **options)  # noqa: E731
        held.begin(here, str(number), call, label, options)
    assert held.inside(here, len(calls))
    held.let_go(here)
    return sorted(held.outcome(here, str(number)) for number in range(len(calls)))


def test_of_pulls_of_a_key_that_read_at_the_same_time_one_gets_it(start_node: Start) -> None:
    owner, puller = _linked(start_node)
    puller.do(nodes.make, "other", "cache", [1, WIDTH], TENSORS)
    outcomes = puller.do(_pull_inside_together, [("dst", {}), ("other", {}), ("dst", {})])
    assert outcomes[2] == "OK"
    assert all("LLM_KV_CACHE_NOT_EXIST" in outcome for outcome in outcomes[:2]), outcomes
    assert _pages_left(owner, puller) == 0


def test_layers_of_a_key_are_read_at_the_same_time_and_consume_it_together(
    start_node: Start,
) -> None:
    owner, puller = _linked(start_node)
    halves = [range(0, 1), range(1, TENSORS // 2)]
    calls = [("dst", {"src_layer_range": half, "dst_layer_range": half}) for half in halves]
    assert puller.do(_pull_inside_together, calls) == ["OK", "OK"]
    for index, array in enumerate(puller.do(nodes.read, "dst")):
        np.testing.assert_array_equal(array, pattern(1, index, (1, WIDTH)))
    with pytest.raises(RemoteError) as caught:
        puller.do(nodes.pull_cache, KEY, "dst")
    assert caught.value.status == "LLM_KV_CACHE_NOT_EXIST"
    assert _pages_left(owner, puller) == 0


def test_of_two_threads_that_pull_a_key_one_gets_it(start_node: Start) -> None:
    owner, puller = _linked(start_node)
    puller.do(nodes.make, "other", "cache", [1, WIDTH], TENSORS)
    assert puller.do(_pull_in_two_threads) == ["LLM_KV_CACHE_NOT_EXIST", "OK"]
    assert _pages_left(owner, puller) == 0
