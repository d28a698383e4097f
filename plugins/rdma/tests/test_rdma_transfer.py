"""Window, completions, deadlines and the fence, over a queue pair of memory and rules."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

import numpy as np
import pytest
from datadist_rdma import chains, link, transfer, verbs
from datadist_rdma.chains import Segments
from datadist_rdma.transfer import Transfer
from hypothesis import given, settings
from hypothesis import strategies as st

from datadist.transport import PeerLost, TransferError, TransferTimeout


class FakePair:
    """Completes requests as a reliable connection does.

    Successes are reported where asked for, failures always; after one, all else is flushed.
    """

    def __init__(
        self, per_poll: int = 8, fails: dict[int, int] | None = None, **rules: Any
    ) -> None:
        self.per_poll = per_poll
        self.fails = fails or {}
        self.stuck_from: int = rules.get("stuck_from", 1 << 60)
        self.refuses: int = rules.get("refuses", 1 << 60)
        self.flushes: bool = rules.get("flushes", True)
        self.notified = threading.Event()
        self.queue: deque[tuple[int, int]] = deque()
        self.most = 0
        self.moved: list[int] = []
        self.failed = False
        self.closed = False

    def post(self, address: int) -> tuple[int, int | None]:
        while address:
            request = verbs.SendRequest.from_address(address)
            if request.wr_id >= self.refuses:
                return 12, address
            self.queue.append((request.wr_id, request.send_flags))
            address = request.next
        self.most = max(self.most, len(self.queue))
        return 0, None

    def poll(self) -> list[tuple[int, int]]:
        assert not self.closed
        found = []
        for _ in range(self.per_poll):
            if not self.queue:
                break
            number, flags = self.queue[0]
            if self.failed:
                if not self.flushes:
                    break
                found.append((number, verbs.WC_WR_FLUSH_ERR))
            elif number >= self.stuck_from:
                break
            elif number in self.fails:
                self.failed = True
                found.append((number, self.fails[number]))
            else:
                self.moved.append(number)
                if flags & verbs.SEND_SIGNALED:
                    found.append((number, verbs.WC_SUCCESS))
            self.queue.popleft()
        return found

    def arm(self) -> None:
        self.notified.clear()
        if self.queue and self.queue[0][0] < self.stuck_from:
            self.notified.set()

    def fail(self) -> None:
        self.failed = True

    def close(self) -> None:
        self.closed = True


def run(
    pair: FakePair, count: int, timeout: float = 10, length: int = 8, window: int = 32,
    aborted: Any = lambda: False,
) -> None:  # fmt: skip
    parts = Segments(*(np.ones(count, np.int64) for _ in range(3)))
    keys = np.zeros(count, np.uint32)
    Transfer(pair, 3, window, aborted).run(  # type: ignore[arg-type]
        chains.chains(parts, keys, keys, verbs.WR_RDMA_READ, length), time.monotonic() + timeout
    )


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 64), st.integers(1, 4), st.integers(1, 40))
def test_all_is_moved_and_the_window_kept(
    count: int, length: int, chains_: int, per_poll: int
) -> None:
    pair = FakePair(per_poll)
    run(pair, count, length=length, window=length * chains_)
    assert pair.moved == list(range(count))
    assert pair.most <= length * chains_
    assert not pair.failed


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(0, 199), st.integers(1, 16), st.integers(1, 40))
def test_a_failure_ends_it_with_nothing_in_flight(
    count: int, bad: int, length: int, per_poll: int
) -> None:
    pair = FakePair(per_poll, {bad: verbs.WC_REM_ACCESS_ERR})
    if bad >= count:
        run(pair, count, length=length)
        return
    with pytest.raises(TransferError, match=f"work request {bad} failed: remote access") as caught:
        run(pair, count, length=length)
    assert not caught.value.link_usable
    assert pair.failed
    assert not pair.queue
    assert pair.moved == list(range(bad))


def test_a_silent_peer_is_lost() -> None:
    pair = FakePair(fails={20: verbs.WC_RETRY_EXC_ERR})
    with pytest.raises(PeerLost, match="rank 3 does not answer") as caught:
        run(pair, 100)
    assert caught.value.rank == 3
    assert not pair.queue


def test_an_earlier_failure_of_the_queue_pair_is_reported() -> None:
    pair = FakePair()
    pair.failed = True
    with pytest.raises(TransferError, match="flushed after an earlier failure"):
        run(pair, 10)


def test_a_full_device_is_an_error_and_what_it_took_is_waited_for() -> None:
    pair = FakePair(refuses=20)
    with pytest.raises(TransferError, match="errno 12"):
        run(pair, 100)
    assert pair.failed
    assert not pair.queue


def test_late_with_the_rest_soon_done_leaves_the_link_usable() -> None:
    pair = FakePair()
    with pytest.raises(TransferTimeout, match="not complete") as caught:
        run(pair, 100, timeout=0)
    assert caught.value.link_usable
    assert not pair.failed
    assert not pair.queue


def test_late_and_stuck_is_ended() -> None:
    pair = FakePair(stuck_from=10)
    begun = time.monotonic()
    with pytest.raises(TransferTimeout) as caught:
        run(pair, 100, timeout=0.1)
    assert not caught.value.link_usable
    assert time.monotonic() - begun >= 0.1 + transfer.GRACE_SECONDS
    assert pair.failed
    assert not pair.queue


def test_a_device_that_does_not_flush_loses_its_queue_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "DRAIN_SECONDS", 0.05)
    pair = FakePair(stuck_from=10, flushes=False)
    with pytest.raises(TransferTimeout):
        run(pair, 100, timeout=0.05)
    assert pair.closed


def test_an_abort_wakes_the_waiter() -> None:
    pair = FakePair(stuck_from=10)
    told = threading.Event()

    def abort() -> None:
        told.set()
        pair.notified.set()

    timer = threading.Timer(0.1, abort)
    timer.start()
    begun = time.monotonic()
    with pytest.raises(TransferError, match="aborted") as caught:
        run(pair, 100, timeout=60, aborted=told.is_set)
    assert time.monotonic() - begun < 30
    assert not caught.value.link_usable
    assert not pair.queue
    timer.join()


def test_an_interrupt_leaves_nothing_in_flight() -> None:
    pair = FakePair(stuck_from=10)

    def interrupt() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pair, 100, aborted=interrupt)
    assert pair.failed
    assert not pair.queue


@pytest.mark.parametrize(
    ("error", "broken"),
    [
        (TransferTimeout("late", link_usable=True), None),
        (TransferTimeout("late"), "an earlier transfer ended with: late"),
        (PeerLost("gone", 1), "an earlier transfer ended with: gone"),
        (KeyboardInterrupt(), "an earlier transfer ended with: KeyboardInterrupt"),
    ],
)
def test_what_ended_the_connection_is_remembered(error: BaseException, broken: str | None) -> None:
    class Raising:
        def run(self, *_: object) -> None:
            raise error

    unused: Any = None
    path = link._Path(unused, unused, unused)
    with pytest.raises(type(error)):
        link.RdmaLink._run(path, Raising(), iter(()), 0.0)  # type: ignore[arg-type]
    assert path.broken == broken
