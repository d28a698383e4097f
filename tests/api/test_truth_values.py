"""True and False are no integers: every argument and property that is one refuses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    KvCache,
    LayerSynchronizer,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    MemInfo,
    Memtype,
    Placement,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from tests.nodes import table_for

INT32 = DataType.DT_INT32
HOST = CacheDesc(2, [2, 16], INT32, Placement.HOST)
BY_ID, MODEL = CacheKeyByIdAndIndex(2, 1), BlocksCacheKey(2)

VALUES: list[tuple[Callable[..., object], dict[str, Any]]] = [
    (LLMDataDist, {"role": LLMRole.MIX, "cluster_id": 1}),
    (
        CacheDesc,
        {
            "num_tensors": 1, "shape": [1, 2], "data_type": INT32, "batch_dim_index": 0,
            "seq_len_dim_index": 1,
        },
    ),
    (lambda **k: CacheDesc(1, [1, 2], INT32).update_dim(*k.values()), {"index": 0, "value": 1}),
    (CacheKey, {"cluster_id": 1, "req_id": 1, "model_id": 1, "prefix_id": 1}),
    (CacheKey, {"prompt_cluster_id": 1, "req_id": 1}),
    (BlocksCacheKey, {"cluster_id": 1, "model_id": 1}),
    (CacheKeyByIdAndIndex, {"cluster_id": 1, "cache_id": 1, "batch_index": 1}),
    (MemInfo, {"mem_type": Memtype.MEM_TYPE_DEVICE, "addr": 1, "size": 1}),
    (LLMClusterInfo().append_local_ip_info, {"ip": 1, "port": 1}),
    (LLMClusterInfo().append_remote_ip_info, {"ip": 1, "port": 1}),
    (Cache.create_cpu_cache, {"cache_desc": HOST, "addrs": [1, 1]}),
    (KvCache.create_cpu_cache, {"cache_desc": HOST, "addrs": [1, 1]}),
    (KvCache.create_cpu_cache, {"cache_desc": HOST, "addrs": [[1, 1]]}),
    (TransferConfig, {"dst_cluster_id": 1, "dst_addrs": [1, 1], "src_batch_index": 1}),
    (
        TransferWithCacheKeyConfig,
        {
            "cache_key": BY_ID, "src_layer_range": range(1), "dst_layer_range": range(1),
            "src_batch_index": 1,
        },
    ),
]  # fmt: skip
PROPERTIES: list[tuple[type, str, Any]] = [
    (LLMClusterInfo, "remote_cluster_id", 1),
    (LLMClusterInfo, "remote_role_type", 1),
    *(
        (LLMConfig, name, 1)
        for name in (
            "device_id", "sync_kv_timeout", "rdma_traffic_class", "rdma_service_level", "link_total_time",
            "link_retry_count", "output_max_size",
        )
    ),
    (LLMConfig, "device_id", [1]),
    (LLMConfig, "mem_utilization", 1.0),
]  # fmt: skip


def _with_truth(value: Any) -> Iterator[Any]:
    """The value with a truth value in place of each of its integers."""
    for wrong in (True, False, np.True_):
        if type(value) in (int, float):
            yield wrong
        elif isinstance(value, (list, tuple)):
            for place, item in enumerate(value):
                for other in _with_truth(item):
                    yield type(value)([*value[:place], other, *value[place + 1 :]])
        elif isinstance(value, dict):
            for key, item in value.items():
                yield {wrong: item}
                for other in _with_truth(item):
                    yield {key: other}


def _refuses(call: Callable[..., object], good: dict[str, Any]) -> int:
    """How many calls were refused, as all must be that have a truth value for an integer."""
    count = 0
    for name, value in good.items():
        for wrong in _with_truth(value):
            with pytest.raises(TypeError, match=r"is a bool|is an array of bool"):
                call(**{**good, name: wrong})
            count += 1
    return count


@pytest.mark.parametrize(("make", "good"), VALUES)
def test_constructors_and_functions(make: Callable[..., object], good: dict[str, Any]) -> None:
    make(**good)
    assert _refuses(make, good) >= 3


@pytest.mark.parametrize(("kind", "name", "good"), PROPERTIES)
def test_properties(kind: type, name: str, good: Any) -> None:
    made = kind()
    setattr(made, name, good)
    assert _refuses(lambda value: setattr(made, name, value), {"value": good}) >= 3
    assert getattr(made, name) == good


class Never(LayerSynchronizer):
    """No layer is final."""

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int) -> bool:
        """No."""
        return False


@pytest.fixture
def engine(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLMDataDist]:
    """An engine in one-sided mode."""
    monkeypatch.setenv("DATADIST_RUNTIME_DIR", str(runtime_dir))
    with LLMDataDist(LLMRole.MIX, 1) as made:
        made.init(
            {
                "llm.EnableCacheManager": "1",
                "llm.TransferBackend": "shm",
                "llm.EnableRemoteCacheAccessible": "1",
                "llm.MemPoolConfig": '{"memory_size": 65536, "page_shift": 12}',
            }
        )
        yield made


def _calls(engine: LLMDataDist) -> Iterator[tuple[Callable[..., object], dict[str, Any]]]:
    manager, desc = engine.cache_manager, CacheDesc(2, [2, 16], INT32)
    slots, blocks = manager.allocate_cache(desc), manager.allocate_blocks_cache(desc)
    cpu = Cache.create_cpu_cache(HOST, [4096, 8192])
    keyed = [TransferWithCacheKeyConfig(MODEL, range(1), range(1))]
    info = LLMClusterInfo()
    table = table_for({1: 0, 2: 1})
    yield engine.link, {"comm_name": "a", "cluster_rank_info": {1: 0, 2: 1}, "rank_table": table}
    for method in (engine.unlink, engine.query_register_mem_status, engine.link_error):
        yield method, {"comm_id": 1}
    yield engine.wait_link, {"comm_id": 1, "timeout_in_millis": 1}
    yield engine.link_clusters, {"clusters": [info], "timeout": 1}
    yield engine.unlink_clusters, {"clusters": [info], "timeout": 1}
    yield manager.register_cache, {"cache_desc": desc, "addrs": [4096, 8192]}
    yield manager.register_blocks_cache, {"cache_desc": desc, "addrs": [4096, 8192]}
    yield manager.unregister_cache, {"cache_id": 1}
    yield manager.pull_cache, {
        "cache_key": BY_ID, "cache": slots, "batch_index": 1, "size": 1, "tensor_num_per_layer": 1,
    }  # fmt: skip
    yield manager.pull_blocks, {
        "src_cache_key": MODEL, "dst_cache": blocks, "src_blocks": [0], "dst_blocks": (1,),
        "tensor_num_per_layer": 1,
    }  # fmt: skip
    yield manager.push_cache, {
        "dst_cache_key": BY_ID, "src_cache": slots, "src_batch_index": 1, "size": -1,
        "tensor_num_per_layer": 1,
    }  # fmt: skip
    yield manager.push_blocks, {
        "dst_cache_key": MODEL, "src_cache": blocks, "src_blocks": [0, 1], "dst_blocks": [1, 0],
        "tensor_num_per_layer": 1,
    }  # fmt: skip
    yield manager.transfer_cache_async, {
        "src_cache": blocks, "layer_synchronizer": Never(), "transfer_configs": keyed,
        "src_block_indices": [0], "dst_block_indices": [1], "dst_block_memory_size": 64,
    }  # fmt: skip
    yield manager.copy_cache, {
        "dst": slots, "src": slots, "dst_batch_index": 1, "src_batch_index": 0, "offset": 0, "size": 1,
        "req_id": 1,
    }  # fmt: skip
    yield manager.copy_blocks, {"cache": blocks, "copy_block_info": {0: [1]}}
    yield manager.swap_blocks, {"src_cache": blocks, "dst_cache": cpu, "src_to_dst": {0: 1}}
    task = manager.transfer_cache_async(blocks, Never(), keyed)
    yield task.synchronize, {"timeout_in_millis": 1}
    yield task.get_results, {"timeout_in_millis": 1}


def test_methods(engine: LLMDataDist) -> None:
    for method, good in _calls(engine):
        assert _refuses(method, good) >= 3, method


def test_arrays_of_truth_values_are_no_blocks(engine: LLMDataDist) -> None:
    manager = engine.cache_manager
    blocks = manager.allocate_blocks_cache(CacheDesc(2, [2, 16], INT32))
    wrong, good = np.array([True, False]), [0, 1]
    for lists in ((wrong, good), (good, wrong)):
        for move in (manager.pull_blocks, manager.push_blocks):
            with pytest.raises(TypeError, match="array of bool"):
                move(MODEL, blocks, *lists)
    with pytest.raises(TypeError, match="array of bool"):
        manager.copy_blocks(blocks, {0: wrong})


def test_what_is_meant_to_be_a_truth_value_stays_one(engine: LLMDataDist) -> None:
    config = LLMConfig()
    config.enable_cache_manager = config.enable_remote_cache_accessible = True
    config.enable_switch_role = False
    info = LLMClusterInfo()
    info.remote_cluster_id = 2
    engine.unlink_clusters([info], 100, force=True)
