"""The bindings, three ways: what the vendor documents, what ctypes makes of it, what C makes of it.

Nothing here runs on hardware: a wrong number would show nowhere else.
"""

from __future__ import annotations

import ctypes
import re
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any, ClassVar

import hccl_sim
import numpy as np
import pytest
from datadist_hccl import abi, libraries, resource
from datadist_hccl.one_sided import _config
from datadist_hccl.segments import ITEM_BYTES, items

# -- structs -----------------------------------------------------------------------------------

STRUCTS: dict[str, tuple[int, int, dict[str, tuple[int, int]]]] = {
    "MemDesc": (512, 4, {"local_rank": (0, 4), "remote_rank": (4, 4), "desc": (8, 504)}),
    "MemDescs": (16, 8, {"array": (0, 8), "length": (8, 4)}),
    "OpDesc": (32, 8, {"local": (0, 8), "remote": (8, 8), "count": (16, 8), "data_type": (24, 4)}),
    "CommMem": (24, 8, {"type": (0, 4), "address": (8, 8), "size": (16, 8)}),
    "PrepareConfig": (
        32, 8,
        {"topology": (0, 4), "reserved0": (8, 8), "reserved1": (16, 8), "reserved2": (24, 8)},
    ),
    "CommConfig": (
        304, 8,
        {
            "size": (0, 8), "magic": (8, 4), "version": (12, 4), "reserved": (16, 8),
            "buffer_size": (24, 4), "deterministic": (28, 4), "name": (32, 128), "udi": (160, 128),
            "expansion_mode": (288, 4), "traffic_class": (292, 4), "service_level": (296, 4),
        },
    ),
}  # fmt: skip
"""Size and alignment; offset and size of every field. The configuration tells the library that it has
300 bytes, where version 5 ends; what follows is padding, which nobody reads.
"""


class _Entry(ctypes.Structure):
    _fields_: ClassVar = [("name", c_char_p), ("first", c_size_t), ("second", c_size_t)]


def test_structs_have_the_documented_layout() -> None:
    for name, (size, alignment, fields) in STRUCTS.items():
        struct = getattr(abi, name)
        assert (ctypes.sizeof(struct), ctypes.alignment(struct)) == (size, alignment), name
        found = {
            f[0]: (getattr(struct, f[0]).offset, getattr(struct, f[0]).size)
            for f in struct._fields_
        }
        assert found == fields, name


def test_c_gives_structs_the_same_layout() -> None:
    wanted: dict[str, tuple[int, int]] = {}
    for name, (size, alignment, fields) in STRUCTS.items():
        wanted[name] = size, alignment
        wanted |= {f"{name}.{field}": place for field, place in fields.items()}
    library = ctypes.CDLL(str(hccl_sim.build()))
    entries = (_Entry * (len(wanted) + 1)).in_dll(library, "sim_layout")
    assert entries[len(wanted)].name is None
    found = {e.name.decode(): (e.first, e.second) for e in entries[: len(wanted)]}
    assert found == wanted


def test_the_configuration_ends_where_version_5_does() -> None:
    last = abi.CommConfig.service_level
    assert last.offset + last.size == abi.CONFIG_BYTES == 300
    config = _config("domain", None, 3)
    assert (config.size, config.magic, config.version) == (300, 0xF0F0F0F0, 5)
    assert (config.reserved, config.buffer_size, config.deterministic) == (0, 200, 0)
    assert (config.udi, config.expansion_mode) == (b"", 0)
    assert (config.name, config.traffic_class, config.service_level) == (b"domain", 0xFFFFFFFF, 3)
    assert _config("x", 0, 0).traffic_class == 0, "0 is a value, not the absence of one"


def test_the_topology_is_the_full_mesh_and_the_rest_is_0() -> None:
    assert bytes(abi.PrepareConfig()) == bytes(32)


def test_items_of_a_batch_are_what_the_struct_says() -> None:
    numbers = np.array([2**40 + 1, 7, 2**62], np.int64)
    table = items(numbers, numbers + 1, numbers + 2)
    array = (abi.OpDesc * 3).from_buffer(table)
    assert table.strides[0] == ctypes.sizeof(abi.OpDesc) == ITEM_BYTES
    for item, number in zip(array, numbers.tolist(), strict=True):
        assert (item.local, item.remote, item.count) == (number, number + 1, number + 2)
        assert item.data_type == abi.TYPE_INT8


# -- numbers -----------------------------------------------------------------------------------

NUMBERS = {
    "BLOB_BYTES": 504, "ANY_RANK": 0xFFFFFFFF, "CONFIG_MAGIC": 0xF0F0F0F0, "CONFIG_VERSION": 5,
    "CONFIG_NOT_SET": 0xFFFFFFFF, "MEM_DEVICE": 0, "MEM_HOST": 1, "TYPE_INT8": 0, "MAX_BATCH": 256,
    "MALLOC_HUGE_ONLY": 1, "HOST_TO_HOST": 0, "HOST_TO_DEVICE": 1, "DEVICE_TO_HOST": 2,
    "DEVICE_TO_DEVICE": 3, "STREAM_FAST_LAUNCH": 1, "STREAM_FAST_SYNC": 2, "STREAM_THROUGH": 0,
    "ACL_SUCCESS": 0,
    "ACL_REPEAT_INITIALIZE": 100002, "ACL_NO_CONTEXT": 107002, "ACL_STREAM_ABORT": 107023,
    "ACL_STREAM_TIMEOUT": 507046, "HCCL_SUCCESS": 0, "HCCL_PARA": 1, "HCCL_PTR": 2,
    "HCCL_INTERNAL": 4, "HCCL_NOT_SUPPORT": 5, "HCCL_NOT_FOUND": 6, "HCCL_UNAVAIL": 7,
    "HCCL_TIMEOUT": 9, "HCCL_RUNTIME": 15, "HCCL_AGAIN": 20,
    "ACL_INVALID": 107000, "ACL_OTHER_CONTEXT": 107003, "CONFIG_BYTES": 300, "BUFFER_MIB": 200,
}  # fmt: skip
RESULTS = {
    0: "SUCCESS", 1: "PARA", 2: "PTR", 3: "MEMORY", 4: "INTERNAL", 5: "NOT_SUPPORT", 6: "NOT_FOUND",
    7: "UNAVAIL", 8: "SYSCALL", 9: "TIMEOUT", 10: "OPEN_FILE_FAILURE", 11: "TCP_CONNECT",
    12: "ROCE_CONNECT", 13: "TCP_TRANSFER", 14: "ROCE_TRANSFER", 15: "RUNTIME", 16: "DRV",
    17: "PROFILING", 18: "CCE", 19: "NETWORK", 20: "AGAIN", 21: "REMOTE", 22: "SUSPENDING",
    23: "OPRETRY_FAIL", 24: "OOM", 1041: "IN_STATUS", 1042: "RESERVED",
}  # fmt: skip
RUNTIME_CODES = {
    100000, 100001, 100002, 100037, 107000, 107001, 107002, 107003, 107008, 107016, 107017, 107018,
    107019, 107020, 107022, 107023, 200000, 207000, 207001, 207002, 207004, 207008, 207018, 207020,
    507000, 507010, 507013, 507046, 507047, 507053, 507056, 507057, 507899, 507901, 507904,
}  # fmt: skip


def test_every_number_is_the_documented_one() -> None:
    mine = {k: v for k, v in vars(abi).items() if k.isupper() and type(v) is int}
    assert mine == NUMBERS
    assert abi.HCCL_NAMES == RESULTS
    assert set(abi.ACL_NAMES) == RUNTIME_CODES
    assert sorted(abi.ACL_OUT_OF_MEMORY) == [207001, 207018]
    assert sorted(abi.ACL_PEER_SUSPECT) == [507056, 507057, 507901, 507904]
    assert (resource.SUPER_DEVICE_ID, resource.SUPER_POD_ID) == (403, 405)


# -- functions ---------------------------------------------------------------------------------

OUT = POINTER(c_void_p)
SIGNATURES: dict[str, list[Any]] = {
    "aclInit": [c_char_p],
    "aclrtGetDeviceCount": [POINTER(c_uint32)],
    "aclrtSetDevice": [c_int32],
    "aclrtResetDevice": [c_int32],
    "aclrtGetPhyDevIdByLogicDevId": [c_int32, POINTER(c_int32)],
    "aclrtGetDeviceInfo": [c_uint32, c_int32, POINTER(c_int64)],
    "aclrtCreateContext": [OUT, c_int32],
    "aclrtDestroyContext": [c_void_p],
    "aclrtSetCurrentContext": [c_void_p],
    "aclrtGetCurrentContext": [OUT],
    "aclrtCreateStreamWithConfig": [OUT, c_uint32, c_uint32],
    "aclrtDestroyStream": [c_void_p],
    "aclrtStreamAbort": [c_void_p],
    "aclrtStreamQuery": [c_void_p, POINTER(c_int32)],
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
    "HcclRemapRegistedMemory": [OUT, POINTER(abi.CommMem), c_uint64, c_uint64],
}  # fmt: skip
TEXTS = {"aclGetRecentErrMsg": [], "aclrtGetSocName": [], "HcclGetErrorString": [c_int32]}


def test_every_function_is_declared_with_its_documented_types() -> None:
    declared = abi.ACL | abi.HCCL
    assert {name: list(types) for name, (_, types) in declared.items()} == SIGNATURES | TEXTS
    for name, (result, _) in declared.items():
        assert result is (c_char_p if name in TEXTS else c_int32), name


def test_every_function_is_bound_as_declared_and_releases_the_gil(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(libraries.OVERRIDE, str(hccl_sim.build()))
    vendor, holds_the_gil = libraries.load(), 4  # FUNCFLAG_PYTHONAPI
    assert set(vendor.functions) == set(SIGNATURES | TEXTS)
    for name, types in (SIGNATURES | TEXTS).items():
        function: Any = vendor[name]
        assert list(function.argtypes) == types, name
        assert function.restype is (c_char_p if name in TEXTS else c_int32), name
        assert not type(function)._flags_ & holds_the_gil, name


WIDTHS = {
    "int32_t": (4, True), "uint32_t": (4, False), "int64_t": (8, True), "uint64_t": (8, False),
    "size_t": (8, False),
}  # fmt: skip


def _of_c(declaration: str) -> tuple[int, bool] | str:
    """Width and sign of a number, or "pointer"."""
    if "*" in declaration:
        return "pointer"
    return next(width for name, width in WIDTHS.items() if re.search(rf"\b{name}\b", declaration))


def _of_ctypes(kind: Any) -> tuple[int, bool] | str:
    if kind in (c_void_p, c_char_p) or hasattr(kind, "contents"):
        return "pointer"
    return ctypes.sizeof(kind), kind(-1).value < 0


def test_c_declares_every_function_with_the_same_types() -> None:
    source = "".join(path.read_text() for path in sorted(hccl_sim.CSRC.glob("*.c")))
    exported = re.findall(r"^EXPORT ([^(;={]*?)(\w+)\(([^)]*)\)\s*\{", source, re.MULTILINE)
    found = {name: (result, arguments) for result, name, arguments in exported}
    for name, (result, types) in (abi.ACL | abi.HCCL).items():
        given, arguments = found[name]
        assert _of_c(given) == _of_ctypes(result), name
        listed = [a for a in arguments.split(",") if a.strip() != "void"] if arguments else []
        assert [_of_c(a) for a in listed] == [_of_ctypes(t) for t in types], name
