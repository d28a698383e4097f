"""Window, completions, deadlines and the fence, over a queue pair of memory and rules."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datadist_rdma import chains, link, transfer, verbs
from datadist_rdma.chains import Segments
from datadist_rdma.notification import Notification
from datadist_rdma.path import Path
from datadist_rdma.queue_pair import QueuePair
from datadist_rdma.transfer import Transfer
from hypothesis import given
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
        self.notified = Notification()
        self.queue: deque[tuple[int, int]] = deque()
        self.armed = False
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
        if self.armed and self.queue and self.queue[0][0] < self.stuck_from:
            self.notified.set()  # the device goes on after this look
        return found

    def arm(self) -> None:
        """What is complete already gives no notification: only what completes after a look does."""
        self.armed = True
        self.notified.clear()

    def fail(self) -> None:
        self.failed = True

    def close(self) -> None:
        self.closed = True


def run(
    pair: FakePair, count: int, timeout: float = 10, length: int = 8, window: int = 32,
    ended: Any = lambda: None,
) -> None:  # fmt: skip
    parts = Segments(*(np.ones(count, np.int64) for _ in range(3)))
    keys = np.zeros(count, np.uint32)
    Transfer(pair, 3, window, ended).run(  # type: ignore[arg-type]
        chains.chains(parts, keys, keys, verbs.WR_RDMA_READ, length), time.monotonic() + timeout
    )


@given(st.integers(1, 500), st.integers(1, 64), st.integers(1, 4), st.integers(1, 40))
def test_all_is_moved_and_the_window_kept(
    count: int, length: int, chains_: int, per_poll: int
) -> None:
    pair = FakePair(per_poll)
    run(pair, count, length=length, window=length * chains_)
    assert pair.moved == list(range(count))
    assert pair.most <= length * chains_
    assert not pair.failed


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
        run(pair, 100, timeout=0.5)  # it has posted long before
    assert not caught.value.link_usable
    assert time.monotonic() - begun >= 0.5 + transfer.GRACE_SECONDS
    assert pair.failed
    assert not pair.queue


def test_a_device_that_does_not_flush_loses_its_queue_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "DRAIN_SECONDS", 0.05)
    pair = FakePair(stuck_from=10, flushes=False)
    with pytest.raises(TransferTimeout):
        run(pair, 100, timeout=0.5)
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
        run(pair, 100, timeout=60, ended=lambda: "aborted" if told.is_set() else None)
    assert time.monotonic() - begun < 30
    assert not caught.value.link_usable
    assert not pair.queue
    timer.join()


class Idle(Notification):
    """What a transfer sleeps on; ``asleep`` stands for what the device does meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.asleep: Callable[[], object] = lambda: None
        self.sleeps = 0

    def wait(self, timeout: float) -> bool:
        assert timeout > 0
        self.sleeps += 1
        if not self.is_set():
            self.asleep()
        return self.is_set()


class LatePair(FakePair):
    """Completes nothing before it is told to; ``armed_by`` is done just before it is armed."""

    notified: Idle

    def __init__(self) -> None:
        super().__init__(stuck_from=0)
        self.armed_by: Callable[[], object] = lambda: None
        self.notified = Idle()

    def complete(self) -> None:
        self.stuck_from = 1 << 60

    def complete_and_notify(self) -> None:
        self.complete()
        self.notified.set()

    def arm(self) -> None:
        self.armed_by()  # what completes just before gives no notification
        super().arm()


def _never() -> None:
    raise AssertionError("it sleeps although all is there: nothing would wake it")


def test_what_completes_just_before_the_channel_is_armed_is_seen() -> None:
    pair = LatePair()
    pair.armed_by, pair.notified.asleep = pair.complete, _never
    run(pair, 20)
    assert pair.moved == list(range(20))
    assert pair.notified.sleeps == 0


def test_what_completes_after_that_wakes_the_sleeper() -> None:
    pair = LatePair()
    pair.notified.asleep = pair.complete_and_notify
    run(pair, 20)
    assert pair.moved == list(range(20))
    assert pair.notified.sleeps == 1


def test_a_notification_between_arming_and_sleeping_is_not_lost() -> None:
    pair = LatePair()
    pair.notified.asleep = _never
    poll, arm = pair.poll, pair.arm
    states: list[str] = []

    def armed() -> None:
        arm()
        states.append("armed")

    def polled() -> list[tuple[int, int]]:
        found = poll()
        if states == ["armed"]:  # the last look before sleep: the device is just too late for it
            states.append("done")
            pair.complete_and_notify()
        return found

    pair.arm, pair.poll = armed, polled  # type: ignore[method-assign]
    run(pair, 20)
    assert pair.moved == list(range(20))


def test_an_abort_just_before_the_channel_is_armed_is_seen() -> None:
    told = threading.Event()

    def abort() -> None:
        told.set()
        pair.notified.set()  # which arming takes back

    pair = LatePair()
    pair.armed_by, pair.notified.asleep = abort, _never
    with pytest.raises(TransferError, match="aborted"):
        run(pair, 20, ended=lambda: "aborted" if told.is_set() else None)
    assert not pair.queue


def test_arming_keeps_a_notification_that_comes_at_once() -> None:
    """The event is cleared before the device is asked: its thread may set it before that returns."""
    pair = QueuePair.__new__(QueuePair)
    pair.notified, pair._cq = Notification(), 7
    asked: list[tuple[int, int]] = []

    def request(queue: int, solicited: int) -> None:
        asked.append((queue, solicited))
        pair.notified.set()

    pair._device = SimpleNamespace(  # type: ignore[assignment]
        operations=SimpleNamespace(req_notify_cq=request)
    )
    pair.notified.set()
    pair.arm()
    assert asked == [(7, 0)]
    assert pair.notified.is_set()
    pair._device = SimpleNamespace(  # type: ignore[assignment]
        operations=SimpleNamespace(req_notify_cq=lambda *_: None)
    )
    pair.arm()
    assert not pair.notified.is_set()


def test_an_interrupt_leaves_nothing_in_flight() -> None:
    pair = FakePair(stuck_from=10)

    def interrupt() -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pair, 100, ended=interrupt)
    assert pair.failed
    assert not pair.queue


def test_an_interrupt_lets_what_ends_soon_end() -> None:
    pair, raised = FakePair(), iter([KeyboardInterrupt])

    def interrupt() -> None:
        for kind in raised:
            raise kind

    with pytest.raises(KeyboardInterrupt):
        run(pair, 100, ended=interrupt)
    assert not pair.failed
    assert not pair.queue


def test_an_interrupt_passes_though_the_device_reports_an_error_then() -> None:
    pair, raised = FakePair(fails={3: verbs.WC_REM_ACCESS_ERR}), iter([KeyboardInterrupt])

    def interrupt() -> None:
        for kind in raised:
            raise kind

    with pytest.raises(KeyboardInterrupt):
        run(pair, 100, ended=interrupt)
    assert pair.failed
    assert not pair.queue


@pytest.mark.parametrize(
    ("error", "usable", "broken"),
    [
        (TransferTimeout("late", link_usable=True), True, None),
        (TransferTimeout("late"), False, "an earlier transfer ended with: late"),
        (PeerLost("gone", 1), False, "an earlier transfer ended with: gone"),
        (KeyboardInterrupt(), True, None),
        (KeyboardInterrupt(), False, "an earlier transfer ended with: KeyboardInterrupt"),
    ],
)
def test_what_ended_the_connection_is_remembered(
    error: BaseException, usable: bool, broken: str | None
) -> None:
    class Raising:
        def __init__(self) -> None:
            self.usable = usable

        def run(self, *_: object) -> None:
            raise error

    unused: Any = None
    path = Path(1, unused, unused, [])
    with pytest.raises(type(error)):
        link.RdmaLink._run(path, Raising(), iter(()), 0.0)  # type: ignore[arg-type]
    assert path.ended == broken
