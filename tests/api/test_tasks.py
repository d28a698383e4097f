"""Tasks of layer-wise transfers, as any other task: done, result, cancel, callbacks, await."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from datadist import CacheTask, LLMException, LLMStatusCode, TransferTask
from datadist.status import param_invalid
from datadist.transfers.layerwise import LayerJob, LayerSend

SECONDS = 60


class Layers:
    """Three layers to one destination; each is final, and moves, when the test says so."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.final = [threading.Event() for _ in range(3)]
        self.may_move = threading.Event()
        self.moving = threading.Event()
        self.moved: list[int] = []
        self._fails_at = fails_at
        self.job = LayerJob([LayerSend(range(3), self._move, "a test")], self._wait)
        self.task = CacheTask(self.job)
        self.job.start()

    def _wait(self, layer: int) -> bool:
        return self.final[layer].wait(SECONDS)

    def _move(self, layer: int) -> None:
        self.moving.set()
        assert self.may_move.wait(SECONDS)
        if layer == self._fails_at:
            raise param_invalid(f"layer {layer} is wrong")
        self.moved.append(layer)

    def let_go(self) -> None:
        """Let everything happen."""
        self.may_move.set()
        for event in self.final:
            event.set()


def _code(call: Callable[[], object]) -> str:
    with pytest.raises(LLMException) as caught:
        call()
    return caught.value.status_code.name


def test_a_task_that_goes_well() -> None:
    layers, told = Layers(), list[bool]()
    assert isinstance(layers.task, TransferTask)
    layers.task.add_done_callback(lambda task: told.append(task is layers.task and task.done()))
    assert not layers.task.done()
    assert _code(lambda: layers.task.result(0.01)) == "LLM_TIMEOUT"
    layers.let_go()
    layers.task.result(SECONDS)
    asyncio.run(_awaited(layers.task))
    assert told == [True]
    assert not layers.task.cancel()
    assert layers.task.synchronize() is LLMStatusCode.LLM_SUCCESS


async def _awaited(task: TransferTask) -> None:
    await task


def test_the_result_is_the_first_failure() -> None:
    layers = Layers(fails_at=1)
    layers.let_go()
    with pytest.raises(LLMException, match="layer 1 is wrong") as caught:
        layers.task.result(SECONDS)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert layers.task.get_results() == [LLMStatusCode.LLM_PARAM_INVALID]


def test_cancelled_before_a_layer_was_moved_it_is_over_at_once() -> None:
    layers = Layers()
    assert layers.task.cancel()
    assert layers.task.done()
    assert _code(layers.task.result) == "LLM_FAILED"
    assert layers.task.synchronize() is LLMStatusCode.LLM_FAILED
    assert layers.task.get_results() == [LLMStatusCode.LLM_FAILED]
    layers.let_go()
    assert not layers.task.cancel()
    assert layers.moved == []


def test_cancelled_later_it_ends_before_its_next_layer() -> None:
    layers = Layers()
    layers.final[0].set()
    assert layers.moving.wait(SECONDS)
    assert not layers.task.cancel()
    assert not layers.task.done()
    layers.let_go()
    assert _code(lambda: layers.task.result(SECONDS)) == "LLM_FAILED"


def test_cancelled_while_a_layer_is_waited_for_it_ends_without_that() -> None:
    layers = Layers()
    layers.final[0].set()
    layers.may_move.set()
    deadline = time.monotonic() + SECONDS
    while layers.moved != [0] and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not layers.task.cancel()
    assert _code(lambda: layers.task.result(SECONDS / 2)) == "LLM_FAILED"
    assert layers.moved == [0]
    layers.let_go()
    assert layers.task.synchronize() is LLMStatusCode.LLM_FAILED
    assert layers.moved == [0]


@pytest.mark.parametrize(
    ("value", "error"), [(-1, ValueError), ("1", TypeError), (True, TypeError)]
)
def test_a_wrong_timeout_is_refused(value: object, error: type[Exception]) -> None:
    layers = Layers()
    with pytest.raises(error, match=str(value)):
        layers.task.result(value)  # type: ignore[arg-type]
    layers.let_go()
    layers.task.result(SECONDS)
