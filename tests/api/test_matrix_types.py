"""Every check of the helper classes, in the documented order (LLM-DataDist API, classes).

Keys, and what each class does with good values, are in test_types.py; the configuration is in
test_config.py.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest

from datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    CacheTask,
    DataType,
    KvCache,
    LayerSynchronizer,
    LLMClusterInfo,
    LLMConfig,
    LLMStatusCode,
    MemInfo,
    Memtype,
    Placement,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from datadist.transfers.layerwise import LayerJob
from tests.matrix import Check, Table, cases, verify

PI = LLMStatusCode.LLM_PARAM_INVALID
HOST = CacheDesc(2, [2, 4], DataType.DT_INT8, Placement.HOST)
DEVICE = CacheDesc(2, [2, 4], DataType.DT_INT8)
BY_ID = CacheKeyByIdAndIndex(2, 1)


def _ranges(name: str) -> tuple[Check, ...]:
    return (
        Check(TypeError, f"{name} is a list", {name: [0]}),
        Check(PI, "step must be 1", {name: range(-2, 2, 2)}),
        Check(PI, "start at 0 or above", {name: range(-1, 1)}),
        Check(PI, "not be empty", {name: range(1, 1)}),
    )


SLOT = (
    Check(TypeError, "src_batch_index is a NoneType", {"src_batch_index": None}),
    Check(ValueError, "src_batch_index", {"src_batch_index": -1}),
    Check(ValueError, "src_batch_index", {"src_batch_index": 1 << 32}),
)


def _cpu_cache(addrs: tuple[Check, ...]) -> tuple[Check, ...]:
    return (
        Check(TypeError, "cache_desc is a int", {"cache_desc": 1}),
        *addrs,
        Check(AttributeError, "placement", {"cache_desc": None}),
        Check(PI, "needs placement HOST", {"cache_desc": DEVICE}),
        Check(PI, "as many addresses", {"addrs": [4096]}),
    )


ADDRS = (
    Check(TypeError, "addrs is a NoneType", {"addrs": None}),
    Check(TypeError, "addrs is a tuple", {"addrs": (1, 2)}),
    Check(TypeError, r"addrs\[1\] is a str", {"addrs": [1, "2"]}),
)


def _append(end: str) -> Table:
    return Table(
        f"LLMClusterInfo.append_{end}_ip_info",
        {"ip": "127.0.0.1", "port": 1},
        (
            Check(TypeError, "ip is a float", {"ip": 1.0}),
            Check(TypeError, "port is a NoneType", {"port": None}),
            Check(ValueError, "port is 65536", {"port": 65536}),
            Check(RuntimeError, "not an IPv4 address", {"ip": "::1"}),
        ),
        target=getattr(LLMClusterInfo(), f"append_{end}_ip_info"),
    )


def _setter(kind: Any, make: Any, name: str, checks: tuple[Check, ...]) -> Table:
    """The same checks when a property is set."""
    return Table(
        f"{kind.__name__}.{name}",
        {},
        tuple(Check(c.raises, c.text, {name: c.broken[name]}) for c in checks),
        target=lambda **given: setattr(make(), name, given[name]),
    )


def _transfer() -> TransferConfig:
    return TransferConfig(2, [4, 8], range(1))


def _keyed() -> TransferWithCacheKeyConfig:
    return TransferWithCacheKeyConfig(BY_ID, range(1), range(1))


CLUSTER = (
    Check(TypeError, "dst_cluster_id is a NoneType", {"dst_cluster_id": None}),
    Check(ValueError, "dst_cluster_id", {"dst_cluster_id": 1 << 64}),
)
DST_ADDRS = (
    Check(TypeError, "dst_addrs is a NoneType", {"dst_addrs": None}),
    Check(TypeError, r"dst_addrs\[0\] is a str", {"dst_addrs": ["1"]}),
    Check(ValueError, r"dst_addrs\[1\]", {"dst_addrs": [1, -1]}),
    Check(ValueError, r"dst_addrs\[0\]", {"dst_addrs": (1 << 64,)}),
)
KEY = (
    Check(TypeError, "cache_key is a NoneType", {"cache_key": None}),
    Check(TypeError, "cache_key is a CacheKey ", {"cache_key": CacheKey(2, 1)}),
)

TABLES = [
    Table(
        "CacheDesc",
        {"num_tensors": 1, "shape": [2, 3], "data_type": DataType.DT_INT8},
        (
            Check(TypeError, "num_tensors is a str", {"num_tensors": "1"}),
            Check(ValueError, "num_tensors", {"num_tensors": -1}),
            Check(TypeError, r"shape\[0\] is a float", {"shape": [2.0]}),
            Check(TypeError, "data_type is a int", {"data_type": 1}),
            Check(TypeError, "placement is a int", {"placement": 1}),
            Check(TypeError, "batch_dim_index is a str", {"batch_dim_index": "0"}),
            Check(TypeError, "seq_len_dim_index is a str", {"seq_len_dim_index": "0"}),
            Check(ValueError, "seq_len_dim_index", {"seq_len_dim_index": -(1 << 31) - 1}),
            Check(TypeError, "kv_tensor_format is a bytes", {"kv_tensor_format": b"ND"}),
            Check(TypeError, "shape is a NoneType", {"shape": None}),
            Check(TypeError, "batch_dim_index is a NoneType", {"batch_dim_index": None}),
            Check(PI, "batch_dim_index is 2", {"batch_dim_index": 2}),
            Check(PI, "batch_dim_index is -1", {"batch_dim_index": -1}),
            Check(PI, "seq_len_dim_index is 9", {"seq_len_dim_index": 9}),
            Check(ValueError, r"shape\[0\]", {"shape": [-(1 << 63) - 1, 2]}),
        ),
        target=CacheDesc,
    ),
    Table(
        "CacheKeyByIdAndIndex",
        {"cluster_id": 1, "cache_id": 1},
        (
            Check(TypeError, "cluster_id is a NoneType", {"cluster_id": None}),
            Check(ValueError, "cluster_id is -1", {"cluster_id": -1}),
            Check(TypeError, "cache_id is a str", {"cache_id": "1"}),
            Check(ValueError, "cache_id", {"cache_id": -(1 << 63) - 1}),
            Check(TypeError, "batch_index is a NoneType", {"batch_index": None}),
            Check(ValueError, "batch_index is -1", {"batch_index": -1}),
        ),
        target=CacheKeyByIdAndIndex,
    ),
    Table(
        "MemInfo",
        {"mem_type": Memtype.MEM_TYPE_DEVICE, "addr": 1, "size": 1},
        (
            Check(TypeError, "mem_type is a Placement", {"mem_type": Placement.DEVICE}),
            Check(TypeError, "addr is a str", {"addr": "1"}),
            Check(TypeError, "size is a float", {"size": 1.0}),
        ),
        target=MemInfo,
    ),
    _append("local"),
    _append("remote"),
    Table(
        "Cache.create_cpu_cache",
        {"cache_desc": HOST, "addrs": [4096, 8192]},
        _cpu_cache(ADDRS),
        target=Cache.create_cpu_cache,
    ),
    Table(
        "KvCache.create_cpu_cache",
        {"cache_desc": HOST, "addrs": [4096, 8192]},
        _cpu_cache((*ADDRS, Check(TypeError, r"addrs\[1\] is a str", {"addrs": [[1, "2"]]}))),
        target=KvCache.create_cpu_cache,
    ),
    Table(
        "TransferConfig",
        {"dst_cluster_id": 2, "dst_addrs": [4, 8]},
        (*CLUSTER, *DST_ADDRS, *_ranges("src_layer_range"), *SLOT),
        target=TransferConfig,
    ),
    _setter(TransferConfig, _transfer, "dst_cluster_id", CLUSTER),
    _setter(TransferConfig, _transfer, "dst_addrs", DST_ADDRS),
    _setter(TransferConfig, _transfer, "src_layer_range", _ranges("src_layer_range")),
    _setter(TransferConfig, _transfer, "src_batch_index", SLOT),
    Table(
        "TransferWithCacheKeyConfig",
        {"cache_key": BY_ID, "src_layer_range": range(1), "dst_layer_range": range(1)},
        (
            *KEY,
            Check(TypeError, "src_layer_range is None", {"src_layer_range": None}),
            Check(TypeError, "dst_layer_range is None", {"dst_layer_range": None}),
            *_ranges("src_layer_range"),
            *_ranges("dst_layer_range"),
            Check(
                PI,
                "differ in length",
                {"src_layer_range": range(2), "dst_layer_range": range(3)},
            ),
            *SLOT,
            Check(
                PI,
                "must be 0 with a BlocksCacheKey",
                {"cache_key": BlocksCacheKey(2), "src_batch_index": 1},
            ),
        ),
        target=TransferWithCacheKeyConfig,
    ),
    _setter(TransferWithCacheKeyConfig, _keyed, "cache_key", KEY),
    _setter(TransferWithCacheKeyConfig, _keyed, "src_layer_range", _ranges("src_layer_range")),
    _setter(TransferWithCacheKeyConfig, _keyed, "dst_layer_range", _ranges("dst_layer_range")),
    _setter(TransferWithCacheKeyConfig, _keyed, "src_batch_index", SLOT),
]


@pytest.mark.parametrize(("table", "world"), cases(TABLES))
def test_checks(table: Table, world: str) -> None:
    verify(table, world)


def test_types_of_all_devices_come_before_their_values() -> None:
    config = LLMConfig()
    with pytest.raises(TypeError, match=r"device_id\[1\] is a str"):
        config.device_id = [-1, "x"]  # type: ignore[list-item]
    with pytest.raises(RuntimeError, match="device_id is -1"):
        config.device_id = [1 << 31, -1]


# -- what good values give -----------------------------------------------------------------------


def test_cpu_caches_are_known_to_no_engine() -> None:
    cache = Cache.create_cpu_cache(HOST, [4096, 8192])
    assert (cache.cache_id, cache.is_blocks_cache) == (-1, True)
    assert cache.cache_desc is HOST
    assert cache.tensor_addrs == [4096, 8192]


@pytest.mark.parametrize(
    ("addrs", "lists"), [([1, 2], [[1, 2]]), ([[1, 2], [3, 4]], [[1, 2], [3, 4]])]
)
def test_handles_of_the_first_version_list_addresses_by_device(addrs: Any, lists: Any) -> None:
    cache = KvCache.create_cpu_cache(HOST, addrs)
    assert (cache.cache_id, cache.is_blocks_cache) == (-1, True)
    assert cache.cache_desc is HOST
    assert cache.per_device_tensor_addrs == lists


def test_configs_give_back_what_they_were_given() -> None:
    addrs = (4, 8)
    config = TransferConfig(2, addrs)
    assert config.dst_addrs is addrs
    assert (config.dst_cluster_id, config.src_layer_range, config.src_batch_index) == (2, None, 0)
    config.dst_cluster_id, config.src_layer_range, config.src_batch_index = 3, range(1, 2), 4
    assert (config.dst_cluster_id, config.src_batch_index) == (3, 4)
    assert config.src_layer_range == range(1, 2)
    config.src_layer_range = None
    keyed = TransferWithCacheKeyConfig(BY_ID, range(1), range(2, 3), 5)
    assert keyed.cache_key is BY_ID
    assert (keyed.src_layer_range, keyed.dst_layer_range) == (range(1), range(2, 3))
    assert (keyed.dst_cluster_id, keyed.src_batch_index) == (2, 5)
    keyed.cache_key = CacheKeyByIdAndIndex(9, 1)
    assert keyed.dst_cluster_id == 2  # of the key at construction, as documented


def test_a_synchronizer_must_be_written() -> None:
    with pytest.raises(TypeError, match="abstract"):
        LayerSynchronizer()  # type: ignore[abstract]


def test_timeouts_of_a_task_are_checked() -> None:
    go = threading.Event()
    job = LayerJob([], lambda _layer: go.wait(10))
    job.start()
    task = CacheTask(job)
    for method in (task.synchronize, task.get_results):
        for wrong, kind in (("1", TypeError), (-1, ValueError), (1 << 32, ValueError)):
            with pytest.raises(kind, match="timeout_in_millis"):
                method(wrong)  # type: ignore[arg-type]
    assert task.synchronize() is LLMStatusCode.LLM_SUCCESS
    assert task.get_results() == []
