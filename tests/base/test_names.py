"""Misspelt members of enumerations and attributes of objects: refused, with what was meant."""

from __future__ import annotations

import copy
import pickle
from enum import Enum
from typing import Any

import pytest

import datadist
from datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LLMClusterInfo,
    LLMConfig,
    LLMRole,
    LLMStatusCode,
    MemInfo,
    Memtype,
    Placement,
    RegisterMemStatus,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from datadist.base.names import member_for

ENUMS: list[Any] = [DataType, LLMRole, LLMStatusCode, Memtype, Placement, RegisterMemStatus]
MEANT: list[tuple[Any, str, str]] = [
    (DataType, "DT_FLOAT32", "DT_FLOAT"),
    (DataType, "DT_HALF", "DT_FLOAT16"),
    (DataType, "DT_FP16", "DT_FLOAT16"),
    (DataType, "float16", "DT_FLOAT16"),
    (DataType, "DT_BFLOAT16", "DT_BF16"),
    (DataType, "BF16", "DT_BF16"),
    (DataType, "DT_FLOAT64", "DT_DOUBLE"),
    (DataType, "DT_UNIT8", "DT_UINT8"),
    (DataType, "dt_int64", "DT_INT64"),
    (LLMRole, "PREFILL", "PROMPT"),
    (LLMRole, "DECODE", "DECODER"),
    (LLMRole, "Prompt", "PROMPT"),
    (Placement, "NPU", "DEVICE"),
    (Placement, "CPU", "HOST"),
    (Placement, "DEVCE", "DEVICE"),
    (Memtype, "DEVICE", "MEM_TYPE_DEVICE"),
    (Memtype, "MEM_TYPE_CPU", "MEM_TYPE_HOST"),
    (RegisterMemStatus, "READY", "OK"),
    (RegisterMemStatus, "FAIL", "FAILED"),
    (LLMStatusCode, "SUCCESS", "LLM_SUCCESS"),
    (LLMStatusCode, "LLM_TIME_OUT", "LLM_TIMEOUT"),
    (LLMStatusCode, "LLM_SEQ_LEN_OVER_LIMIT", "LLM_SEQ_LENOVERLIMIT"),
    (LLMStatusCode, "LLM_PARAM_INVALD", "LLM_PARAM_INVALID"),
]


@pytest.mark.parametrize(("kind", "name", "meant"), MEANT)
def test_a_member_that_does_not_exist_names_the_one_that_was_meant(
    kind: Any, name: str, meant: str
) -> None:
    with pytest.raises(AttributeError) as caught:
        getattr(kind, name)
    said = f"{kind.__name__} has no member {name!r}: did you mean {kind.__name__}.{meant}?"
    assert str(caught.value) == said
    with pytest.raises(KeyError):
        kind[name]


@pytest.mark.parametrize("name", ["DT_INT4", "DT_FLOAT8_E4M3FN_X", "DT_UINT24"])
def test_no_type_of_another_width_is_suggested(name: str) -> None:
    with pytest.raises(AttributeError, match="it has DT_FLOAT, DT_FLOAT16") as caught:
        getattr(DataType, name)
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("kind", ENUMS)
def test_enumerations_are_as_before(kind: Any) -> None:
    assert isinstance(kind, type)
    assert issubclass(kind, Enum)
    assert not hasattr(kind, "NOTHING_LIKE_IT")
    assert not hasattr(kind, "__wrapped__")
    assert [kind[member.name] for member in kind] == list(kind)
    for member in kind:
        assert getattr(kind, member.name) is member
        assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member
        assert kind(member.value) is member
    assert "NOTHING" not in kind.__members__


def test_values_of_other_libraries_name_a_member() -> None:
    import numpy as np

    for value in (np.float16, np.dtype("float16"), "float16", "fp16", DataType.DT_FLOAT16.value):
        assert member_for(DataType, value) == "DataType.DT_FLOAT16"
    assert member_for(DataType, np.dtype(">f4")) == "DataType.DT_FLOAT"
    assert member_for(DataType, np.bool_) == "DataType.DT_BOOL"
    assert member_for(DataType, np.complex128) is None
    assert member_for(Placement, Memtype.MEM_TYPE_DEVICE) is None
    assert member_for(Placement, "npu") == "Placement.DEVICE"
    assert member_for(Placement, 0) == "Placement.HOST"
    assert member_for(Placement, True) is None
    assert member_for(LLMRole, [1]) is None


def test_types_of_torch_name_a_member() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    names = {
        torch.float16: "DT_FLOAT16", torch.bfloat16: "DT_BF16", torch.float32: "DT_FLOAT",
        torch.float64: "DT_DOUBLE", torch.int8: "DT_INT8", torch.uint8: "DT_UINT8",
        torch.int16: "DT_INT16", torch.int32: "DT_INT32", torch.int64: "DT_INT64",
        torch.bool: "DT_BOOL",
    }  # fmt: skip
    for dtype, name in names.items():
        assert member_for(DataType, dtype) == f"DataType.{name}"


# -- attributes ----------------------------------------------------------------------------------

KEYS = (CacheKey, BlocksCacheKey, CacheKeyByIdAndIndex)
"""Read in every small pull."""
OBJECTS: list[tuple[Any, str, str]] = [
    (LLMConfig(), "mem_pool_config", "mem_pool_cfg"),
    (LLMConfig(), "sync_kv_time_out", "sync_kv_timeout"),
    (LLMConfig(), "enable_cachemanager", "enable_cache_manager"),
    (LLMClusterInfo(), "remote_id", "remote_cluster_id"),
    (LLMClusterInfo(), "remote_role", "remote_role_type"),
    (TransferConfig(1, [1, 2]), "dst_addr", "dst_addrs"),
    (TransferConfig(1, [1, 2]), "src_layer_rang", "src_layer_range"),
    (TransferWithCacheKeyConfig(BlocksCacheKey(1), range(1), range(1)), "cachekey", "cache_key"),
    (CacheDesc(1, [2], DataType.DT_INT8), "num_tensor", "num_tensors"),
    (CacheKey(1, 2), "request_id", "req_id"),
    (BlocksCacheKey(1), "modelid", "model_id"),
    (CacheKeyByIdAndIndex(1, 2), "batch_idx", "batch_index"),
    (MemInfo(Memtype.MEM_TYPE_HOST, 1, 2), "mem_typ", "mem_type"),
]


@pytest.mark.parametrize(("thing", "name", "meant"), OBJECTS)
def test_a_misspelt_attribute_is_refused(thing: Any, name: str, meant: str) -> None:
    said = f"{type(thing).__name__} has no attribute {name!r}: did you mean {meant!r}?"
    with pytest.raises(AttributeError) as caught:
        setattr(thing, name, 1)
    assert str(caught.value) == said
    with pytest.raises(AttributeError) as caught:
        getattr(thing, name)
    assert str(caught.value) == said or isinstance(thing, KEYS)  # Python's own text there
    assert name not in vars(thing)
    assert not hasattr(thing, name)


@pytest.mark.parametrize("thing", [thing for thing, _, _ in OBJECTS])
def test_objects_are_copied_pickled_and_marked_as_before(thing: Any) -> None:
    for same in (copy.copy(thing), copy.deepcopy(thing), pickle.loads(pickle.dumps(thing))):
        assert repr(same) == repr(thing)
    same = copy.copy(thing)
    same._mark = 1
    assert same._mark == 1


def test_nothing_alike_suggests_nothing() -> None:
    with pytest.raises(AttributeError, match=r"^LLMConfig has no attribute 'zzz'$"):
        LLMConfig().zzz = 1  # type: ignore[attr-defined]


def test_derived_classes_have_attributes_of_their_own() -> None:
    class Mine(datadist.LlmConfig):
        limit: int = 3

        def __init__(self) -> None:
            super().__init__()
            self.mem_pool_config = "mine"

    config = Mine()
    config.other = 5  # type: ignore[attr-defined]
    config.device_id = 2
    assert (config.mem_pool_config, config.limit, config.device_id) == ("mine", 3, 2)
    assert config.generate_options()["ge.exec.deviceId"] == "2"
    with pytest.raises(AttributeError, match="Mine has no attribute 'mem_pool_cfgs'"):
        _ = config.mem_pool_cfgs  # type: ignore[attr-defined]


def test_methods_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LLMConfig()
    monkeypatch.setattr(config, "generate_options", dict)
    assert config.generate_options() == {}
