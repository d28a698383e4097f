"""What the device is told of a connection, and what is left of one that cannot be made."""

from __future__ import annotations

import ctypes
import errno
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from datadist_rdma import verbs
from datadist_rdma.ports import Gid
from datadist_rdma.queue_pair import ConnectionSettings, End, QueuePair

from datadist.transport import LinkError

GID = Gid("rxe0", 2, 3, bytes(range(16)), "eth0")
PEER = End(number=77, psn=5, gid=bytes(range(16, 32)), mtu=4, reads=16)
SETTINGS = ConnectionSettings(traffic_class=132, service_level=4, timeout=10, retry_count=2)
CQ, TOKEN, NUMBER = 40, 7, 99


class FakeLibrary:
    """Takes whatever it is told, but for what fails; remembers all of it."""

    def __init__(self, **fails: int) -> None:
        self.fails = fails
        self.modified: dict[int, verbs.QpAttr] = {}
        self.destroyed: list[str] = []

    def create_cq(self, *_args: Any) -> int:
        return 0 if "create_cq" in self.fails else CQ

    def create_qp(self, _pd: Any, _wanted: Any) -> Any:
        none = ctypes.POINTER(verbs.QueuePair)()
        return none if "create_qp" in self.fails else ctypes.pointer(verbs.QueuePair(qp_num=NUMBER))

    def modify_qp(self, _pair: Any, attributes: verbs.QpAttr, _mask: int) -> int:
        self.modified[attributes.qp_state] = verbs.QpAttr.from_buffer_copy(attributes)
        return self.fails.get(str(attributes.qp_state), 0)

    def destroy_qp(self, _pair: Any) -> int:
        self.destroyed.append("pair")
        return 0

    def destroy_cq(self, queue: int) -> int:
        assert queue == CQ
        self.destroyed.append("queue")
        return 0


def _pair(
    library: FakeLibrary, may_write: bool = False, mtu: int = 5, reads: int = 64
) -> QueuePair:
    removed = library.destroyed
    device: Any = SimpleNamespace(
        name="rxe0", library=library, context=1, pd=2, channel=3, operations=None,
        attributes=SimpleNamespace(max_qp_rd_atom=reads, max_qp_init_rd_atom=reads // 2),
        port=lambda number: SimpleNamespace(active_mtu=mtu, max_msg_sz=1 << 30),
        events=SimpleNamespace(
            add=lambda: (TOKEN, threading.Event()), remove=lambda token: removed.append(f"{token}")
        ),
    )  # fmt: skip
    return QueuePair(device, GID, may_write)


@pytest.mark.parametrize("may_write", [False, True])
def test_peers_write_where_they_may_only(may_write: bool) -> None:
    library = FakeLibrary()
    _pair(library, may_write)
    access = library.modified[verbs.QPS_INIT].qp_access_flags
    assert bool(access & verbs.REMOTE_WRITE) is may_write
    assert access & verbs.REMOTE_READ
    assert library.modified[verbs.QPS_INIT].port_num == GID.port


@pytest.mark.parametrize(("ours", "theirs", "common"), [(5, 4, 4), (3, 4, 3), (4, 4, 4)])
def test_the_ends_agree_on_the_smaller_packet(ours: int, theirs: int, common: int) -> None:
    library = FakeLibrary()
    peer = End(PEER.number, PEER.psn, PEER.gid, theirs, PEER.reads)
    assert _pair(library, mtu=ours).connect(peer, SETTINGS) == common
    assert library.modified[verbs.QPS_RTR].path_mtu == common


@pytest.mark.parametrize(
    ("ours", "theirs", "sent", "accepted"),
    [(64, 16, 16, 64), (16, 64, 8, 16), (1000, 1000, 128, 128)],
)
def test_no_more_reads_are_in_flight_than_both_ends_take(
    ours: int, theirs: int, sent: int, accepted: int
) -> None:
    library = FakeLibrary()
    pair = _pair(library, reads=ours)
    pair.connect(End(PEER.number, PEER.psn, PEER.gid, PEER.mtu, theirs), SETTINGS)
    assert library.modified[verbs.QPS_RTS].max_rd_atomic == sent
    assert library.modified[verbs.QPS_RTR].max_dest_rd_atomic == pair.end.reads == accepted


def test_each_end_is_told_of_the_other_one() -> None:
    library = FakeLibrary()
    pair = _pair(library)
    assert (pair.end.number, pair.end.gid) == (NUMBER, GID.raw)
    pair.connect(PEER, SETTINGS)
    receive, send = library.modified[verbs.QPS_RTR], library.modified[verbs.QPS_RTS]
    assert (receive.dest_qp_num, receive.rq_psn) == (PEER.number, PEER.psn)
    route = receive.ah_attr
    assert bytes(route.grh.dgid.raw) == PEER.gid
    assert (route.is_global, route.port_num, route.grh.sgid_index) == (1, GID.port, GID.index)
    assert (route.sl, route.grh.traffic_class) == (4, 132)
    assert send.sq_psn == pair.end.psn
    assert (send.timeout, send.retry_cnt, send.rnr_retry) == (10, 2, 2)


@pytest.mark.parametrize("state", [verbs.QPS_RTR, verbs.QPS_RTS])
def test_what_the_device_refuses_is_said_with_its_number(state: int) -> None:
    library = FakeLibrary(**{str(state): errno.ETIMEDOUT})
    with pytest.raises(LinkError, match="cannot enter") as error:
        _pair(library).connect(PEER, SETTINGS)
    assert getattr(error.value, "errno", None) == errno.ETIMEDOUT


@pytest.mark.parametrize(
    ("fails", "left"),
    [
        ("create_cq", [f"{TOKEN}"]),
        ("create_qp", ["queue", f"{TOKEN}"]),
        (str(verbs.QPS_INIT), ["pair", "queue", f"{TOKEN}"]),
    ],
)
def test_what_cannot_be_made_leaves_nothing(fails: str, left: list[str]) -> None:
    library = FakeLibrary(**{fails: errno.ENOMEM})
    with pytest.raises(LinkError):
        _pair(library)
    assert library.destroyed == left


def test_the_pair_is_destroyed_once_and_before_its_queue() -> None:
    library = FakeLibrary()
    pair = _pair(library)
    pair.close()
    assert library.destroyed == ["pair", "queue", f"{TOKEN}"]
    pair.close()
    pair.fail()
    assert not {"pair", "queue"} & set(library.destroyed[3:])
    assert verbs.QPS_ERR not in library.modified
