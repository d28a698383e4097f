"""Layer-wise transfers: one thread waits for each layer to be final, another one moves it.

So layer n moves while the caller's code computes layer n + 1. The first failure stops the job; what
was not reached keeps no result.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from datadist.base.calls import apart
from datadist.base.completion import Completion
from datadist.base.flag import Flag
from datadist.base.threads import start
from datadist.status import LLMException, LLMStatusCode, param_invalid

log = logging.getLogger("datadist.transfer")


@dataclass(frozen=True)
class LayerSend:
    """One destination: the layers that it gets, and what moves one of them.

    ``move(layer)`` raises LLMException.
    """

    layers: range
    move: Callable[[int], None]
    where: str
    """The destination for people."""


@dataclass(frozen=True)
class _Step:
    layer: int
    failure: LLMException | None


class LayerJob:
    """``synchronize(layer)`` blocks until a layer is final and says whether it is."""

    def __init__(self, sends: Sequence[LayerSend], synchronize: Callable[[int], object]) -> None:
        self._sends = sends
        self._synchronize = synchronize
        self._results: list[LLMStatusCode | None] = [None] * len(sends)
        self._steps: queue.SimpleQueue[_Step | None] = queue.SimpleQueue()
        self._stopped = Flag()
        self._given_up: LLMException | None = None
        """Why, where it ends before its last layer without a failure."""
        self._first: list[str] = []
        """Whether it was cancelled before a layer was moved."""
        self._failure: LLMException | None = None
        """The first one."""
        self.completion = Completion()

    def start(self) -> None:
        """Begin. Raises ``RuntimeError`` where no thread can be started."""
        apart(self._start, "datadist-layers-start")

    def _start(self) -> None:
        mover = threading.Thread(target=self._move_all, name="datadist-layers-move", daemon=True)
        waiter = threading.Thread(target=self._wait_all, name="datadist-layers-wait", daemon=False)
        start(mover)
        try:
            start(waiter)
        except RuntimeError:
            self._steps.put(None)
            raise

    def wait(self, timeout: float | None) -> bool:
        """Whether the job has ended, within ``timeout`` seconds; in a forked child nothing goes on."""
        return self.completion.wait(timeout)

    def cancel(self) -> bool:
        """End before the next layer; whether none was moved, nor ever will be."""
        if self.completion.has_come():
            return False
        self.give_up(
            LLMException(
                "the transfer was cancelled before its last layer",
                status_code=LLMStatusCode.LLM_FAILED,
            )
        )
        if self._began_first("cancelled"):
            self.completion.come()
            return True
        return False

    def give_up(self, error: LLMException) -> None:
        """End with an error before the next layer, also where nobody knows whether that is final."""
        self._given_up = self._given_up or error
        self._stopped.set()
        self._steps.put(None)

    def _began_first(self, what: str) -> bool:
        self._first.append(what)  # in C: no lock
        return self._first[0] == what

    def error(self) -> LLMException | None:
        """Why it failed, after its end."""
        unmoved = self._given_up if None in self._results else None
        return self._failure or unmoved

    @property
    def results(self) -> list[LLMStatusCode | None]:
        """A status per destination; None for one whose last layer was not reached.

        LLM_FAILED instead of None where it was cancelled, LLM_ENGINE_FINALIZED where the engine was
        finalized.
        """
        if self.completion.forked:
            ended = LLMStatusCode.LLM_ENGINE_FINALIZED
            return [ended if code is None else code for code in self._results]
        if self._given_up is not None and self.completion.has_come():
            ended = self._given_up.status_code
            return [ended if code is None else code for code in self._results]
        return list(self._results)

    # -- waiting -----------------------------------------------------------------------------

    def _wait_all(self) -> None:
        try:
            for layer in sorted({layer for send in self._sends for layer in send.layers}):
                if self._stopped.is_set():
                    return
                failure = self._wait_for(layer)
                self._steps.put(_Step(layer, failure))
                if failure is not None:
                    return
        finally:
            self._steps.put(None)

    def _wait_for(self, layer: int) -> LLMException | None:
        try:
            final = self._synchronize(layer)
        except BaseException:  # SystemExit, too, ends the thread: the task must not look complete
            log.exception("synchronize_layer(%d) raised: the task ends with LLM_FAILED", layer)
            return LLMException(
                f"synchronize_layer({layer}) raised", status_code=LLMStatusCode.LLM_FAILED
            )
        if final:
            return None
        log.error("synchronize_layer(%d) returned a false value: the task ends", layer)
        return param_invalid(f"synchronize_layer({layer}) returned a false value")

    # -- moving ------------------------------------------------------------------------------

    def _move_all(self) -> None:
        try:
            while (step := self._steps.get()) is not None:
                if not self._stopped.is_set() and self._began_first("moved"):
                    self._take(step)
        finally:
            self.completion.come_apart()

    def _take(self, step: _Step) -> None:
        for index, send in enumerate(self._sends):
            if step.layer not in send.layers:
                continue
            failure = step.failure or self._move(send, step.layer)
            if failure is not None:
                self._results[index] = failure.status_code
                self._failure = self._failure or failure
                self._stopped.set()
                if step.failure is None:
                    return
            elif step.layer == send.layers[-1]:
                self._results[index] = LLMStatusCode.LLM_SUCCESS

    @staticmethod
    def _move(send: LayerSend, layer: int) -> LLMException | None:
        started = time.monotonic()
        try:
            send.move(layer)
        except LLMException as error:
            log.error("layer %d to %s: %s", layer, send.where, error)
            return error
        except Exception as error:
            log.exception("layer %d to %s failed unexpectedly; please report it", layer, send.where)
            return LLMException(
                f"layer {layer} to {send.where} failed: {error!r}",
                status_code=LLMStatusCode.LLM_FAILED,
            )
        log.debug("layer %d to %s: %.3g s", layer, send.where, time.monotonic() - started)
        return None


class LayerJobs:
    """Those of an engine, which end with it; :meth:`begin` is for any thread."""

    def __init__(self, refusal: Callable[[], LLMException]) -> None:
        self._refusal = refusal
        self._going: set[LayerJob] = set()
        self._over = False

    def begin(self, job: LayerJob) -> None:
        """Start a job. Raises ``RuntimeError`` where no thread can be started."""
        job.completion.tell(lambda: self._going.discard(job))
        self._going.add(job)
        job.start()
        if self._over:
            job.give_up(self._refusal())

    def tell(self) -> None:
        """The end: what goes on ends before its next layer, whatever it waits for."""
        self._over = True
        for job in tuple(self._going):
            job.give_up(self._refusal())

    def close(self) -> None:
        """Their links were aborted by now."""
        self.tell()
