"""The binary interface of the vendor libraries: structs, numbers and signatures, for LP64.

Sources: the public headers of CANN's runtime (``acl_rt.h``, ``acl_base_rt.h``), the exported but
undocumented one-sided services of HCCL (``hccl_one_sided_services.h``) and its communicator
configuration (``hccl_comm.h``), releases 8.5 to 9.2. Everything is declared here and nothing else
is called, so that no pointer is ever cut to 32 bits by a default type.
"""

from __future__ import annotations

import ctypes
from ctypes import (
    POINTER,
    c_char,
    c_char_p,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any

# -- structs -----------------------------------------------------------------------------------

BLOB_BYTES = 504
"""Payload of one descriptor that ranks swap."""
ANY_RANK = 0xFFFFFFFF


class MemDesc(ctypes.Structure):
    """HcclMemDesc as its users split it: ranks, then bytes of any content."""

    _fields_ = (
        ("local_rank", c_uint32),
        ("remote_rank", c_uint32),
        ("desc", c_char * BLOB_BYTES),
    )


class MemDescs(ctypes.Structure):
    """HcclMemDescs: an array of descriptors."""

    _fields_ = (("array", POINTER(MemDesc)), ("length", c_uint32))


class OpDesc(ctypes.Structure):
    """HcclOneSideOpDesc: one item of a batch. ``remote`` is the owner's virtual address."""

    _fields_ = (
        ("local", c_void_p),
        ("remote", c_void_p),
        ("count", c_uint64),
        ("data_type", c_int32),
    )


class CommMem(ctypes.Structure):
    """CommMem (HcclMem before 9.2): a range of memory and where it lies."""

    _fields_ = (("type", c_int32), ("address", c_void_p), ("size", c_uint64))


class PrepareConfig(ctypes.Structure):
    """HcclPrepareConfig: topology 0 is the full mesh, the only one."""

    _fields_ = (
        ("topology", c_int32),
        ("reserved0", c_uint64),
        ("reserved1", c_uint64),
        ("reserved2", c_uint64),
    )


class CommConfig(ctypes.Structure):
    """HcclCommConfig as of version 5, which every release since reads.

    The header names its size and version; what later versions appended keeps its defaults.
    """

    _fields_ = (
        ("size", c_size_t),
        ("magic", c_uint32),
        ("version", c_uint32),
        ("reserved", c_uint64),
        ("buffer_size", c_uint32),
        ("deterministic", c_uint32),
        ("name", c_char * 128),
        ("udi", c_char * 128),
        ("expansion_mode", c_uint32),
        ("traffic_class", c_uint32),
        ("service_level", c_uint32),
    )


CONFIG_BYTES = 300
"""Size of version 5: its last field ends here, before the padding that ctypes counts."""
CONFIG_MAGIC = 0xF0F0F0F0
CONFIG_VERSION = 5
CONFIG_NOT_SET = 0xFFFFFFFF
BUFFER_MIB = 200
"""Buffer of collective operations; allocated when one runs, which is never here."""

# -- numbers -----------------------------------------------------------------------------------

MEM_DEVICE = 0
MEM_HOST = 1
TYPE_INT8 = 0
MAX_BATCH = 256
"""Items that HcclBatchPut and HcclBatchGet take."""

MALLOC_HUGE_ONLY = 1
HOST_TO_HOST, HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE = range(4)
STREAM_FAST_LAUNCH = 1
STREAM_FAST_SYNC = 2

STREAM_THROUGH = 0

ACL_SUCCESS = 0
ACL_REPEAT_INITIALIZE = 100002
ACL_INVALID = 107000
ACL_NO_CONTEXT = 107002
ACL_OTHER_CONTEXT = 107003
ACL_STREAM_ABORT = 107023
ACL_STREAM_TIMEOUT = 507046
ACL_OUT_OF_MEMORY = frozenset({207001, 207018})
ACL_PEER_SUSPECT = frozenset({507056, 507057, 507901, 507904})
"""Runtime codes that blame the link or the other end."""

ACL_NAMES = {
    100000: "invalid parameter",
    100001: "not initialised",
    100002: "initialised twice",
    100037: "finalised twice",
    107000: "invalid parameter",
    107001: "invalid device id",
    107002: "no context on this thread",
    107003: "stream of another context",
    107008: "address not aligned",
    107016: "memory type",
    107017: "memory handle",
    107018: "allocation policy",
    107019: "wait timeout",
    107020: "task timeout",
    107022: "device aborted",
    107023: "stream aborted",
    200000: "bad allocation",
    207000: "feature not supported",
    207001: "memory allocation",
    207002: "memory free",
    207004: "no device",
    207008: "no stream resource",
    207018: "out of device memory",
    207020: "driver timeout",
    507000: "runtime internal error",
    507010: "heartbeat lost",
    507013: "system DMA error",
    507046: "stream synchronize timeout",
    507047: "event synchronize timeout",
    507053: "memory error",
    507056: "link error",
    507057: "suspected remote error",
    507899: "driver internal error",
    507901: "driver socket closed",
    507904: "communication retry failed",
}

HCCL_SUCCESS = 0
HCCL_PARA = 1
HCCL_PTR = 2
HCCL_INTERNAL = 4
HCCL_NOT_SUPPORT = 5
HCCL_NOT_FOUND = 6
HCCL_UNAVAIL = 7
HCCL_TIMEOUT = 9
HCCL_RUNTIME = 15
HCCL_AGAIN = 20

_NAMES = (
    "SUCCESS PARA PTR MEMORY INTERNAL NOT_SUPPORT NOT_FOUND UNAVAIL SYSCALL TIMEOUT "
    "OPEN_FILE_FAILURE TCP_CONNECT ROCE_CONNECT TCP_TRANSFER ROCE_TRANSFER RUNTIME DRV "
    "PROFILING CCE NETWORK AGAIN REMOTE SUSPENDING OPRETRY_FAIL OOM"
)
HCCL_NAMES = dict(enumerate(_NAMES.split())) | {1041: "IN_STATUS", 1042: "RESERVED"}

# -- signatures --------------------------------------------------------------------------------

Signature = tuple[Any, tuple[Any, ...]]
"""Type of the result, types of the arguments."""

_OUT = POINTER(c_void_p)
_ERROR = c_int32

ACL: dict[str, Signature] = {
    "aclInit": (_ERROR, (c_char_p,)),
    "aclGetRecentErrMsg": (c_char_p, ()),
    "aclrtGetDeviceCount": (_ERROR, (POINTER(c_uint32),)),
    "aclrtGetSocName": (c_char_p, ()),
    "aclrtSetDevice": (_ERROR, (c_int32,)),
    "aclrtResetDevice": (_ERROR, (c_int32,)),
    "aclrtGetPhyDevIdByLogicDevId": (_ERROR, (c_int32, POINTER(c_int32))),
    "aclrtGetDeviceInfo": (_ERROR, (c_uint32, c_int32, POINTER(c_int64))),
    "aclrtCreateContext": (_ERROR, (_OUT, c_int32)),
    "aclrtDestroyContext": (_ERROR, (c_void_p,)),
    "aclrtSetCurrentContext": (_ERROR, (c_void_p,)),
    "aclrtGetCurrentContext": (_ERROR, (_OUT,)),
    "aclrtCreateStreamWithConfig": (_ERROR, (_OUT, c_uint32, c_uint32)),
    "aclrtDestroyStream": (_ERROR, (c_void_p,)),
    "aclrtStreamAbort": (_ERROR, (c_void_p,)),
    "aclrtStreamQuery": (_ERROR, (c_void_p, POINTER(c_int32))),
    "aclrtSynchronizeStreamWithTimeout": (_ERROR, (c_void_p, c_int32)),
    "aclrtMalloc": (_ERROR, (_OUT, c_size_t, c_int32)),
    "aclrtFree": (_ERROR, (c_void_p,)),
    "aclrtMallocHost": (_ERROR, (_OUT, c_size_t)),
    "aclrtFreeHost": (_ERROR, (c_void_p,)),
    "aclrtMemset": (_ERROR, (c_void_p, c_size_t, c_int32, c_size_t)),
    "aclrtMemcpy": (_ERROR, (c_void_p, c_size_t, c_void_p, c_size_t, c_int32)),
}

HCCL: dict[str, Signature] = {
    "HcclCommInitClusterInfoMemConfig": (
        _ERROR,
        (c_char_p, c_uint32, POINTER(CommConfig), _OUT),
    ),
    "HcclRegisterGlobalMem": (_ERROR, (POINTER(CommMem), _OUT)),
    "HcclDeregisterGlobalMem": (_ERROR, (c_void_p,)),
    "HcclCommBindMem": (_ERROR, (c_void_p, c_void_p)),
    "HcclCommUnbindMem": (_ERROR, (c_void_p, c_void_p)),
    "HcclCommPrepare": (_ERROR, (c_void_p, POINTER(PrepareConfig), c_int32)),
    "HcclExchangeMemDesc": (
        _ERROR,
        (c_void_p, c_uint32, POINTER(MemDescs), c_int32, POINTER(MemDescs), POINTER(c_uint32)),
    ),
    "HcclBatchPut": (_ERROR, (c_void_p, c_uint32, c_void_p, c_uint32, c_void_p)),
    "HcclBatchGet": (_ERROR, (c_void_p, c_uint32, c_void_p, c_uint32, c_void_p)),
    "HcclCommDestroy": (_ERROR, (c_void_p,)),
    "HcclRemapRegistedMemory": (_ERROR, (_OUT, POINTER(CommMem), c_uint64, c_uint64)),
    "HcclGetErrorString": (c_char_p, (_ERROR,)),
}
"""The arrays of the batch calls are passed as plain addresses of :class:`OpDesc` items. "Registed"
is how the library spells it."""
