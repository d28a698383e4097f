"""Connecting with a peer: attempts, address families, what is said where it fails."""

from __future__ import annotations

import errno
import ipaddress
import time
from array import array
from typing import Any

import pytest
from datadist_rdma.chains import MAX_SHORT_CHAIN
from datadist_rdma.link import RdmaLink
from datadist_rdma.memory import Ranges
from datadist_rdma.notification import Notification
from datadist_rdma.offer import RegionOffer, make_offer
from datadist_rdma.options import parse
from datadist_rdma.path import Path
from datadist_rdma.ports import Gid
from datadist_rdma.queue_pair import ConnectionSettings, End

from datadist.transport import (
    Access,
    AddressError,
    Group,
    LinkError,
    Offer,
    Peer,
    TransferError,
    TransportOptions,
    Unsupported,
)

V4, OTHER_V4, V6, OTHER_V6 = "10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2"


def _raw(address: str) -> bytes:
    parsed = ipaddress.ip_address(address)
    return parsed.packed if parsed.version == 6 else bytes(10) + b"\xff\xff" + parsed.packed


class FakeQueuePair:
    """Connects after so many failures, each with its errno."""

    def __init__(self, *failures: int) -> None:
        self.failures = list(failures)
        self.tried: list[tuple[End, ConnectionSettings]] = []
        self.path: Path | None = None
        """Aborted by the first attempt, if it is set."""
        self.notified = Notification()
        self.max_message = 1 << 30
        self.closed = False

    def connect(self, peer: End, settings: ConnectionSettings) -> int:
        self.tried.append((peer, settings))
        if self.path is not None:
            self.path.end("aborted")
        if not self.failures:
            return 3
        error = LinkError("cannot enter RTR")
        error.errno = self.failures.pop(0)  # type: ignore[attr-defined]
        raise error

    def fail(self) -> None:
        """Enter the error state."""

    def close(self) -> None:
        self.closed = True


def _link(*pairs: FakeQueuePair, ours: str = V4, **options: Any) -> RdmaLink:
    unused: Any = None
    peers = {rank: Peer(rank, f"engine-{rank}") for rank in (0, 1)}
    group = Group("pair", 0, peers, None, time.monotonic() + 60)
    made = RdmaLink(unused, group, {}, [], Access.READ, parse(TransportOptions(**options), {}))
    gid = Gid("rxe0", 1, 3, _raw(ours), "eth0")
    made._paths[1] = Path(1, unused, gid, pairs)  # type: ignore[arg-type]
    return made


def _offer(theirs: str = OTHER_V4, writable: bool = False, pairs: int = 1) -> Offer:
    regions = [RegionOffer(address=4096, size=100, key=3)]
    ends = [End(77 + number, 5, _raw(theirs), 5, 16) for number in range(pairs)]
    return Offer(make_offer(ends, writable, regions))


def _is_attached(made: RdmaLink) -> bool:
    unused: Any = b""
    try:
        made.read(1, unused, unused, unused, 0.0)
    except TransferError as error:
        return "has no offer" not in str(error)
    except Exception:
        return True
    return True


# -- attempts: link_retry_count ------------------------------------------------------------------


@pytest.mark.parametrize("attempts", [1, 2, 5])
def test_a_silent_peer_is_tried_so_often(attempts: int) -> None:
    pair = FakeQueuePair(*[errno.ETIMEDOUT] * attempts)
    made = _link(pair, retry_count=attempts)
    with pytest.raises(LinkError, match=rf"cannot connect to rank 1 at {OTHER_V4}: ") as error:
        made.attach(1, _offer())
    assert error.value.rank == 1
    assert len(pair.tried) == attempts
    assert not _is_attached(made)


@pytest.mark.parametrize("attempts", [2, 5])
def test_a_peer_that_answers_the_last_attempt_is_connected(attempts: int) -> None:
    pair = FakeQueuePair(*[errno.ETIMEDOUT] * (attempts - 1))
    made = _link(pair, retry_count=attempts)
    made.attach(1, _offer())
    assert len(pair.tried) == attempts
    assert _is_attached(made)


def test_a_peer_that_answers_is_connected_once_with_what_was_chosen() -> None:
    pair = FakeQueuePair()
    extra = {"timeout": "10", "retry_count": "2"}
    _link(pair, retry_count=9, traffic_class=132, service_level=4, extra=extra).attach(1, _offer())
    ((peer, settings),) = pair.tried
    assert peer == End(77, 5, _raw(OTHER_V4), 5, 16)
    assert settings == ConnectionSettings(
        traffic_class=132, service_level=4, timeout=10, retry_count=2
    )


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENETUNREACH, errno.ENOMEM])
def test_what_waiting_does_not_mend_is_not_tried_again(number: int) -> None:
    pair = FakeQueuePair(number, 0)
    with pytest.raises(LinkError, match="cannot connect to rank 1"):
        _link(pair, retry_count=5).attach(1, _offer())
    assert len(pair.tried) == 1


def test_a_link_that_is_given_up_is_not_tried_again() -> None:
    pair = FakeQueuePair(*[errno.ETIMEDOUT] * 5)
    made = _link(pair, retry_count=5)
    pair.path = made._paths[1]
    with pytest.raises(LinkError, match="cannot connect to rank 1"):
        made.attach(1, _offer())
    assert len(pair.tried) == 1


def test_a_second_offer_of_a_rank_is_refused() -> None:
    pair = FakeQueuePair()
    made = _link(pair)
    made.attach(1, _offer())
    with pytest.raises(LinkError, match="rank 1 was attached before"):
        made.attach(1, _offer())
    assert len(pair.tried) == 1


# -- what is not moved ---------------------------------------------------------------------------


def _one_range(_device: object) -> Ranges:
    """All memory of ours, by its local key."""
    return Ranges([(8192, 4096, 5)])


def _ready(writable: bool = True) -> RdmaLink:
    """A link that is attached; its queue pair can do no more than connect."""
    made = _link(FakeQueuePair())
    made._local = _one_range
    made.attach(1, _offer(writable=writable))
    return made


def _vectors(local: int = 8192, remote: int = 4096, length: int = 8) -> tuple[Any, Any, Any]:
    here, there, size = (array("q", [number]) for number in (local, remote, length))
    return here, there, size


def test_memory_of_who_granted_reading_only_is_not_written() -> None:
    with pytest.raises(Unsupported, match="rank 1 granted read access only"):
        _ready(writable=False).write(1, *_vectors(), 1.0)


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("state", ["broken", "aborted", "closed"])
def test_over_a_connection_that_has_ended_nothing_is_posted(write: bool, state: str) -> None:
    made = _ready()
    path = made._paths[1]
    if state == "broken":
        path.end("an earlier transfer ended with: status 12")
    elif state == "aborted":
        made.abort(1)
    else:
        made.close()
    expected = {"broken": "status 12", "aborted": "was aborted", "closed": "is closed"}[state]
    with pytest.raises(TransferError, match=expected) as error:
        (made.write if write else made.read)(1, *_vectors(), 1.0)
    assert not error.value.link_usable
    assert not made._paths[1].users


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("count", [1, MAX_SHORT_CHAIN + 1])
@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"remote": 4095}, "8 bytes at 0xfff are not memory that rank 1 offered"),
        ({"remote": 4096 + 93}, "8 bytes at 0x105d are not memory that rank 1 offered"),
        ({"local": 8191}, "8 bytes at 0x1fff are not memory that was registered here"),
        ({"local": 8192 + 4089}, "8 bytes at 0x2ff9 are not memory that was registered here"),
    ],
)
def test_addresses_outside_are_refused(
    write: bool, count: int, wrong: dict[str, int], text: str
) -> None:
    made = _ready()
    here, there, length = (
        good * (count - 1) + bad for good, bad in zip(_vectors(), _vectors(**wrong), strict=True)
    )
    with pytest.raises(AddressError) as error:
        (made.write if write else made.read)(1, here, there, length, 1.0)
    assert text in str(error.value)
    assert made._paths[1].ended is None, "nothing was posted"
    assert not made._paths[1].users


# -- address families ----------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs"), [(V4, OTHER_V4), (V6, OTHER_V6)])
def test_ends_of_one_family_connect(ours: str, theirs: str) -> None:
    pair = FakeQueuePair()
    _link(pair, ours=ours).attach(1, _offer(theirs))
    assert len(pair.tried) == 1


@pytest.mark.parametrize(("ours", "theirs"), [(V4, OTHER_V6), (V6, OTHER_V4), (V4, "::10.0.0.2")])
def test_ends_of_two_families_are_refused_before_the_network_is_asked(
    ours: str, theirs: str
) -> None:
    pair = FakeQueuePair()
    made = _link(pair, ours=ours)
    with pytest.raises(LinkError) as error:
        made.attach(1, _offer(theirs))
    said = str(ipaddress.ip_address(theirs))
    assert f"rank 1 uses {said} and we {ours}: both must be IPv4, or both IPv6" in str(error.value)
    assert error.value.rank == 1
    assert pair.tried == []
    assert not _is_attached(made)
