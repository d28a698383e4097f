"""Several transfers over one link at the same time, over queue pairs of memory and rules."""

from __future__ import annotations

import contextlib
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from datadist_rdma import link as link_module
from datadist_rdma import transfer, verbs
from datadist_rdma.link import RdmaLink
from datadist_rdma.memory import Ranges
from datadist_rdma.notification import Notification
from datadist_rdma.offer import RegionOffer, make_offer
from datadist_rdma.options import parse
from datadist_rdma.path import Call, Path
from datadist_rdma.ports import Gid
from datadist_rdma.queue_pair import End

from datadist.base.flag import Flag
from datadist.transport import (
    Access,
    Group,
    LinkError,
    Offer,
    Peer,
    PeerLost,
    TransferError,
    TransferTimeout,
    TransportOptions,
)
from tests.interrupts import raising_anew

ADDRESS = bytes(10) + b"\xff\xff\x0a\x00\x00\x01"
SECONDS = 60.0
"""Far longer than any call takes here: what ends earlier was ended."""


class FakePair:
    """Completes what was posted while :attr:`flows`, and flushes it in the error state."""

    max_message = 1 << 30

    def __init__(self, number: int) -> None:
        self.end = End(number, 5, ADDRESS, 5, 16)
        self.notified = Notification()
        self.flows = True
        self.status = verbs.WC_SUCCESS
        self.asleep = Flag()
        """Its transfer has posted what it may, and waits."""
        self.queue: deque[int] = deque()
        self.failed = self.closed = False
        self.peer: End | None = None
        self.users: set[int] = set()

    def connect(self, peer: End, _settings: object) -> int:
        self.peer = peer
        return 5

    def post(self, address: int) -> tuple[int, int | None]:
        assert not self.closed
        self.users.add(threading.get_ident())
        while address:
            request = verbs.SendRequest.from_address(address)
            self.queue.append(request.wr_id)
            address = request.next
        return 0, None

    def poll(self) -> list[tuple[int, int]]:
        assert not self.closed
        if not self.queue or not (self.flows or self.failed):
            return []
        return [(self.queue.popleft(), verbs.WC_WR_FLUSH_ERR if self.failed else self.status)]

    def arm(self) -> None:
        self.notified.clear()
        self.asleep.set()

    def resume(self, status: int = verbs.WC_SUCCESS) -> None:
        """Complete what is in flight, with that status."""
        self.status, self.flows = status, True
        self.notified.set()

    def fail(self) -> None:
        self.failed = True

    def close(self) -> None:
        self.closed = True


def _ranges(_device: object) -> Ranges:
    return Ranges([(8192, 4096, 5)])


def _offer(count: int) -> Offer:
    ends = [End(100 + number, 7, ADDRESS, 5, 16) for number in range(count)]
    return Offer(make_offer(ends, True, [RegionOffer(address=4096, size=4096, key=3)]))


def _link(ours: int = 4, theirs: int = 4) -> tuple[RdmaLink, list[FakePair]]:
    """A link with rank 1, attached, of so many queue pairs at each end."""
    unused: Any = None
    group = Group("l", 0, {r: Peer(r, f"e{r}") for r in (0, 1)}, None, time.monotonic() + 60)
    options = parse(TransportOptions(), {})
    made = RdmaLink(_ranges, group, {}, [], Access.READ_WRITE, options)
    pairs: Any = [FakePair(number) for number in range(ours)]
    made._paths[1] = Path(1, unused, Gid("rxe0", 1, 3, ADDRESS, "eth0"), pairs)
    if theirs:
        made.attach(1, _offer(theirs))
    return made, pairs


def _read(made: RdmaLink, timeout: float = SECONDS, size: int = 8) -> None:
    at = (8192, 4096) if size == 8 else (1 << 20, 1 << 20)
    local, remote, length = (array("q", [number]) for number in (*at, size))
    made.read(1, local, remote, length, timeout)


@contextmanager
def _reading(made: RdmaLink, pairs: list[FakePair], size: int = 8) -> Iterator[list[Future[None]]]:
    """One read in flight on each of these queue pairs, which all stand still."""
    with ThreadPoolExecutor(len(pairs)) as pool:
        for pair in pairs:
            pair.flows = False
        calls = [pool.submit(_read, made, size=size) for _ in pairs]
        for pair in pairs:
            assert pair.asleep.wait(SECONDS)
        try:
            yield calls
        finally:
            for pair in pairs:
                pair.resume()


def test_transfers_at_the_same_time_have_a_queue_pair_each() -> None:
    made, pairs = _link()
    with _reading(made, pairs) as calls:
        assert [len(pair.users) for pair in pairs] == [1] * 4
        for pair in pairs:
            pair.resume()
        for call in calls:
            call.result(SECONDS)
    assert not made._paths[1].users


def test_one_transfer_does_not_wait_for_another() -> None:
    made, pairs = _link()
    with _reading(made, pairs[:1]) as (large,):
        for _ in range(3):
            _read(made)
        assert not large.done()
        assert all(not pair.users for pair in pairs[2:]), "those before were free again"


def test_one_after_the_other_use_the_same_queue_pair() -> None:
    made, pairs = _link()
    for _ in range(5):
        _read(made)
    assert [bool(pair.users) for pair in pairs] == [True, False, False, False]


@pytest.mark.parametrize(("ours", "theirs"), [(4, 2), (2, 4), (1, 3), (3, 1), (3, 3)])
def test_as_many_queue_pairs_as_both_have_are_connected(ours: int, theirs: int) -> None:
    made, pairs = _link(ours, theirs)
    count = min(ours, theirs)
    numbers = [pair.peer.number for pair in pairs if pair.peer is not None]
    assert numbers == list(range(100, 100 + count)), "the first with the first, and so on"
    assert [pair.closed for pair in pairs] == [False] * count + [True] * (ours - count)
    with _reading(made, pairs[:count]):
        with pytest.raises(TransferTimeout, match=f"all {count} queue pairs to rank 1") as caught:
            _read(made, 0.05)
        assert caught.value.link_usable
    _read(made)
    made.close()
    assert all(pair.closed for pair in pairs)


def test_transfers_at_the_same_time_have_less_in_flight_each() -> None:
    made, pairs = _link()
    whole = Ranges([(1 << 20, 64 << 20, 5)])
    made._local, made._paths[1].remote = lambda _: whole, whole
    with _reading(made, pairs, size=32 << 20) as calls:
        most = [len(pair.queue) for pair in pairs]
        for pair in pairs:
            pair.resume()
        for call in calls:
            call.result(SECONDS)
    assert min(most) >= 2
    assert sum(most) <= 4 + 2 + 2 + 2


def test_more_transfers_than_queue_pairs_wait_for_one() -> None:
    made, pairs = _link(2, 2)
    with _reading(made, pairs), ThreadPoolExecutor(1) as pool:
        late = pool.submit(_read, made)
        pairs[1].resume()
        late.result(SECONDS)
        assert len(pairs[1].users) == 2


@pytest.mark.parametrize(
    ("status", "kind"),
    [(verbs.WC_REM_ACCESS_ERR, TransferError), (verbs.WC_RETRY_EXC_ERR, PeerLost)],
)
def test_an_error_of_one_queue_pair_ends_all(status: int, kind: type[TransferError]) -> None:
    made, pairs = _link()
    with _reading(made, pairs) as calls:
        pairs[2].resume(status)
        errors = [call.exception(SECONDS) for call in calls]
    (own,) = [error for error in errors if "earlier transfer" not in str(error)]
    assert type(own) is kind
    for error in errors:
        assert isinstance(error, TransferError)
        assert not error.link_usable
        assert str(own) in str(error)
    assert all(pair.failed and not pair.queue for pair in pairs), "nothing is in flight"
    with pytest.raises(TransferError, match="an earlier transfer ended with"):
        _read(made)


def test_a_timeout_of_one_queue_pair_ends_all_with_nothing_in_flight() -> None:
    made, pairs = _link(2, 2)
    with _reading(made, pairs[:1]) as (other,):
        pairs[1].flows = False
        with pytest.raises(TransferTimeout) as caught:
            _read(made, 1.0)  # it has posted long before
        assert not caught.value.link_usable
        assert pairs[1].failed
        assert not pairs[1].queue
        error = other.exception(SECONDS)
    assert "an earlier transfer ended with: not complete after" in str(error)
    assert pairs[0].failed
    assert not pairs[0].queue


def test_a_timeout_whose_rest_ends_soon_leaves_the_others_alone() -> None:
    made, pairs = _link(2, 2)
    with _reading(made, pairs[:1]) as (other,):
        with pytest.raises(TransferTimeout) as caught:
            _read(made, 0.0)
        assert caught.value.link_usable
        assert not other.done()
        _read(made)


@pytest.mark.parametrize("closing", [False, True])
def test_an_abort_and_a_close_end_all(closing: bool) -> None:
    made, pairs = _link()
    with _reading(made, pairs) as calls, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(_read, made)
        end: Callable[[], object] = made.close if closing else lambda: made.abort(1)
        end()
        for call in (*calls, waiting):
            error = call.exception(SECONDS)
            assert isinstance(error, TransferError)
            assert not error.link_usable
            assert ("is closed" if closing else "was aborted") in str(error)
    assert [pair.closed for pair in pairs] == [closing] * 4
    assert not any(pair.queue for pair in pairs)


def test_a_close_that_gives_up_leaves_the_queue_pairs_in_the_error_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link_module, "CLOSE_SECONDS", 0.05)
    made, pairs = _link()
    assert made._paths[1].claim(Call(), pairs[0])
    assert made.close() == frozenset()
    assert [(pair.failed, pair.closed) for pair in pairs] == [(True, False)] * 4


def test_a_link_that_was_closed_is_not_attached() -> None:
    made, pairs = _link(theirs=0)
    made.close()
    with pytest.raises(LinkError, match="is closed"):
        made.attach(1, _offer(4))
    assert all(pair.peer is None for pair in pairs)


def _still(state: tuple[RdmaLink, list[FakePair]]) -> tuple[RdmaLink, list[FakePair]]:
    for pair in state[1]:
        pair.flows = False
    return state


@pytest.mark.parametrize("still", [False, True])
def test_what_a_handler_raises_leaves_nothing_taken_and_nothing_in_flight(
    monkeypatch: pytest.MonkeyPatch, still: bool
) -> None:
    for name in ("DRAIN_SECONDS", "GRACE_SECONDS", "SPIN_SECONDS"):
        monkeypatch.setattr(transfer, name, 0.0001)
    moments, left_usable = 0, 0
    for where, (made, pairs) in raising_anew(
        lambda: _still(_link()) if still else _link(),
        lambda state: _read_until_late(state[0], still),
    ):
        moments += 1
        assert not made._paths[1].users, where
        assert pairs[0].closed or not any(pair.queue for pair in pairs), where
        if made._paths[1].ended is None:
            left_usable += 1
            for pair in pairs:
                pair.resume()
            _read(made)
        else:
            assert pairs[0].failed, where
    assert moments > 20
    assert left_usable > 10


def _read_until_late(made: RdmaLink, still: bool) -> None:
    with contextlib.suppress(TransferTimeout):
        _read(made, 0.0005 if still else SECONDS)
