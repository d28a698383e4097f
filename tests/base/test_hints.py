"""What texts say of values of other types: what to write instead."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datadist import (
    Cache,
    CacheDesc,
    CacheKey,
    DataType,
    KvCache,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    MemInfo,
    Memtype,
    Placement,
    TransferConfig,
)
from datadist.api.allocation import _check_memory
from datadist.base.checks import check_blocks, check_list_of_blocks
from datadist.base.hints import for_json_text

DESC = CacheDesc(1, [2, 4], DataType.DT_FLOAT16, Placement.HOST)
Call = Callable[[Any], Any]


ADDRESSES: list[tuple[str, Call]] = [
    ("cpu cache", lambda value: Cache.create_cpu_cache(DESC, value)),
    ("kv cache", lambda value: KvCache.create_cpu_cache(DESC, value)),
    ("config", lambda value: TransferConfig(1, value)),
]


class Tensor:
    """Looks like a tensor of torch."""

    shape = (2, 4)
    dtype = "torch.float16"

    def data_ptr(self) -> int:
        raise NotImplementedError

    def tolist(self) -> list[int]:
        raise NotImplementedError

    def __repr__(self) -> str:
        raise AssertionError("it may be large")


def text_of(call: Call, value: Any, kind: type[Exception] = TypeError) -> str:
    with pytest.raises(kind) as caught:
        call(value)
    return str(caught.value)


@pytest.mark.parametrize("call", [call for _, call in ADDRESSES], ids=[n for n, _ in ADDRESSES])
def test_what_is_no_address_says_how_to_get_it(call: Call) -> None:
    said = text_of(call, [Tensor()])
    assert "Tensor (shape [2, 4], torch.float16)" in said
    assert said.endswith(": give tensor.data_ptr()")
    assert text_of(call, Tensor()).endswith("give [tensor.data_ptr(), ...], one address per tensor")
    assert text_of(call, [np.zeros(3)]).endswith(": give array.ctypes.data")
    assert text_of(call, np.zeros(3)).endswith("[array.ctypes.data, ...], one address per tensor")
    assert text_of(call, [np.uint64(4096)]).endswith(": give int(...) of it")
    assert "frombuffer" in text_of(call, [bytearray(4)])
    assert "ctypes.addressof" in text_of(call, [(ctypes.c_char * 4)()])


def test_a_tuple_of_addresses_is_to_be_a_list() -> None:
    assert text_of(lambda v: _check_memory(DESC, v), (1, 2)).endswith("give list(...) of it")


def test_an_address_in_a_description_of_memory() -> None:
    said = text_of(lambda value: MemInfo(Memtype.MEM_TYPE_HOST, value, 1), Tensor())
    assert said.endswith(": give tensor.data_ptr()")


INDICES: list[tuple[str, Call]] = [
    ("blocks", lambda value: check_blocks("src_blocks", value)),
    ("blocks of a copy", lambda value: check_list_of_blocks("blocks", value)),
    ("shape", lambda value: CacheDesc(1, value, DataType.DT_INT8)),
    ("key", lambda value: CacheKey(1, value)),
    ("devices", lambda value: setattr(LLMConfig(), "device_id", value)),
]


@pytest.mark.parametrize("call", [call for _, call in INDICES], ids=[n for n, _ in INDICES])
def test_what_is_no_index_says_how_to_make_one(call: Call) -> None:
    assert "tensor.tolist()" in text_of(call, Tensor())
    if call is not INDICES[3][1]:
        assert "tensor.tolist()" in text_of(call, [Tensor()])
        assert text_of(call, [np.zeros(3)]).endswith(": give array.tolist()")


def test_tensors_of_torch_say_the_same() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for _, call in ADDRESSES:
        said = text_of(call, [torch.zeros([2, 4], dtype=torch.float16)])
        assert said.endswith("is a Tensor (shape [2, 4], torch.float16), only support int: "
                             "give tensor.data_ptr()")  # fmt: skip
    for _, call in INDICES:
        assert "tensor.tolist()" in text_of(call, torch.arange(3))
    assert "tensor.tolist()" in text_of(INDICES[0][1], [torch.tensor(1.0)])
    check_blocks("src_blocks", [torch.tensor(1)])  # an integer to Python


@pytest.mark.parametrize(
    ("value", "member"),
    [("float16", "DT_FLOAT16"), (np.float32, "DT_FLOAT"), (np.dtype("i1"), "DT_INT8"), (27, "DT_BF16")],
)  # fmt: skip
def test_a_type_of_another_library_names_ours(value: Any, member: str) -> None:
    said = text_of(lambda value: CacheDesc(1, [2], value), value)
    assert said.endswith(f"only support DataType: give DataType.{member}")


def test_types_of_torch_name_ours() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    said = text_of(lambda value: CacheDesc(1, [2], value), torch.float16)
    assert said.endswith(
        "is a dtype (torch.float16), only support DataType: give DataType.DT_FLOAT16"
    )


def test_members_are_named_for_numbers_and_names() -> None:
    placed = lambda value: CacheDesc(1, [2], DataType.DT_INT8, value)  # noqa: E731
    assert text_of(placed, 1).endswith("give Placement.DEVICE")
    assert text_of(placed, "npu").endswith("give Placement.DEVICE")
    assert text_of(placed, "x").endswith("only support Placement")
    role: Call = lambda value: LLMDataDist(value, 1)  # noqa: E731
    assert text_of(role, "prefill").endswith("give LLMRole.PROMPT")
    assert text_of(role, 2).endswith("give LLMRole.DECODER")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("enable_cache_manager", 1, "give True"),
        ("enable_cache_manager", "false", "give False"),
        ("link_total_time", "60", "give int(...) of it"),
        ("link_retry_count", 2.0, "give int(...) of it"),
        ("mem_pool_cfg", {"memory_size": 1}, "give text, json.dumps(...) of it"),
        ("host_mem_pool_cfg", Path("pool.json"), "open(path).read()"),
        ("local_comm_res", b"{}", "give text, .decode() of it"),
        ("cluster_info", [], "give text, json.dumps(...) of it"),
    ],
)
def test_properties_of_the_configuration(name: str, value: Any, said: str) -> None:
    text = text_of(lambda value: setattr(LLMConfig(), name, value), value)
    assert text.startswith(f"{name} is a ")
    assert text.endswith(said)


def test_text_that_is_no_json() -> None:
    assert "empty" in for_json_text(" \n")
    assert "double quotes" in for_json_text("{'memory_size': 1}")
    assert "open(path).read()" in for_json_text("/no/such/ranks")
    assert "open(path).read()" in for_json_text("ranks.json")
    assert for_json_text('{"a": "/x"') == ""
    assert for_json_text("1GB") == ""
    assert for_json_text("a\0b") == ""
    assert for_json_text(json.dumps({"a": 1})) == ""


def test_no_other_library_is_loaded_for_a_text() -> None:
    code = (
        "import sys, datadist\n"
        "try: datadist.CacheDesc(1, [1], 'torch.float16')\n"
        "except TypeError as error: assert 'DT_FLOAT16' in str(error)\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_role_of_none_is_as_before() -> None:
    LLMDataDist(None, 1)  # type: ignore[arg-type]
    LLMDataDist(LLMRole.MIX, 1)
