"""Enumerations, cache descriptions, keys, and descriptions of memory and clusters."""

from __future__ import annotations

from typing import Any

import pytest

import datadist.transport
from datadist import Cache, KvCache, TransferConfig, TransferWithCacheKeyConfig
from datadist.keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from datadist.status import LLMException, LLMStatusCode
from datadist.types import (
    INVALID_ID,
    CacheDesc,
    DataType,
    LLMClusterInfo,
    LLMRole,
    MemInfo,
    Memtype,
    Placement,
    RegisterMemStatus,
    element_size,
)

F16 = DataType.DT_FLOAT16


def refused(make: Any, *args: Any, **kwargs: Any) -> str:
    """The text of the LLM_PARAM_INVALID that a call raises."""
    with pytest.raises(LLMException) as caught:
        make(*args, **kwargs)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    return str(caught.value)


# -- enumerations --------------------------------------------------------------------------------


def test_enumerations_have_the_documented_members() -> None:
    assert {role.name: int(role) for role in LLMRole} == {"PROMPT": 1, "DECODER": 2, "MIX": 3}
    assert str(LLMRole.MIX) == "LLMRole.MIX"
    assert [status.name for status in RegisterMemStatus] == ["OK", "PREPARING", "FAILED"]
    assert Memtype.MEM_TYPE_DEVICE.value == 0
    assert Memtype.MEM_TYPE_HOST.value == 1
    assert (Placement.HOST, Placement.DEVICE) == (0, 1)
    assert str(Placement.HOST) == "Placement.HOST"
    assert Placement is datadist.transport.Placement


def test_every_data_type_has_its_number_and_size() -> None:
    numbers = {kind.value: element_size(kind) for kind in DataType}
    assert numbers == {
        **{0: 4, 1: 2, 2: 1, 3: 4, 4: 1, 6: 2, 7: 2},
        **{8: 4, 9: 8, 10: 8, 11: 8, 12: 1, 13: 16, 27: 2},
    }
    with pytest.raises(TypeError, match="data_type"):
        element_size(None)  # type: ignore[arg-type]


# -- CacheDesc -----------------------------------------------------------------------------------


def test_a_description_gives_back_what_it_was_given() -> None:
    shape = (10, 2, 2)
    desc = CacheDesc(
        4, shape, F16, Placement.HOST, batch_dim_index=1, seq_len_dim_index=2, kv_tensor_format="ND"
    )
    assert desc.shape is shape
    assert desc.num_tensors == 4
    assert desc.data_type is F16
    assert desc.placement is Placement.HOST
    assert (desc.batch_dim, desc.batch_size, desc.seq_len_dim_index) == (1, 2, 2)
    assert desc.kv_tensor_format == "ND"
    assert desc.size == 80
    assert (
        repr(desc)
        == str(desc)
        == (
            "CacheDesc(num_tensors=4, shape=(10, 2, 2), data_type=DataType.DT_FLOAT16, "
            "placement=Placement.HOST, batch_dim_index=1, seq_len_dim_index=2,kv_tensor_format=ND)"
        )
    )


def test_a_description_has_the_documented_defaults() -> None:
    desc = CacheDesc(0, [3], F16)
    assert desc.placement is Placement.DEVICE
    assert (desc.batch_dim, desc.batch_size, desc.seq_len_dim_index) == (0, 3, -1)
    assert desc.kv_tensor_format is None


BAD_DESCRIPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_tensors": None}, TypeError, "num_tensors"),
    ({"num_tensors": 2**32}, ValueError, "num_tensors"),
    ({"shape": "23"}, TypeError, "shape"),
    ({"shape": [2, 3.0]}, TypeError, r"shape\[1\]"),
    ({"shape": None}, TypeError, "shape is a NoneType"),
    ({"data_type": 1}, TypeError, "data_type"),
    ({"placement": 1}, TypeError, "placement"),
    ({"batch_dim_index": "0"}, TypeError, "batch_dim_index"),
    ({"batch_dim_index": None}, TypeError, "batch_dim_index"),
    ({"seq_len_dim_index": None}, TypeError, "seq_len_dim_index"),
    ({"seq_len_dim_index": 2**31}, ValueError, "seq_len_dim_index"),
    ({"kv_tensor_format": 1}, TypeError, "kv_tensor_format"),
    ({"batch_dim_index": 2}, LLMException, "batch_dim_index is 2"),
    ({"batch_dim_index": -1}, LLMException, "batch_dim_index is -1"),
    ({"shape": []}, LLMException, "batch_dim_index"),
    ({"seq_len_dim_index": -2}, LLMException, "seq_len_dim_index is -2"),
    ({"seq_len_dim_index": 2}, LLMException, "seq_len_dim_index is 2"),
    ({"shape": [2, 2**63]}, ValueError, r"shape\[1\]"),
]


@pytest.mark.parametrize(("changes", "kind", "text"), BAD_DESCRIPTIONS)
def test_a_wrong_description_is_refused(
    changes: dict[str, Any], kind: type[Exception], text: str
) -> None:
    given: dict[str, Any] = {"num_tensors": 1, "shape": [2, 3], "data_type": F16}
    with pytest.raises(kind, match=text) as caught:
        CacheDesc(**{**given, **changes})
    if isinstance(caught.value, LLMException):
        assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


def test_checks_of_types_come_before_those_of_values() -> None:
    with pytest.raises(TypeError, match="kv_tensor_format"):
        CacheDesc(1, [2**63], F16, batch_dim_index=5, kv_tensor_format=1)  # type: ignore[arg-type]
    assert "batch_dim_index" in refused(CacheDesc, 1, [2**63], F16, batch_dim_index=5)


def test_none_passes_for_data_type_and_placement() -> None:
    desc = CacheDesc(1, [2], None, None)  # type: ignore[arg-type]
    assert desc.data_type is None
    assert desc.placement is None
    assert "None" in repr(desc)
    with pytest.raises(TypeError, match="data_type"):
        _ = desc.size


@pytest.mark.parametrize("shape", [[0], [2, -1], [2**31, 2**31]])
def test_a_size_that_cannot_be_has_no_status_code(shape: list[int]) -> None:
    desc = CacheDesc(1, shape, F16)
    with pytest.raises(LLMException) as caught:
        _ = desc.size
    assert caught.value.status_code is LLMStatusCode.LLM_SUCCESS


def test_updating_a_dimension_changes_the_callers_list() -> None:
    shape = [2, 3]
    desc = CacheDesc(1, shape, F16)
    assert desc.size == 12
    desc.update_dim(dim_index=0, dim_value=5)
    assert shape == [5, 3]
    assert desc.size == 30
    assert desc.batch_size == 2
    with pytest.raises(TypeError, match="tuple"):
        CacheDesc(1, (2, 3), F16).update_dim(0, 5)


# -- keys ----------------------------------------------------------------------------------------


def fields(key: CacheKey) -> tuple[int, int, int, int]:
    assert key.prompt_cluster_id == key.cluster_id
    return key.cluster_id, key.req_id, key.model_id, key.prefix_id


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((1, 2), {}, (1, 2, 0, INVALID_ID)),
        ((1, 2, 3, 4), {}, (1, 2, 3, 4)),
        ((), {"prompt_cluster_id": 1, "req_id": 2, "model_id": 3}, (1, 2, 3, INVALID_ID)),
        ((), {"cluster_id": 1, "prompt_cluster_id": 9, "req_id": 2}, (1, 2, 0, INVALID_ID)),
        ((1,), {"cluster_id": 9, "req_id": 2}, (1, 2, 0, INVALID_ID)),
        ((1,), {"prompt_cluster_id": 9, "req_id": 2}, (1, 2, 0, INVALID_ID)),
        ((INVALID_ID, 0), {"prefix_id": 5}, (INVALID_ID, 0, 0, 5)),
    ],
)
def test_cache_keys_take_positions_and_keywords(
    args: tuple[int, ...], kwargs: dict[str, int], expected: tuple[int, ...]
) -> None:
    assert fields(CacheKey(*args, **kwargs)) == expected


def test_cache_keys_are_checked_in_order() -> None:
    assert "at most 4" in refused(CacheKey, 1, 2, 3, 4, 5)
    assert "at most 4" in refused(CacheKey, 1, 2, 3, 4, nonsense=5)
    assert "cluster_id is required" in refused(CacheKey, nonsense=5)
    assert "req_id is required" in refused(CacheKey, 1, nonsense=5)
    assert "Unsupported argument 'nonsense'" in refused(CacheKey, 1, 2, nonsense=5)
    assert "Unsupported" in refused(CacheKey, "1", None, nonsense=5)
    with pytest.raises(TypeError, match="cluster_id"):
        CacheKey(None, -1)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="req_id is -1"):
        CacheKey(1, -1, None)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="prefix_id"):
        CacheKey(1, 1, 1, 2**64)


def test_blocks_cache_keys() -> None:
    key = BlocksCacheKey(prompt_cluster_id=7, model_id=3)
    assert (key.cluster_id, key.prompt_cluster_id, key.model_id) == (7, 7, 3)
    assert BlocksCacheKey(7).model_id == 0
    assert BlocksCacheKey(-1, 2**70).model_id == 2**70
    assert BlocksCacheKey(None).cluster_id is None  # type: ignore[call-overload]
    assert "at most 2" in refused(BlocksCacheKey, 1, 2, 3)
    assert "cluster_id is required" in refused(BlocksCacheKey, model_id=1)
    assert "Unsupported" in refused(BlocksCacheKey, 1, req_id=1)
    with pytest.raises(TypeError, match="model_id"):
        BlocksCacheKey(1, "1")  # type: ignore[call-overload]


def test_keys_by_id_and_index() -> None:
    key = CacheKeyByIdAndIndex(1, -2)
    assert (key.cluster_id, key.cache_id, key.batch_index) == (1, -2, 0)
    assert repr(key) == "CacheKeyByIdAndIndex(cluster_id=1, cache_id=-2, batch_index=0)"
    with pytest.raises(ValueError, match="cluster_id"):
        CacheKeyByIdAndIndex(-1, 1)
    with pytest.raises(ValueError, match="cache_id"):
        CacheKeyByIdAndIndex(1, 2**63)
    with pytest.raises(TypeError, match="batch_index"):
        CacheKeyByIdAndIndex(1, 1, None)  # type: ignore[arg-type]


def test_keys_compare_by_identity_and_show_their_fields() -> None:
    assert CacheKey(1, 2) != CacheKey(1, 2)
    assert BlocksCacheKey(1) != BlocksCacheKey(1)
    assert repr(BlocksCacheKey(1, 2)) == "BlocksCacheKey(cluster_id=1, model_id=2)"
    assert repr(BlocksCacheKey(cluster_id=1)) == "BlocksCacheKey(cluster_id=1, model_id=0)"
    by_alias = BlocksCacheKey(prompt_cluster_id=1, model_id=2)
    assert repr(by_alias) == "BlocksCacheKey(prompt_cluster_id=1, model_id=2)"
    both: dict[str, int] = {"cluster_id": 1, "prompt_cluster_id": 2}
    assert repr(BlocksCacheKey(**both)) == "BlocksCacheKey(cluster_id=1, model_id=0)"
    key = "CacheKey(cluster_id=1, req_id=2, prefix_id=4, model_id=3)"
    assert repr(CacheKey(1, 2, 3, 4)) == str(CacheKey(1, 2, 3, 4)) == key
    assert repr(CacheKey(prompt_cluster_id=1, req_id=2, model_id=3, prefix_id=4)) == key


def test_unknown_arguments_of_keys_are_told_with_the_names_that_there_are() -> None:
    said = refused(CacheKey, 1, req_ib=2, req_id=3)
    assert "Unsupported argument 'req_ib' of CacheKey (did you mean 'req_id'?): it takes" in said
    assert "it takes cluster_id, req_id, model_id, prefix_id, prompt_cluster_id" in said
    assert "did you mean 'model_id'?" in refused(BlocksCacheKey, 1, model=1)


def test_handles_and_destinations_show_their_fields() -> None:
    desc = CacheDesc(2, [1], F16, Placement.HOST)
    cache = Cache.create_cpu_cache(desc, [8, 16])
    assert (
        repr(cache)
        == str(cache)
        == ("Cache(cache_id = -1, device_tensor_addrs = 2, is_blocks_cache = True)")
    )
    old = KvCache.create_cpu_cache(desc, [[8, 16], [24, 32]])
    assert repr(old) == str(old) == "KvCache(cache_id = -1, num_devices = 2)"
    assert repr(TransferConfig(3, [4, 5], range(1))) == (
        "TransferConfig(dst_cluster_id=3, dst_addrs=[4, 5], src_layer_range=range(0, 1), "
        "src_batch_index=0)"
    )
    config = TransferWithCacheKeyConfig(BlocksCacheKey(1), range(1), range(1))
    assert repr(config) == (
        "TransferWithCacheKeyConfig(cache_key=BlocksCacheKey(cluster_id=1, model_id=0), "
        "src_layer_range=range(0, 1), dst_layer_range=range(0, 1), src_batch_index=0)"
    )


# -- memory and clusters -------------------------------------------------------------------------


def test_memory_descriptions_check_types_only() -> None:
    info = MemInfo(Memtype.MEM_TYPE_HOST, -1, 0)
    assert (info.mem_type, info.addr, info.size) == (Memtype.MEM_TYPE_HOST, -1, 0)
    assert repr(info) == str(info) == "MemInfo(mem_type=Memtype.MEM_TYPE_HOST, addr=-1, size=0)"
    with pytest.raises(TypeError, match="mem_type"):
        MemInfo(1, 1, 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="size"):
        MemInfo(Memtype.MEM_TYPE_HOST, 1, "1")  # type: ignore[arg-type]


def test_addresses_of_clusters_become_numbers() -> None:
    info = LLMClusterInfo()
    assert (info.remote_cluster_id, info.remote_role_type) == (None, None)
    info.append_local_ip_info("1.2.3.4", 0)
    info.append_remote_ip_info(2**40, 65535)
    assert info.local_ip_info_list == [(67305985, 0)]
    assert info.remote_ip_info_list == [(2**40, 65535)]


@pytest.mark.parametrize("text", ["::1", "localhost", "1.2.3.4\0", "\udc80", "300.1.1.1"])
def test_text_that_is_no_ipv4_address_is_a_plain_runtime_error(text: str) -> None:
    with pytest.raises(RuntimeError, match="is not an IPv4 address") as caught:
        LLMClusterInfo().append_local_ip_info(text, 1)
    assert not isinstance(caught.value, LLMException)


def test_members_of_clusters_are_checked() -> None:
    info = LLMClusterInfo()
    info.remote_cluster_id = 2**64 - 1
    info.remote_role_type = LLMRole.PROMPT
    info.remote_role_type = None
    with pytest.raises(TypeError, match="remote_cluster_id"):
        info.remote_cluster_id = None  # type: ignore[assignment]
    with pytest.raises(TypeError, match="remote_role_type"):
        info.remote_role_type = "1"  # type: ignore[assignment]
    with pytest.raises(TypeError, match="ip is a float"):
        info.append_local_ip_info(1.0, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="port"):
        info.append_local_ip_info("nonsense", 65536)
