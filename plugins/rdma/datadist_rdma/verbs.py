"""The C interface of libibverbs that this transport uses, by ctypes: structures, numbers, calls.

Layouts are those of ``<infiniband/verbs.h>``, which are frozen since libibverbs 1.0. Control calls are
exported functions. Those of the data path are inline functions in the header that go through a
table of pointers in ``ibv_context``; :class:`Library` takes them from there.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from ctypes import POINTER, Structure, Union, c_char_p, c_int, c_size_t, c_void_p
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64
from typing import Any

LIBRARY = "libibverbs.so.1"

# enum ibv_access_flags
LOCAL_WRITE, REMOTE_WRITE, REMOTE_READ = 1, 2, 4
# enum ibv_qp_state
QPS_INIT, QPS_RTR, QPS_RTS, QPS_ERR = 1, 2, 3, 6
QPT_RC = 2
# enum ibv_wr_opcode, enum ibv_send_flags
WR_RDMA_WRITE, WR_RDMA_READ = 0, 4
SEND_SIGNALED = 2
# enum ibv_port_state
PORT_ACTIVE = 4

# enum ibv_qp_attr_mask
QP_STATE = 1 << 0
QP_ACCESS_FLAGS = 1 << 3
QP_PKEY_INDEX = 1 << 4
QP_PORT = 1 << 5
QP_AV = 1 << 7
QP_PATH_MTU = 1 << 8
QP_TIMEOUT = 1 << 9
QP_RETRY_CNT = 1 << 10
QP_RNR_RETRY = 1 << 11
QP_RQ_PSN = 1 << 12
QP_MAX_QP_RD_ATOMIC = 1 << 13
QP_MIN_RNR_TIMER = 1 << 15
QP_SQ_PSN = 1 << 16
QP_MAX_DEST_RD_ATOMIC = 1 << 17
QP_DEST_QPN = 1 << 20

INIT_MASK = QP_STATE | QP_PKEY_INDEX | QP_PORT | QP_ACCESS_FLAGS
RTR_MASK = (
    QP_STATE | QP_AV | QP_PATH_MTU | QP_DEST_QPN | QP_RQ_PSN | QP_MAX_DEST_RD_ATOMIC
    | QP_MIN_RNR_TIMER
)  # fmt: skip
RTS_MASK = (
    QP_STATE | QP_SQ_PSN | QP_TIMEOUT | QP_RETRY_CNT | QP_RNR_RETRY | QP_MAX_QP_RD_ATOMIC
)  # fmt: skip

# enum ibv_wc_status: what can come of reads and writes over a reliable connection
WC_SUCCESS = 0
WC_WR_FLUSH_ERR = 5
WC_REM_ACCESS_ERR = 10
WC_RETRY_EXC_ERR = 12
WC_TEXTS = {
    1: "local length error",
    2: "local queue pair error (is the network interface down?)",
    4: "local protection error",
    5: "flushed after an earlier failure",
    9: "the peer refused the request",
    10: "remote access error: the peer's memory is not registered any more, or not for this access",
    11: "the peer's adapter failed",
    12: "no answer from the peer, retries used up",
    13: "the peer was not ready, retries used up",
    21: "general error",
}

EVENT_NAMES = {
    0: "completion queue error", 1: "queue pair fatal error", 2: "queue pair request error",
    3: "queue pair access error", 8: "device fatal error", 9: "port active", 10: "port error",
    11: "LID change", 12: "P_Key change", 14: "SRQ error", 18: "GID change",
}  # fmt: skip
"""enum ibv_event_type."""


class _Gid(Union):
    _fields_ = (("raw", u8 * 16), ("aligned", u64 * 2))


class GlobalRoute(Structure):
    """struct ibv_global_route; ``traffic_class`` is the type-of-service byte of the IP header."""

    _fields_ = (
        ("dgid", _Gid), ("flow_label", u32), ("sgid_index", u8), ("hop_limit", u8),
        ("traffic_class", u8),
    )  # fmt: skip


class AddressHandleAttr(Structure):
    """struct ibv_ah_attr."""

    _fields_ = (
        ("grh", GlobalRoute), ("dlid", u16), ("sl", u8), ("src_path_bits", u8),
        ("static_rate", u8), ("is_global", u8), ("port_num", u8),
    )  # fmt: skip


class _QpCap(Structure):
    _fields_ = (
        ("max_send_wr", u32), ("max_recv_wr", u32), ("max_send_sge", u32),
        ("max_recv_sge", u32), ("max_inline_data", u32),
    )  # fmt: skip


class QpInitAttr(Structure):
    """struct ibv_qp_init_attr."""

    _fields_ = (
        ("qp_context", c_void_p), ("send_cq", c_void_p), ("recv_cq", c_void_p),
        ("srq", c_void_p), ("cap", _QpCap), ("qp_type", c_int), ("sq_sig_all", c_int),
    )  # fmt: skip


class QpAttr(Structure):
    """struct ibv_qp_attr."""

    _fields_ = (
        ("qp_state", c_int), ("cur_qp_state", c_int), ("path_mtu", c_int),
        ("path_mig_state", c_int), ("qkey", u32), ("rq_psn", u32), ("sq_psn", u32),
        ("dest_qp_num", u32), ("qp_access_flags", u32), ("cap", _QpCap),
        ("ah_attr", AddressHandleAttr), ("alt_ah_attr", AddressHandleAttr),
        ("pkey_index", u16), ("alt_pkey_index", u16), ("en_sqd_async_notify", u8),
        ("sq_draining", u8), ("max_rd_atomic", u8), ("max_dest_rd_atomic", u8),
        ("min_rnr_timer", u8), ("port_num", u8), ("timeout", u8), ("retry_cnt", u8),
        ("rnr_retry", u8), ("alt_port_num", u8), ("alt_timeout", u8), ("rate_limit", u32),
    )  # fmt: skip


class QueuePair(Structure):
    """The head of struct ibv_qp; ``qp_num`` is all that we read of it."""

    _fields_ = (
        ("context", c_void_p), ("qp_context", c_void_p), ("pd", c_void_p),
        ("send_cq", c_void_p), ("recv_cq", c_void_p), ("srq", c_void_p), ("handle", u32),
        ("qp_num", u32),
    )  # fmt: skip


class MemoryRegion(Structure):
    """struct ibv_mr."""

    _fields_ = (
        ("context", c_void_p), ("pd", c_void_p), ("addr", c_void_p), ("length", c_size_t),
        ("handle", u32), ("lkey", u32), ("rkey", u32),
    )  # fmt: skip


class ScatterGather(Structure):
    """struct ibv_sge."""

    _fields_ = (("addr", u64), ("length", u32), ("lkey", u32))


class _Remote(Structure):
    _fields_ = (("remote_addr", u64), ("rkey", u32))


class SendRequest(Structure):
    """struct ibv_send_wr, with the member ``rdma`` of its union ``wr``."""

    _fields_ = (
        ("wr_id", u64), ("next", u64), ("sg_list", u64), ("num_sge", c_int), ("opcode", c_int),
        ("send_flags", u32), ("imm_data", u32), ("rdma", _Remote), ("_rest", u8 * 72),
    )  # fmt: skip


class Completion(Structure):
    """struct ibv_wc; after a failure only wr_id, status, qp_num and vendor_err are valid."""

    _fields_ = (
        ("wr_id", u64), ("status", c_int), ("opcode", c_int), ("vendor_err", u32),
        ("byte_len", u32), ("imm_data", u32), ("qp_num", u32), ("src_qp", u32),
        ("wc_flags", u32), ("pkey_index", u16), ("slid", u16), ("sl", u8),
        ("dlid_path_bits", u8),
    )  # fmt: skip


class PortAttr(Structure):
    """The head of struct ibv_port_attr, which the exported call fills."""

    _fields_ = (
        ("state", c_int), ("max_mtu", c_int), ("active_mtu", c_int), ("gid_tbl_len", c_int),
        ("port_cap_flags", u32), ("max_msg_sz", u32), ("_rest", u8 * 232),
    )  # fmt: skip


class DeviceAttr(Structure):
    """struct ibv_device_attr up to what we read; the tail is room for the rest."""

    _fields_ = (
        ("fw_ver", ctypes.c_char * 64), ("node_guid", u64), ("sys_image_guid", u64),
        ("max_mr_size", u64), ("page_size_cap", u64), ("vendor_id", u32),
        ("vendor_part_id", u32), ("hw_ver", u32), ("max_qp", c_int), ("max_qp_wr", c_int),
        ("device_cap_flags", u32), ("max_sge", c_int), ("max_sge_rd", c_int),
        ("max_cq", c_int), ("max_cqe", c_int), ("max_mr", c_int), ("max_pd", c_int),
        ("max_qp_rd_atom", c_int), ("max_ee_rd_atom", c_int), ("max_res_rd_atom", c_int),
        ("max_qp_init_rd_atom", c_int), ("_rest", u8 * 256),
    )  # fmt: skip


class AsyncEvent(Structure):
    """struct ibv_async_event."""

    _fields_ = (("element", u64), ("event_type", c_int))


class _CompletionChannel(Structure):
    _fields_ = (("context", c_void_p), ("fd", c_int), ("refcnt", c_int))


class _Context(Structure):
    """The head of struct ibv_context: its table of operations begins at offset 8."""

    _fields_ = (
        ("device", c_void_p), ("ops", c_void_p * 32), ("cmd_fd", c_int), ("async_fd", c_int),
        ("num_comp_vectors", c_int),
    )  # fmt: skip


_POLL_CQ, _REQ_NOTIFY_CQ, _POST_SEND = 11, 12, 25
"""Places in ``ibv_context.ops``."""

SIZES = {
    GlobalRoute: 24, AddressHandleAttr: 32, QpInitAttr: 64, QpAttr: 144, MemoryRegion: 48,
    ScatterGather: 16, SendRequest: 128, Completion: 48, AsyncEvent: 16,
}  # fmt: skip


class NoDevices(Exception):
    """There is no RDMA device that could be used; the text says why."""


class Library:
    """libibverbs, loaded. Its methods carry the names of the C functions without ``ibv_``.

    Raises :class:`NoDevices` where it is not installed.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(LIBRARY, use_errno=True)
        except OSError as error:
            raise NoDevices(
                f"{LIBRARY} cannot be loaded ({error}): install libibverbs and the providers of "
                "your adapter (Debian: libibverbs1 ibverbs-providers)"
            ) from None
        bind = self._bind
        self.get_device_list = bind("get_device_list", c_void_p, POINTER(c_int))
        self.free_device_list = bind("free_device_list", None, c_void_p)
        self.get_device_name = bind("get_device_name", c_char_p, c_void_p)
        self.open_device = bind("open_device", c_void_p, c_void_p)
        self.close_device = bind("close_device", c_int, c_void_p)
        self.query_device = bind("query_device", c_int, c_void_p, POINTER(DeviceAttr))
        self.query_port = bind("query_port", c_int, c_void_p, u8, POINTER(PortAttr))
        self.alloc_pd = bind("alloc_pd", c_void_p, c_void_p)
        self.dealloc_pd = bind("dealloc_pd", c_int, c_void_p)
        self.reg_mr = bind("reg_mr", POINTER(MemoryRegion), c_void_p, c_void_p, c_size_t, c_int)
        self.dereg_mr = bind("dereg_mr", c_int, POINTER(MemoryRegion))
        self.create_comp_channel = bind(
            "create_comp_channel", POINTER(_CompletionChannel), c_void_p
        )
        self.destroy_comp_channel = bind("destroy_comp_channel", c_int, POINTER(_CompletionChannel))
        self.create_cq = bind(
            "create_cq", c_void_p, c_void_p, c_int, c_void_p, POINTER(_CompletionChannel), c_int
        )
        self.destroy_cq = bind("destroy_cq", c_int, c_void_p)
        self.get_cq_event = bind(
            "get_cq_event", c_int, POINTER(_CompletionChannel), POINTER(c_void_p), POINTER(c_void_p)
        )
        self.ack_cq_events = bind("ack_cq_events", None, c_void_p, ctypes.c_uint)
        self.create_qp = bind("create_qp", POINTER(QueuePair), c_void_p, POINTER(QpInitAttr))
        self.modify_qp = bind("modify_qp", c_int, POINTER(QueuePair), POINTER(QpAttr), c_int)
        self.destroy_qp = bind("destroy_qp", c_int, POINTER(QueuePair))
        self.get_async_event = bind("get_async_event", c_int, c_void_p, POINTER(AsyncEvent))
        self.ack_async_event = bind("ack_async_event", None, POINTER(AsyncEvent))

    def _bind(self, name: str, restype: Any, *argtypes: Any) -> Callable[..., Any]:
        function = getattr(self._library, f"ibv_{name}")
        function.restype, function.argtypes = restype, argtypes
        return function  # type: ignore[no-any-return]


class DataPath:
    """The operations of the data path of one open device."""

    def __init__(self, context: int) -> None:
        ops = _Context.from_address(context).ops
        # Polling is quick and keeps the GIL; posting may enter the kernel and gives it up.
        self.poll_cq = ctypes.PYFUNCTYPE(c_int, c_void_p, c_int, c_void_p)(ops[_POLL_CQ])
        self.req_notify_cq = ctypes.CFUNCTYPE(c_int, c_void_p, c_int)(ops[_REQ_NOTIFY_CQ])
        self.post_send = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, POINTER(c_void_p))(
            ops[_POST_SEND]
        )


def async_fd(context: int) -> int:
    """The descriptor on which a device reports events."""
    return int(_Context.from_address(context).async_fd)


def last_error() -> str:
    """Name and number of the error of the last failed call that returned a null pointer."""
    return error_text(ctypes.get_errno())


def error_text(number: int) -> str:
    """Text and number of an errno."""
    return f"{os.strerror(number)} (errno {number})"
