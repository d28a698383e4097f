"""One read or write: posts chains into the window, waits for them, and ends failed requests.

Only a chain's last request reports success, and each request reports a failure. The window is counted
here: devices take more requests than they were asked for, and stop without warning.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable

from datadist.base.texts import in_seconds
from datadist.transport import PeerLost, TransferError, TransferTimeout
from datadist_rdma import verbs
from datadist_rdma.chains import DEPTH, REQUEST, Chain
from datadist_rdma.queue_pair import QueuePair

SPIN_SECONDS = 30e-6
"""How long completions are polled for before sleeping: small transfers take a few microseconds."""
GRACE_SECONDS = 0.2
"""How long requests in flight may take after the deadline before the connection is ended."""
DRAIN_SECONDS = 2.0


class Transfer:
    """Moves chains over one queue pair; :meth:`run` is called once, after which nothing is in flight.

    Where an error took the end of the queue pair (not :attr:`usable`), it is in the error state and
    drained, or destroyed.
    """

    def __init__(
        self, pair: QueuePair, rank: int, window: int, ended: Callable[[], str | None]
    ) -> None:
        """``ended`` tells why the transfer must not go on, or None."""
        self._pair = pair
        self._rank = rank
        self._window = min(window, DEPTH)
        self._ended = ended
        self._posted = 0
        self._done = 0
        self._failure: tuple[int, int] | None = None
        self._in_flight = False
        self.usable = True
        """Whether the queue pair may be used again."""

    def run(self, chains: Iterable[Chain], deadline: float) -> None:
        """Post all chains and wait for them until ``deadline`` (time.monotonic).

        Raises PeerLost, TransferTimeout, TransferError.
        """
        begun = time.monotonic()
        try:
            self._run(chains, deadline, begun)
        finally:
            if self._in_flight:  # the exception of a signal handler came into what should end it
                self._fence()

    def _run(self, chains: Iterable[Chain], deadline: float, begun: float) -> None:
        try:
            self._move(chains, deadline)
        except _DeadlinePassed:
            self._end_soon()
            text = f"not complete after {in_seconds(deadline - begun)}"
            raise TransferTimeout(text, link_usable=self.usable) from None
        except TransferError:
            self._fence()
            raise
        except BaseException:  # of a signal handler: other transfers over this path may go on
            with contextlib.suppress(TransferError):
                self._end_soon()
            raise

    def _move(self, chains: Iterable[Chain], deadline: float) -> None:
        for chain in chains:
            self._wait_until(chain.end - self._window, deadline)
            if time.monotonic() >= deadline:
                raise _DeadlinePassed
            self._post(chain)
        self._wait_for_all(deadline)

    def _wait_for_all(self, deadline: float) -> None:
        self._wait_until(self._posted, deadline)
        self._in_flight, self.usable = False, True

    def _post(self, chain: Chain) -> None:
        # Before it is posted: what a signal handler raises right after that must find it in flight.
        self._in_flight, self.usable, self._posted = True, False, chain.end
        error, bad = self._pair.post(chain.address)
        if not error:
            return
        taken = (bad - chain.address) // REQUEST.itemsize if bad else 0
        self._posted = chain.first + taken
        raise TransferError(f"the device does not take work requests: {verbs.error_text(error)}")

    def _wait_until(self, count: int, deadline: float) -> None:
        """Return once the first ``count`` requests are done. Raises :class:`_DeadlinePassed`."""
        while self._done < count:
            reason = self._ended()
            if reason is not None:
                raise TransferError(reason)
            if not self._collect() and not self._spin():
                self._sleep(deadline)
            if self._failure is not None:
                raise self._error(*self._failure)

    def _collect(self) -> bool:
        """Process completions; returns whether there were any."""
        completions = self._pair.poll()
        for number, status in completions:
            self._done = max(self._done, number + 1)
            if status != verbs.WC_SUCCESS and self._failure is None:
                self._failure = number, status
        return bool(completions)

    def _spin(self) -> bool:
        end = time.monotonic() + SPIN_SECONDS
        while time.monotonic() < end:
            if self._collect():
                return True
        return False

    def _sleep(self, deadline: float) -> None:
        self._pair.arm()
        if self._collect() or self._ended() is not None:
            return
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise _DeadlinePassed
        self._pair.notified.wait(remaining)

    def _end_soon(self) -> None:
        """Wait a short time for requests in flight, then end them. Raises what the device reports."""
        try:
            self._wait_for_all(time.monotonic() + GRACE_SECONDS)
        except _DeadlinePassed:
            self._fence()
        except BaseException:
            self._fence()
            raise

    def _fence(self) -> None:
        """End all requests in flight, so that none can access memory."""
        self.usable = False
        self._pair.fail()
        end = time.monotonic() + DRAIN_SECONDS
        while self._done < self._posted:
            if time.monotonic() > end:
                self._pair.close()
                break
            if not self._collect():
                time.sleep(0.0005)
        self._in_flight = False

    def _error(self, number: int, status: int) -> TransferError:
        text = verbs.WC_TEXTS.get(status, f"completion status {status}")
        if status == verbs.WC_RETRY_EXC_ERR:
            return PeerLost(
                f"rank {self._rank} does not answer ({text}): its process or host is gone, it has "
                "closed the link, or the network between is down",
                self._rank,
            )
        return TransferError(f"work request {number} failed: {text} (status {status})")


class _DeadlinePassed(Exception):
    """The deadline has passed."""
