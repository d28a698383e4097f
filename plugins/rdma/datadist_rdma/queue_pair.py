"""One reliable connection: a queue pair, its completion queue, and their states."""

from __future__ import annotations

import ctypes
import secrets
from dataclasses import dataclass

from datadist.transport import LinkError
from datadist_rdma import verbs
from datadist_rdma.chains import DEPTH
from datadist_rdma.device import Device
from datadist_rdma.ports import Gid

HOPS = 64
MIN_RNR_TIMER = 12
MAX_READS = 128
"""Reads in flight per connection that we ask for at most; adapters have 16 or more."""
POLL = 16


@dataclass(frozen=True)
class End:
    """One end of a connection, as its peer needs to know it."""

    number: int
    psn: int
    gid: bytes
    mtu: int
    """Enumerated: 1 to 5 for 256 to 4096 bytes."""
    reads: int
    """Reads in flight that it accepts."""


@dataclass(frozen=True)
class ConnectionSettings:
    """Settings of a connection for sending."""

    traffic_class: int
    service_level: int
    timeout: int
    retry_count: int


class QueuePair:
    """A queue pair in the state INIT; :meth:`connect` makes it ready. For one caller at a time."""

    def __init__(self, device: Device, gid: Gid, peers_may_write: bool) -> None:
        self._device = device
        self._gid = gid
        self._library = device.library
        self._token, self.notified = device.events.add()
        self._cq: int | None = None
        self._qp: ctypes._Pointer[verbs.QueuePair] | None = None
        port = device.port(gid.port)
        reads = min(MAX_READS, device.attributes.max_qp_rd_atom)
        try:
            self._create()
            self._enter_init(peers_may_write)
        except BaseException:
            self.close()
            raise
        psn = secrets.randbits(24)
        self.end = End(self._number(), psn, gid.raw, port.active_mtu, reads)
        self.max_message = port.max_msg_sz
        self._completions = (verbs.Completion * POLL)()
        self._bad = ctypes.c_void_p()

    def _create(self) -> None:
        channel = self._device.channel
        self._cq = self._library.create_cq(
            self._device.context, DEPTH + POLL, self._token, channel, 0
        )
        if not self._cq:
            raise LinkError(f"{self._device.name} gives no completion queue: {verbs.last_error()}")
        wanted = verbs.QpInitAttr(send_cq=self._cq, recv_cq=self._cq, qp_type=verbs.QPT_RC)
        wanted.cap.max_send_wr, wanted.cap.max_send_sge = DEPTH, 1
        wanted.cap.max_recv_wr, wanted.cap.max_recv_sge = 1, 1
        pair = self._library.create_qp(self._device.pd, wanted)
        if not pair:
            raise LinkError(
                f"{self._device.name} gives no queue pair with {DEPTH} work requests: "
                f"{verbs.last_error()} (datadist.rdma.queue_pairs says how many each peer gets)"
            )
        self._qp = pair

    def _number(self) -> int:
        assert self._qp is not None
        return int(self._qp.contents.qp_num)

    def _enter_init(self, peers_may_write: bool) -> None:
        access = verbs.LOCAL_WRITE | verbs.REMOTE_READ
        if peers_may_write:
            access |= verbs.REMOTE_WRITE
        attributes = verbs.QpAttr(
            qp_state=verbs.QPS_INIT, port_num=self._gid.port, qp_access_flags=access
        )
        self._modify("INIT", attributes, verbs.INIT_MASK)

    def connect(self, peer: End, settings: ConnectionSettings) -> int:
        """Connect with the peer's end, which may do so later; returns the MTU (enumerated).

        Blocks while the network finds the peer's address, about a second at most. Raises LinkError.
        """
        mtu = min(self.end.mtu, peer.mtu)
        receive = verbs.QpAttr(
            qp_state=verbs.QPS_RTR, path_mtu=mtu, dest_qp_num=peer.number, rq_psn=peer.psn,
            max_dest_rd_atomic=self.end.reads, min_rnr_timer=MIN_RNR_TIMER,
        )  # fmt: skip
        route = receive.ah_attr
        route.is_global, route.port_num, route.sl = 1, self._gid.port, settings.service_level
        route.grh.dgid.raw[:] = peer.gid
        route.grh.sgid_index, route.grh.hop_limit = self._gid.index, HOPS
        route.grh.traffic_class = settings.traffic_class
        self._modify("RTR", receive, verbs.RTR_MASK)
        reads = min(self._device.attributes.max_qp_init_rd_atom, peer.reads, MAX_READS)
        send = verbs.QpAttr(
            qp_state=verbs.QPS_RTS, sq_psn=self.end.psn, timeout=settings.timeout,
            retry_cnt=settings.retry_count, rnr_retry=settings.retry_count, max_rd_atomic=reads,
        )  # fmt: skip
        self._modify("RTS", send, verbs.RTS_MASK)
        return mtu

    def _modify(self, state: str, attributes: verbs.QpAttr, mask: int) -> None:
        error = self._library.modify_qp(self._qp, attributes, mask)
        if error:
            failure = LinkError(
                f"the queue pair of {self._gid} cannot enter {state}: {verbs.error_text(error)}"
            )
            failure.errno = error  # type: ignore[attr-defined]
            raise failure

    def fail(self) -> None:
        """Enter the error state: nothing is sent or accepted any more; posted requests are flushed."""
        if self._qp is not None:
            attributes = verbs.QpAttr(qp_state=verbs.QPS_ERR)
            self._library.modify_qp(self._qp, attributes, verbs.QP_STATE)

    def post(self, address: int) -> tuple[int, int | None]:
        """Post the chain at ``address``: errno, and the address of the first request not taken."""
        error = self._device.operations.post_send(self._qp, address, self._bad)
        return error, self._bad.value if error else None

    def poll(self) -> list[tuple[int, int]]:
        """Available completions: number of the work request, status."""
        count = self._device.operations.poll_cq(self._cq, POLL, self._completions)
        return [(c.wr_id, c.status) for c in self._completions[:count]] if count > 0 else []

    def arm(self) -> None:
        """Let the next completion set :attr:`notified`; poll once more after this."""
        self.notified.clear()
        self._device.operations.req_notify_cq(self._cq, 0)

    def close(self) -> None:
        """Destroy; afterwards the device touches no memory for this connection. Idempotent."""
        if self._qp is not None:
            self._library.destroy_qp(self._qp)
            self._qp = None
        if self._cq:
            self._library.destroy_cq(self._cq)
            self._cq = None
        self._device.events.remove(self._token)
