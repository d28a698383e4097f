"""Requests to peers that are answered by a message."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from datadist.base.flag import Flag
from datadist.base.workers import Workers
from datadist.caches.peers import PeerView
from datadist.control.account import Item
from datadist.control.messages import Message
from datadist.status import LLMException, LLMStatusCode

Answer = TypeVar("Answer")
T = TypeVar("T")

MANY = 64
"""A peer with more requests that wait rests after each one for twice what that took of the processor."""


class Service:
    """Threads that answer requests of peers, ``most`` of one peer at one time.

    What waits counts on the account of its peer. No request has more than ``longest`` seconds, whatever
    time its peer asks for.
    """

    def __init__(self, name: str, threads: int, most: int, longest: float) -> None:
        self._workers = Workers(threads, name, most)
        self._longest = longest
        self._ending = Flag()

    def submit(
        self, view: PeerView, nbytes: int, seconds: float, serve: Callable[[float], None]
    ) -> None:
        """Call ``serve`` with a deadline (time.monotonic) on one of the threads.

        Raises :class:`~datadist.control.account.LimitExceeded`.
        """
        account = view.account
        account.take(Item.REQUESTS)
        account.take(Item.REQUEST_BYTES, nbytes)
        deadline = time.monotonic() + min(seconds, self._longest)

        def run() -> None:
            began = time.thread_time()
            try:
                serve(deadline)
            finally:
                account.give_back(Item.REQUESTS)
                account.give_back(Item.REQUEST_BYTES, nbytes)
            if account[Item.REQUESTS] > MANY:
                self._ending.wait(2 * (time.thread_time() - began))

        self._workers.submit(run, owner=account)

    def tell(self) -> None:
        """Have the threads end, without waiting for it; what waits is dropped, as at :meth:`close`."""
        self._ending.set()
        self._workers.tell(drop=True)

    def close(self) -> None:
        """End the threads, and drop what waits: our end answers it."""
        self._ending.set()
        self._workers.stop(drop=True)


class Request(Generic[Answer]):
    """One request, which is over when the answer has come or the peer is gone."""

    def __init__(self, view: PeerView) -> None:
        self.view = view
        self.over = Flag()
        self.answer: Answer | None = None

    def wait(self, deadline: float) -> Answer | None:
        """The answer; None if the peer is gone (``over`` is set) or on a timeout."""
        self.over.wait(max(0.0, deadline - time.monotonic()))
        return self.answer


class Requests(Generic[Answer]):
    """Those of one kind. :meth:`ask` is for any thread, the rest for the reactor."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._open: dict[int, Request[Answer]] = {}

    def ask(
        self,
        view: PeerView,
        make: Callable[[int], Message],
        wait: Callable[[Request[Answer]], T],
    ) -> T:
        """Send the message that ``make`` makes for an id, which the answer will carry.

        Returns what ``wait`` returns, after which the answer is not taken any more.
        """
        number = next(self._ids)
        request: Request[Answer] = Request(view)
        try:
            self._open[number] = request
            view.send(make(number))
            if view.session.closed:  # the session may have ended before this request was recorded
                request.over.set()
            return wait(request)
        finally:
            self._open.pop(number, None)

    def answer(self, view: PeerView, number: int, answer: Answer) -> None:
        """A peer answers; only the one that was asked."""
        request = self._open.get(number)
        if request is not None and request.view is view:
            request.answer = answer
            request.over.set()

    def on_gone(self, view: PeerView) -> None:
        """A peer's session is over."""
        for request in list(self._open.values()):
            if request.view is view:
                request.over.set()


def no_answer(cluster: int, gone: bool, limit: object, what: str) -> LLMException:
    """LLM_NOT_YET_LINK for a peer that is gone, LLM_TIMEOUT for one that did not say ``what`` in time.

    ``limit`` is the time that it had, for people.
    """
    if gone:
        return LLMException(
            f"cluster {cluster} is gone; unlink and link again",
            status_code=LLMStatusCode.LLM_NOT_YET_LINK,
        )
    return LLMException(
        f"cluster {cluster} did not say within {limit} {what} (is it stopped?)",
        status_code=LLMStatusCode.LLM_TIMEOUT,
    )
