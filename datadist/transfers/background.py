"""Transfers in the background: a few threads of the engine, of which no peer gets all.

The first transfer starts the first thread; each that begins one starts another, up to the most, so that
there is one for whoever comes. What a caller does is one step of C, since a handler of a signal may
interrupt it: everything else happens on these threads, where none runs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

from datadist.base.calls import apart, entry
from datadist.base.completion import Completion
from datadist.base.threads import start
from datadist.status import LLMException, LLMStatusCode
from datadist.transfers.limits import CallLimit

__all__ = ["Background", "BackgroundTransfer"]

log = logging.getLogger("datadist.transfer")

END_SECONDS = 5.0
"""Longest wait of the end for transfers whose links were aborted."""


def cancelled() -> LLMException:
    """The exception of what a user has given up before it began."""
    return LLMException(
        "the transfer was cancelled before it began: nothing was moved",
        status_code=LLMStatusCode.LLM_FAILED,
    )


class BackgroundTransfer:
    """One transfer: waiting, begun, or over. Who claims it first decides what becomes of it."""

    def __init__(self, cluster: int, limit: CallLimit, move: Callable[[CallLimit], None]) -> None:
        self.cluster = cluster
        self.completion = Completion()
        self._limit = limit
        self._move: Callable[[CallLimit], None] | None = move
        self._first: list[object] = []
        self._error: BaseException | None = None
        limit.in_pieces = True

    def _claim(self) -> bool:
        mine = object()
        self._first.append(mine)  # in C: no lock
        return self._first[0] is mine

    def run(self) -> None:
        """Move, unless it was cancelled; then tell who wants to know, outside of any call.

        A call of :meth:`cancel` that a handler of a signal has left is ended here.
        """
        if self._claim():
            assert self._move is not None
            self._error = self._error or _failure_of(self._move, self._limit)
            self._move = None
        else:
            self._error = self._error or cancelled()
        self.completion.come_apart()

    def cancel(self) -> bool:
        """Whether it had not begun, and never will; else it ends before its next piece, if it has one."""
        self._limit.cancelled = True
        if self.completion.forked or not self._claim():
            return False
        self._error, self._move = cancelled(), None
        self.completion.come()
        return True

    def abandon(self, error: LLMException) -> None:
        """End it with an error for those who wait, though its thread may still be at it."""
        if self._claim():
            self._move = None
        if not self.completion.has_come():
            self._error = self._error or error
        self.completion.come_apart()

    def error(self) -> BaseException | None:
        """Why it failed; None for success, and before its end."""
        return self._error


@entry
def _failure_of(move: Callable[[CallLimit], None], limit: CallLimit) -> BaseException | None:
    """Move; why it failed, None for success."""
    try:
        move(limit)
    except BaseException as error:
        if not isinstance(error, LLMException):
            log.exception("a transfer in the background failed unexpectedly; please report it")
        return error
    return None


class Background:
    """The threads. :meth:`submit` is for any thread, :meth:`tell` and :meth:`close` for the end.

    At most ``threads`` transfers go on, those with one peer on half of them; one thread is left for a
    peer with which none goes on. Peers take turns.
    """

    def __init__(self, threads: int, refusal: Callable[[], LLMException]) -> None:
        self._most = threads
        self._share = max(1, threads // 2)
        self._refusal = refusal
        self._submitted: SimpleQueue[BackgroundTransfer | None] = SimpleQueue()
        self._lock = threading.Lock()
        """Of what follows; taken where no handler of a signal runs."""
        self._waiting: dict[int, deque[BackgroundTransfer]] = {}
        """By cluster; whose turn is next comes first."""
        self._running: dict[int, list[BackgroundTransfer]] = {}
        self._threads = 0
        self._idle = 0
        self._over = False

    def submit(self, transfer: BackgroundTransfer) -> None:
        """Have it run. Raises ``RuntimeError`` where no thread can be started."""
        if not self._threads:
            apart(self._start_first, "datadist-background-start")
        self._submitted.put(transfer)
        if self._over:
            self._drop_submitted()

    def _start_first(self) -> None:
        with self._lock:
            if not (self._threads or self._over):
                self._start()

    def _start(self) -> None:
        """One more thread; with the lock."""
        name = f"datadist-background-{self._threads}"
        start(threading.Thread(target=self._work, name=name, daemon=True))
        self._threads += 1

    def _work(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            submitted = self._submitted.get()
            with self._lock:
                self._idle -= 1
                if submitted is not None:
                    self._waiting.setdefault(submitted.cluster, deque()).append(submitted)
            del submitted
            while (transfer := self._next()) is not None:
                try:
                    transfer.run()
                finally:
                    self._ended(transfer)
                del transfer
            if self._over:
                self._submitted.put(None)  # for the next thread
                return

    def _next(self) -> BackgroundTransfer | None:
        with self._lock:
            transfer = self._choose()
            if transfer is None:
                return None
            self._running.setdefault(transfer.cluster, []).append(transfer)
            if not self._idle and self._threads < self._most:
                try:
                    self._start()
                except RuntimeError as error:
                    log.warning("a transfer in the background may wait for others: %s", error)
            return transfer

    def _choose(self) -> BackgroundTransfer | None:
        free = self._most - sum(map(len, self._running.values()))
        for cluster, transfers in self._waiting.items():
            running = len(self._running.get(cluster, ()))
            if self._over or not running or (running < self._share and free > 1):
                del self._waiting[cluster]
                transfer = transfers.popleft()
                if transfers:
                    self._waiting[cluster] = transfers
                return transfer
        return None

    def _ended(self, transfer: BackgroundTransfer) -> None:
        with self._lock:
            running = self._running[transfer.cluster]
            running.remove(transfer)
            if not running:
                del self._running[transfer.cluster]

    # -- the end -----------------------------------------------------------------------------

    def tell(self) -> None:
        """Nothing begins any more: what waits ends with an error, on a thread of its own."""
        with self._lock:
            if self._over:
                return
            self._over = True
            waiting = [each for transfers in self._waiting.values() for each in transfers]
            self._waiting.clear()
        if waiting:
            self._give_up_apart(waiting)
        self._drop_submitted()

    def _drop_submitted(self) -> None:
        """What was submitted and no thread has taken."""
        found = []
        with suppress(Empty):
            while True:
                each = self._submitted.get_nowait()
                if each is not None:
                    found.append(each)
        self._submitted.put(None)
        if found:
            self._give_up_apart(found)

    def _give_up_apart(self, transfers: list[BackgroundTransfer]) -> None:
        """Callbacks of the user may take long, and the end does not wait for them."""

        def give_up() -> None:
            for transfer in transfers:
                transfer.abandon(self._refusal())

        try:
            start(threading.Thread(target=give_up, name="datadist-background-end", daemon=True))
        except RuntimeError:
            give_up()

    def close(self) -> None:
        """Wait for what goes on, whose links were aborted; what does not end is over for its user."""
        self.tell()
        deadline = time.monotonic() + END_SECONDS
        with self._lock:
            running = [each for transfers in self._running.values() for each in transfers]
        for transfer in running:
            transfer.completion.wait(max(0.0, deadline - time.monotonic()))
        late = [transfer for transfer in running if not transfer.completion.has_come()]
        if late:
            self._give_up_apart(late)
