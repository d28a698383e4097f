"""Element types of the two caches of a transfer are compared (element_types.py): warnings and errors."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import pytest

from datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LayerSynchronizer,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from datadist.caches.element_types import MAX_WARNED, ElementTypes
from datadist.caches.peers import PeerView
from tests import nodes
from tests.nodes import MIB, Node, RemoteError

Start = Callable[..., Node]
Pair = tuple[Node, Node]
TENSORS, SLOTS, BYTES = 4, 4, 64
FLOAT16, BF16, INT8 = DataType.DT_FLOAT16, DataType.DT_BF16, DataType.DT_INT8
SIZES = {FLOAT16: 2, BF16: 2, INT8: 1, DataType.DT_FLOAT: 4}
STRICT = {"datadist.check_types": "1"}


def _init(here: nodes.Here, cluster: int, one_sided: bool, options: dict[str, str]) -> None:
    config = LLMConfig()
    config.enable_cache_manager = True
    config.transfer_backend = "shm"
    config.sync_kv_timeout = 5000
    config.enable_remote_cache_accessible = one_sided
    config.mem_pool_cfg = f'{{"memory_size": {4 * MIB}, "page_shift": 12}}'
    here.engine = LLMDataDist(LLMRole.MIX, cluster)
    here.engine.init({**config.generate_options(), **options})


def _make(here: nodes.Here, label: str, kind: str, data_type: DataType, keys: Any = None) -> int:
    """A cache of a pool with slots or blocks of BYTES bytes, all of them 0."""
    manager = here.live.cache_manager
    desc = CacheDesc(TENSORS, [SLOTS, BYTES // SIZES[data_type]], data_type)
    allocate = manager.allocate_blocks_cache if kind == "blocks" else manager.allocate_cache
    here.caches[label] = cache = allocate(desc, *(() if keys is None else (keys,)))
    _fill(here, label, 0)
    return cache.cache_id


def _fill(here: nodes.Here, label: str, value: int) -> None:
    for tensor in here.caches[label].numpy():
        tensor.view(np.uint8)[:] = value


def _bytes(here: nodes.Here, label: str) -> set[int]:
    """The different bytes of row 0 of every tensor."""
    rows = [tensor.view(np.uint8)[0] for tensor in here.caches[label].numpy()]
    return {int(byte) for byte in np.unique(rows)}


def _free(here: nodes.Here, label: str) -> None:
    here.live.cache_manager.deallocate_blocks_cache(here.caches.pop(label))


def _warnings(node: Node) -> list[str]:
    lines: list[str] = node.do(nodes.log_of, "WARNING")
    return [line for line in lines if "data_type" in line]


def _linked(start: Start, one_sided: bool, mover: dict[str, str], peer: dict[str, str]) -> Pair:
    """Cluster 1, which owns what keys name, and cluster 2, which pulls or pushes."""
    one, two = start(), start()
    one.do(_init, 1, one_sided, peer)
    two.do(_init, 2, one_sided, mover)
    nodes.link_pair(one, two)
    return one, two


class Always(LayerSynchronizer):
    """Every layer is final."""

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True


def _send(here: nodes.Here, label: str, config: Any, **blocks: Any) -> None:
    """Layer by layer; raises what a call would raise."""
    task = here.live.cache_manager.transfer_cache_async(
        here.caches[label], Always(), [config], **blocks
    )
    code = task.synchronize(20_000)
    if code is not LLMStatusCode.LLM_SUCCESS:
        raise LLMException(nodes.log_of(here, "ERROR")[-1], status_code=code)


# -- every way between engines -----------------------------------------------------------------

BY_REQUEST, BY_PREFIX = CacheKey(1, 5), CacheKey(1, 2**64 - 1, prefix_id=7)
BY_ID, BLOCKS = CacheKeyByIdAndIndex(1, 1, 0), BlocksCacheKey(1)
ALL_LAYERS = range(TENSORS // 2)
TO_SLOT = TransferWithCacheKeyConfig(BY_ID, ALL_LAYERS, ALL_LAYERS)
TO_BLOCKS = TransferWithCacheKeyConfig(BLOCKS, ALL_LAYERS, ALL_LAYERS)
LISTS = {"src_block_indices": [0], "dst_block_indices": [0]}
SPREAD = {"dst_block_indices": [0], "dst_block_memory_size": BYTES}


class Way(NamedTuple):
    """A call of cluster 2 that moves between its cache "c" and the one of cluster 1."""

    kinds: str
    """Of the caches of cluster 1 and 2."""
    call: Callable[..., None]
    args: tuple[Any, ...]
    options: Mapping[str, Any] = MappingProxyType({})
    keys: Any = None
    """Of the cache of cluster 1."""
    pull: bool = True
    one_sided: bool = False
    repeatable: bool = True
    """Whether the call consumes no key."""


def _pull(kinds: str, key: Any, *args: Any, **kwargs: Any) -> Way:
    call = nodes.pull_blocks if kinds.endswith("blocks") else nodes.pull_cache
    keys = {BY_ID: None, BLOCKS: BLOCKS}.get(key, [key])
    return Way(
        kinds, call, (key, "c", *args), keys=keys, repeatable=key is not BY_REQUEST, **kwargs
    )


def _push(kinds: str, call: Callable[..., None], *args: Any, **options: Any) -> Way:
    keys = BLOCKS if kinds.startswith("blocks") else None
    return Way(kinds, call, args, options, keys, pull=False, one_sided=True)


SOME_LAYERS = {"src_layer_range": ALL_LAYERS, "dst_layer_range": ALL_LAYERS}
WAYS: dict[str, Way] = {
    "pull by request": _pull("cache cache", BY_REQUEST),
    "pull by prefix": _pull("cache cache", BY_PREFIX),
    "pull by id": _pull("cache cache", BY_ID),
    "one-sided pull by id": _pull("cache cache", BY_ID, one_sided=True),
    "pull of blocks": _pull("blocks blocks", BLOCKS, [0], [0]),
    "one-sided pull of blocks": _pull("blocks blocks", BLOCKS, [0], [0], one_sided=True),
    "pull of a slot into blocks": _pull("cache blocks", BY_REQUEST, [], [0]),
    "pull of layers": _pull("cache cache", BY_REQUEST, options=SOME_LAYERS),
    "push": _push("cache cache", nodes.push_cache, BY_ID, "c"),
    "push of blocks": _push("blocks blocks", nodes.push_blocks, BLOCKS, "c", [0], [0]),
    "layers of a slot": _push("cache cache", _send, "c", TO_SLOT),
    "layers of blocks": _push("blocks blocks", _send, "c", TO_BLOCKS, **LISTS),
    "layers of whole blocks caches": _push("blocks blocks", _send, "c", TO_BLOCKS),
    "layers of a slot into blocks": _push("blocks cache", _send, "c", TO_BLOCKS, **SPREAD),
}


def _pair(start: Start, way: Way, source: DataType, target: DataType, **options: str) -> Pair:
    """Linked, with caches "c" of these types; the bytes of the source are 7, of the target 9."""
    one, two = _linked(start, way.one_sided, {f"datadist.{k}": v for k, v in options.items()}, {})
    for node, kind, keys in zip((one, two), way.kinds.split(), (way.keys, None), strict=True):
        is_source = (node is one) == way.pull
        node.do(_make, "c", kind, source if is_source else target, keys)
        node.do(_fill, "c", 7 if is_source else 9)
    return one, two


@pytest.mark.parametrize("name", WAYS)
def test_a_difference_is_one_warning_and_the_bytes_move(start_node: Start, name: str) -> None:
    way = WAYS[name]
    one, two = _pair(start_node, way, FLOAT16, INT8)
    for _ in range(3 if way.repeatable else 1):
        two.do(way.call, *way.args, **way.options)
    assert (two if way.pull else one).do(_bytes, "c") == {7}
    (line,) = _warnings(two)
    source, target = (1, 2) if way.pull else (2, 1)
    assert line.startswith(f"WARNING {'pull' if way.pull else 'push'}: ")
    assert f"the source, cache 1 of cluster {source}, has data_type DT_FLOAT16" in line
    assert f"the target, cache 1 of cluster {target}, has data_type DT_INT8" in line
    assert "datadist.check_types" in line
    assert _warnings(one) == []


@pytest.mark.parametrize("name", WAYS)
def test_a_difference_is_an_error_where_types_are_checked(start_node: Start, name: str) -> None:
    way = WAYS[name]
    one, two = _pair(start_node, way, FLOAT16, BF16, check_types="1")
    with pytest.raises(RemoteError, match=r"DT_FLOAT16.*DT_BF16.*datadist\.check_types") as error:
        two.do(way.call, *way.args, **way.options)
    assert error.value.status == "LLM_PARAM_INVALID"
    assert (two if way.pull else one).do(_bytes, "c") == {9}
    assert two.do(_operations) == 0
    # with a cache of the other one's type the same call passes, and finds its key
    two.do(_make, "c", way.kinds.split()[1], FLOAT16 if way.pull else BF16)
    two.do(_fill, "c", 9 if way.pull else 7)
    two.do(way.call, *way.args, **way.options)
    assert (two if way.pull else one).do(_bytes, "c") == {7}
    assert _warnings(one) == _warnings(two) == []


def _operations(here: nodes.Here) -> int:
    total = here.live.stats()["total"]
    return int(sum(total[way]["operations"] + total[way]["errors"] for way in ("pull", "push")))


# -- what is said once -------------------------------------------------------------------------


def test_every_pair_direction_and_operation_is_said(start_node: Start) -> None:
    one, two = _linked(start_node, True, {}, {})
    for number, data_type in enumerate((FLOAT16, INT8), 1):
        for node in (one, two):
            assert node.do(_make, data_type.name, "cache", data_type) == number
    for _ in range(2):
        two.do(nodes.pull_cache, CacheKeyByIdAndIndex(1, 1, 0), "DT_INT8")
        two.do(nodes.pull_cache, CacheKeyByIdAndIndex(1, 2, 0), "DT_FLOAT16")
        two.do(nodes.push_cache, CacheKeyByIdAndIndex(1, 1, 0), "DT_INT8")
        two.do(nodes.push_cache, CacheKeyByIdAndIndex(1, 2, 0), "DT_FLOAT16")
    said = [line.split(":")[0] for line in _warnings(two)]
    assert said == ["WARNING pull"] * 2 + ["WARNING push"] * 2
    assert len(set(_warnings(two))) == 4


def test_another_link_to_the_same_peer_says_nothing_new(start_node: Start) -> None:
    one, two = start_node(), start_node()
    one.do(_init, 1, False, {})
    two.do(_init, 2, False, {})
    one.do(_make, "c", "blocks", FLOAT16, BLOCKS)
    two.do(_make, "c", "blocks", INT8)
    for _ in range(3):
        ids = nodes.link_pair(one, two)
        two.do(nodes.pull_blocks, BLOCKS, "c", [0], [0])
        for node, comm_id in zip((one, two), ids, strict=True):
            node.do(nodes.unlink, comm_id)
    assert len(_warnings(two)) == 1


def test_a_restarted_peer_is_another_one(start_node: Start) -> None:
    two = start_node()
    two.do(_init, 2, False, {})
    two.do(_make, "c", "blocks", INT8)
    for number in range(1, 3):
        one = start_node()
        one.do(_init, 1, False, {})
        one.do(_make, "c", "blocks", FLOAT16, BLOCKS)
        _, comm_id = nodes.link_pair(one, two)
        for _ in range(2):
            two.do(nodes.pull_blocks, BLOCKS, "c", [0], [0])
        assert len(_warnings(two)) == number
        one.kill()
        two.do(nodes.unlink, comm_id)


# -- known ways --------------------------------------------------------------------------------


@pytest.mark.parametrize("push", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_a_new_cache_of_another_type_under_the_same_key_is_compared(
    start_node: Start, push: bool, strict: bool
) -> None:
    one, two = _linked(start_node, push, STRICT if strict else {}, {})
    move = nodes.push_blocks if push else nodes.pull_blocks
    one.do(_make, "c", "blocks", FLOAT16, BLOCKS)
    two.do(_make, "c", "blocks", FLOAT16)
    for _ in range(3):
        two.do(move, BLOCKS, "c", [0], [0])
    assert _warnings(two) == []
    one.do(_free, "c")
    one.do(_make, "c", "blocks", INT8, BLOCKS)
    for _ in range(3):
        if strict:
            with pytest.raises(RemoteError, match="check_types"):
                two.do(move, BLOCKS, "c", [0], [0])
        else:
            two.do(move, BLOCKS, "c", [0], [0])
    assert len(_warnings(two)) == (0 if strict else 1)
    one.do(_free, "c")
    one.do(_make, "c", "blocks", FLOAT16, BLOCKS)
    two.do(move, BLOCKS, "c", [0], [0])


# -- layers to raw addresses -------------------------------------------------------------------


def _addresses(here: nodes.Here, label: str) -> list[int]:
    return list(here.caches[label].tensor_addrs)


def _to_addresses(start: Start, sender: dict[str, str], reader: dict[str, str]) -> Pair:
    """A cluster 1, to which cluster 2 sends layers; the caches "c" have different types."""
    one, two = _linked(start, False, sender, reader)
    one.do(_make, "c", "cache", INT8)
    one.do(_make, "same", "cache", FLOAT16)
    two.do(_make, "c", "cache", FLOAT16)
    two.do(_fill, "c", 7)
    return one, two


def test_layers_to_addresses_are_compared_by_the_engine_that_reads(start_node: Start) -> None:
    one, two = _to_addresses(start_node, {}, {})
    for label in ("same", "c", "c"):
        two.do(_send, "c", TransferConfig(1, one.do(_addresses, label)))
        assert one.do(_bytes, label) == {7}
    (line,) = _warnings(one)
    assert line.startswith("WARNING transfer_cache_async: ")
    assert "a cache of cluster 2, has data_type DT_FLOAT16" in line
    assert "cache 1 of cluster 1, has data_type DT_INT8" in line
    assert _warnings(two) == []


@pytest.mark.parametrize(("sender", "reader"), [({}, STRICT), (STRICT, {})])
def test_layers_to_addresses_are_refused_where_one_of_the_two_checks_types(
    start_node: Start, sender: dict[str, str], reader: dict[str, str]
) -> None:
    one, two = _to_addresses(start_node, sender, reader)
    with pytest.raises(RemoteError, match=r"DT_FLOAT16.*DT_INT8.*check_types") as error:
        two.do(_send, "c", TransferConfig(1, one.do(_addresses, "c")))
    assert error.value.status == "LLM_PARAM_INVALID"
    assert one.do(_bytes, "c") == {0}
    two.do(_send, "c", TransferConfig(1, one.do(_addresses, "same")))
    assert one.do(_bytes, "same") == {7}


def _register_twice(here: nodes.Here) -> list[int]:
    """The same memory as two caches of different types; its addresses."""
    manager = here.live.cache_manager
    memory = here.any["memory"] = [np.zeros((SLOTS, BYTES), np.int8) for _ in range(TENSORS)]
    addresses = [int(array.ctypes.data) for array in memory]
    for label, data_type in (("int8", INT8), ("float16", FLOAT16), ("bf16", BF16)):
        desc = CacheDesc(TENSORS, [SLOTS, BYTES // SIZES[data_type]], data_type)
        here.caches[label] = manager.register_cache(desc, addresses)
    return addresses


@pytest.mark.parametrize("data_type", [INT8, FLOAT16, BF16])
def test_memory_of_several_types_accepts_layers_of_each(
    start_node: Start, data_type: DataType
) -> None:
    one, two = start_node(), start_node()
    one.do(_init, 1, False, STRICT)
    two.do(_init, 2, False, STRICT)
    addresses = one.do(_register_twice)
    nodes.link_pair(one, two)
    two.do(_make, "c", "cache", data_type)
    two.do(_make, "other", "cache", DataType.DT_FLOAT)
    two.do(_send, "c", TransferConfig(1, addresses))
    with pytest.raises(RemoteError, match="check_types"):
        two.do(_send, "other", TransferConfig(1, addresses))


# -- by itself ---------------------------------------------------------------------------------


def _view(incarnation: str = "a") -> PeerView:
    return cast("PeerView", SimpleNamespace(
        incarnation=incarnation, session=SimpleNamespace(cluster_id=1)
    ))  # fmt: skip


def _entry(data_type: int) -> Any:
    return SimpleNamespace(cache_id=3, data_type=data_type)


def _own(data_type: int) -> Any:
    return SimpleNamespace(cache_id=4, layout=SimpleNamespace(data_type=data_type))


def test_many_threads_that_pull_at_once_warn_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(20):
        types, barrier = ElementTypes(2, required=False), threading.Barrier(8)

        def pull(types: ElementTypes = types, barrier: threading.Barrier = barrier) -> None:
            barrier.wait(60)
            types.check_pull(_view(), _entry(1), _own(2))

        threads = [threading.Thread(target=pull) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(caplog.records) == 20
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_a_type_that_this_version_does_not_know_is_shown_by_its_number() -> None:
    types = ElementTypes(2, required=True)
    with pytest.raises(LLMException, match="data_type number 999, which") as error:
        types.check_pull(_view(), _entry(999), _own(2))
    assert error.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


def test_a_peer_cannot_fill_log_or_memory_with_types(caplog: pytest.LogCaptureFixture) -> None:
    types = ElementTypes(2, required=False)
    for number in range(1000, 2000):
        types.check_pull(_view(), _entry(number), _own(2))
    assert len(caplog.records) == 1
    for number in range(2 * MAX_WARNED):
        types.check_pull(_view(str(number)), _entry(1), _own(2))
        assert len(types._warned) <= MAX_WARNED


@pytest.mark.parametrize("value", ["yes", "", "2", "true"])
def test_the_option_is_checked(value: str) -> None:
    engine = LLMDataDist(LLMRole.MIX, 1)
    with pytest.raises(LLMException, match=r"datadist\.check_types") as error:
        engine.init({"llm.EnableCacheManager": "1", "datadist.check_types": value})
    assert error.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
