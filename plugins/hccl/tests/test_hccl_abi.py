"""The bindings against the C compiler's view of the same structs, and against the documented types."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int32, c_size_t, c_uint32, c_void_p
from typing import Any

import hccl_sim
import numpy as np
from datadist_hccl import abi
from datadist_hccl.one_sided import _config
from datadist_hccl.segments import ITEM_BYTES, items


def _layout() -> list[int]:
    numbers: Any = (ctypes.c_size_t * 22).in_dll(ctypes.CDLL(str(hccl_sim.build())), "sim_layout")
    assert numbers[21] == 0
    return list(numbers[:21])


def test_structs_have_the_layout_that_c_gives_them() -> None:
    size = ctypes.sizeof
    mine = [
        size(abi.MemDesc), abi.MemDesc.remote_rank.offset, abi.MemDesc.desc.offset,
        size(abi.MemDescs), abi.MemDescs.length.offset,
        size(abi.OpDesc), abi.OpDesc.remote.offset, abi.OpDesc.count.offset,
        abi.OpDesc.data_type.offset,
        size(abi.CommMem), abi.CommMem.address.offset, abi.CommMem.size.offset,
        size(abi.PrepareConfig), abi.PrepareConfig.reserved0.offset,
        abi.CommConfig.magic.offset, abi.CommConfig.buffer_size.offset, abi.CommConfig.name.offset,
        abi.CommConfig.udi.offset, abi.CommConfig.expansion_mode.offset,
        abi.CommConfig.traffic_class.offset, abi.CommConfig.service_level.offset,
    ]  # fmt: skip
    assert mine == _layout()


def test_structs_have_the_layout_that_the_headers_tell() -> None:
    assert ctypes.sizeof(abi.MemDesc) == 8 + abi.BLOB_BYTES == 512
    assert (ctypes.sizeof(abi.OpDesc), ctypes.sizeof(abi.CommMem)) == (32, 24)
    assert (ctypes.sizeof(abi.MemDescs), ctypes.sizeof(abi.PrepareConfig)) == (16, 32)
    last = abi.CommConfig.service_level
    assert last.offset + last.size == abi.CONFIG_BYTES == 300
    assert abi.CommConfig.name.offset == 32


def test_the_configuration_leaves_to_the_environment_what_is_not_set() -> None:
    config = _config("domain", None, 3)
    assert (config.size, config.magic, config.version) == (300, 0xF0F0F0F0, 5)
    assert (config.name, config.traffic_class, config.service_level) == (b"domain", 0xFFFFFFFF, 3)


def test_items_of_a_batch_are_what_the_struct_says() -> None:
    numbers = np.array([2**40 + 1, 7, 2**62], np.int64)
    table = items(numbers, numbers + 1, numbers + 2)
    array = (abi.OpDesc * 3).from_buffer(table)
    assert table.strides[0] == ctypes.sizeof(abi.OpDesc) == ITEM_BYTES
    for item, number in zip(array, numbers.tolist(), strict=True):
        assert (item.local, item.remote, item.count) == (number, number + 1, number + 2)
        assert item.data_type == abi.TYPE_INT8


OUT = POINTER(c_void_p)
SIGNATURES: dict[str, list[Any]] = {
    "aclInit": [c_char_p],
    "aclrtGetDeviceCount": [POINTER(c_uint32)],
    "aclrtSetDevice": [c_int32],
    "aclrtResetDevice": [c_int32],
    "aclrtGetPhyDevIdByLogicDevId": [c_int32, POINTER(c_int32)],
    "aclrtGetDeviceInfo": [c_uint32, c_int32, POINTER(ctypes.c_int64)],
    "aclrtCreateContext": [OUT, c_int32],
    "aclrtDestroyContext": [c_void_p],
    "aclrtSetCurrentContext": [c_void_p],
    "aclrtGetCurrentContext": [OUT],
    "aclrtCreateStreamWithConfig": [OUT, c_uint32, c_uint32],
    "aclrtDestroyStream": [c_void_p],
    "aclrtStreamAbort": [c_void_p],
    "aclrtSynchronizeStreamWithTimeout": [c_void_p, c_int32],
    "aclrtMalloc": [OUT, c_size_t, c_int32],
    "aclrtFree": [c_void_p],
    "aclrtMallocHost": [OUT, c_size_t],
    "aclrtFreeHost": [c_void_p],
    "aclrtMemset": [c_void_p, c_size_t, c_int32, c_size_t],
    "aclrtMemcpy": [c_void_p, c_size_t, c_void_p, c_size_t, c_int32],
    "HcclCommInitClusterInfoMemConfig": [c_char_p, c_uint32, POINTER(abi.CommConfig), OUT],
    "HcclRegisterGlobalMem": [POINTER(abi.CommMem), OUT],
    "HcclDeregisterGlobalMem": [c_void_p],
    "HcclCommBindMem": [c_void_p, c_void_p],
    "HcclCommUnbindMem": [c_void_p, c_void_p],
    "HcclCommPrepare": [c_void_p, POINTER(abi.PrepareConfig), c_int32],
    "HcclExchangeMemDesc": [
        c_void_p, c_uint32, POINTER(abi.MemDescs), c_int32, POINTER(abi.MemDescs), POINTER(c_uint32),
    ],
    "HcclBatchPut": [c_void_p, c_uint32, c_void_p, c_uint32, c_void_p],
    "HcclBatchGet": [c_void_p, c_uint32, c_void_p, c_uint32, c_void_p],
    "HcclCommDestroy": [c_void_p],
    "HcclRemapRegistedMemory": [
        OUT, POINTER(abi.CommMem), ctypes.c_uint64, ctypes.c_uint64,
    ],
}  # fmt: skip
TEXTS = {"aclGetRecentErrMsg": [], "aclrtGetSocName": [], "HcclGetErrorString": [c_int32]}


def test_every_function_is_bound_with_its_documented_types() -> None:
    bound = abi.ACL | abi.HCCL
    assert {name: list(types) for name, (_, types) in bound.items()} == SIGNATURES | TEXTS
    for name, (result, _) in bound.items():
        assert result is (c_char_p if name in TEXTS else c_int32), name


def test_the_simulator_has_every_function() -> None:
    library = ctypes.CDLL(str(hccl_sim.build()))
    assert [name for name in abi.ACL | abi.HCCL if not hasattr(library, name)] == []
