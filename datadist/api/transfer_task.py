"""A transfer that goes on in the background, as its user sees it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from datadist.base import checks
from datadist.base.calls import begin, entry
from datadist.base.completion import Completion
from datadist.base.keywords import named_keywords
from datadist.base.texts import in_seconds
from datadist.status import LLMException, LLMStatusCode

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future

__all__ = ["TransferTask"]


class Job(Protocol):
    """What a task needs of what goes on."""

    @property
    def completion(self) -> Completion:
        """Its end."""

    def cancel(self) -> bool:
        """Whether it had not begun, and never will."""

    def error(self) -> BaseException | None:
        """Why it failed, after its end."""


@named_keywords
class TransferTask:
    """A transfer in the background; from the methods of the cache manager that end in ``_async``.

    ``await task`` waits in asyncio and raises as :meth:`result`; cancelling the coroutine that waits
    cancels the task. The memory of a transfer that has begun belongs to it until :meth:`done`.
    """

    def __init__(self, job: Job) -> None:
        self._job = job

    def done(self) -> bool:
        """Whether it has ended: well, with an error, or cancelled. Never blocks."""
        return self._job.completion.has_come()

    @entry
    def result(self, timeout: float | None = None) -> None:
        """Wait for the end for ``timeout`` seconds (None: without limit); raise why it failed.

        Raises ``TypeError``, ``ValueError`` for the timeout, and what the synchronous call raises:
        :class:`LLMException` with its codes, LLM_FAILED after :meth:`cancel`, LLM_ENGINE_FINALIZED
        where the engine was finalized before it began, and in a forked child; LLM_TIMEOUT also while it
        still runs, see :meth:`done`. Can be called again.
        """
        begin("result")
        if not self._job.completion.wait(_checked(timeout)):
            assert timeout is not None
            raise LLMException(
                f"the transfer has not ended within {in_seconds(timeout)} of waiting, and goes on: "
                "wait again, or cancel it",
                status_code=LLMStatusCode.LLM_TIMEOUT,
            )
        self._raise_failure()

    def cancel(self) -> bool:
        """Give the transfer up. Never waits, and may be called anywhere, also in handlers of signals.

        True: it had not begun; it is over, and nothing was moved. False: it had begun, or is over. One
        that goes on ends before its next piece (a large one has several, of some milliseconds), else it
        completes: wait for :meth:`done` before its memory is used again.
        """
        return self._job.cancel()

    def add_done_callback(self, callback: Callable[[TransferTask], object]) -> None:
        """Call ``callback(task)`` once it has ended, on a thread of the engine; at once if it has.

        Where :meth:`cancel` ends it, that calls them on its thread. Callbacks are called in the order in
        which they were added. They may call the engine. They must be short, since other transfers wait
        for the thread. What one raises is logged.

        Raises ``TypeError`` for what cannot be called.
        """
        if not callable(callback):
            raise TypeError(
                f"callback is a {type(callback).__name__}: give a function that takes the task"
            )
        self._job.completion.tell(lambda: callback(self))

    def __await__(self) -> Generator[Any, None, None]:
        if not self.done():
            import asyncio

            loop = asyncio.get_running_loop()
            ended: Future[None] = loop.create_future()
            self._job.completion.tell(lambda: _wake(loop, ended))
            try:
                yield from ended.__await__()
            except asyncio.CancelledError:
                self.cancel()
                raise
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._job.completion.forked:
            raise LLMException(
                "the transfer belongs to the process that forked, and does not go on here",
                status_code=LLMStatusCode.LLM_ENGINE_FINALIZED,
            )
        error = self._job.error()
        if isinstance(error, LLMException):
            raise type(error)(*error.args, status_code=error.status_code) from error
        if error is not None:
            raise error

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'ended' if self.done() else 'running'})"


def _wake(loop: AbstractEventLoop, ended: Future[None]) -> None:
    def wake() -> None:
        if not ended.done():
            ended.set_result(None)

    with suppress(RuntimeError):  # the loop is closed: nobody waits
        loop.call_soon_threadsafe(wake)


def _checked(timeout: float | None) -> float | None:
    checks.check_isinstance("timeout", timeout, (int, float))
    if timeout is not None and not timeout >= 0:
        raise ValueError(f"timeout is {timeout}: it must be seconds, 0 or more, or None")
    return timeout
