"""Tasks of transfers: waiting, cancelling, callbacks and asyncio (transfer_task.py)."""

from __future__ import annotations

import asyncio
import sys
import threading
from queue import SimpleQueue

import pytest

from datadist import BlocksCacheKey, LLMException, LLMStatusCode, TransferTask
from tests import background, held, interrupts, nodes
from tests.background import SECONDS, Start, start

__all__ = ["start"]


# -- cancelling ------------------------------------------------------------------------------


def _cancel_all(here: nodes.Here) -> list[bool]:
    return [task.cancel() for task in here.any["tasks"]]


def test_who_has_not_begun_is_cancelled_at_once_and_who_has_goes_on(start: Start) -> None:
    one, two = start(1), start(2)
    background.link(one, two, 1, 2)
    two.do(held.hold_moves, 1)
    assert two.do(background.hold_pulls, 6)
    assert two.do(_cancel_all) == [False] * 4 + [True] * 2
    assert two.do(background.done) == [False] * 4 + [True] * 2
    assert two.do(_cancel_all) == [False] * 6
    two.do(held.let_go)
    assert two.do(background.codes) == ["OK"] * 4 + ["LLM_FAILED"] * 2
    blocks = two.do(nodes.read, "blocks")[0]
    assert [int(blocks[number, 0]) for number in range(6)] == [1] * 4 + [2] * 2


def _results_in_time(here: nodes.Here) -> tuple[str, bool]:
    (task,) = here.any["tasks"]
    try:
        task.result(0.01)
    except LLMException as error:
        return error.status_code.name, task.done()
    return "OK", task.done()


def test_waiting_for_a_result_has_an_end(start: Start) -> None:
    one, two = start(1), start(2)
    background.link(one, two, 1, 2)
    two.do(held.hold_moves, 1)
    assert two.do(background.hold_pulls, 1)
    assert two.do(_results_in_time) == ("LLM_TIMEOUT", False)
    two.do(held.let_go)
    assert two.do(background.codes) == ["OK"]
    assert two.do(_results_in_time) == ("OK", True)


def _cancel_interrupted(here: nodes.Here, kind: type[BaseException]) -> int:
    """Cancel what waits, with an exception at one moment after another."""
    found = here.any["interrupted"] = []

    def prepare() -> tuple[TransferTask, SimpleQueue[int]]:
        task, told = background.pull(here, 1, 30), SimpleQueue[int]()
        for number in range(2):  # one of them may be the one that is interrupted
            task.add_done_callback(lambda _, number=number: told.put(number))  # type: ignore[misc]
        return task, told

    for where, state in interrupts.raising_anew(prepare, lambda state: state[0].cancel(), kind):
        found.append((where, *state))
    return len(found)


def _ended(here: nodes.Here) -> set[str]:
    """How those ended; each has told at least one of its callbacks."""
    for _, _, told in here.any["interrupted"]:
        told.get(timeout=SECONDS)
    return {background.code(task) for _, task, _ in here.any["interrupted"]}


@pytest.mark.parametrize("kind", [interrupts.Interrupt, interrupts.Watchdog])
def test_a_task_ends_though_the_call_that_cancels_it_is_interrupted(
    start: Start, kind: type[BaseException]
) -> None:
    one, two = start(1), start(2)
    background.link(one, two, 1, 2)
    two.do(held.hold_moves, 1)
    assert two.do(background.hold_pulls, 4)
    assert two.do(_cancel_interrupted, kind) > 10
    two.do(held.let_go)
    assert two.do(_ended) <= {"OK", "LLM_FAILED"}


# -- callbacks and asyncio -------------------------------------------------------------------


def _callbacks(here: nodes.Here) -> tuple[list[str], str]:
    seen: list[str] = []
    told = threading.Event()

    def again(task: TransferTask) -> None:
        key = BlocksCacheKey(1)
        outcome = background.outcome(lambda: nodes.pull_blocks(here, key, "blocks", [1], [2]))
        seen.append(f"again {outcome}")
        background.pull(here, 1, 5).add_done_callback(lambda _: told.set())

    def raises(task: TransferTask) -> None:
        seen.append("raises")
        raise ValueError("of the callback")

    task = background.pull(here, 1, 3)
    task.add_done_callback(lambda each: seen.append(f"first {each is task} {each.done()}"))
    task.add_done_callback(raises)
    task.add_done_callback(again)
    assert told.wait(SECONDS)
    task.add_done_callback(lambda _: seen.append(threading.current_thread().name))
    assert background.outcome(lambda: task.add_done_callback(None)) == "TypeError"  # type: ignore[arg-type]
    return seen, background.code(task)


def test_callbacks_may_call_the_engine_and_may_raise(start: Start) -> None:
    one, two = start(1), start(2)
    background.link(one, two, 1, 2)
    seen, code = two.do(_callbacks)
    assert (seen, code) == (["first True True", "raises", "again OK", "MainThread"], "OK")
    assert "a callback of a task raised" in nodes.said(two, "ERROR", "callback")


def _callbacks_that_exit(here: nodes.Here) -> list[str]:
    tasks = [background.pull(here, 1, number) for number in range(4)]
    told: SimpleQueue[int] = SimpleQueue()
    for task in tasks:
        task.add_done_callback(lambda _: sys.exit("of the callback"))
        task.add_done_callback(lambda _: told.put(1))
    held.let_go(here)
    assert [told.get(timeout=SECONDS) for _ in tasks] == [1] * 4
    return [background.code(task) for task in (*tasks, background.pull(here, 1, 9))]


def test_a_callback_that_exits_ends_no_thread_of_the_engine(start: Start) -> None:
    one, two = start(1), start(2, {"datadist.background_threads": "2"})
    background.link(one, two, 1, 2)
    two.do(held.hold_moves, 1)
    assert two.do(_callbacks_that_exit) == ["OK"] * 5


def _await_many(here: nodes.Here) -> tuple[list[str], int]:
    async def one(number: int) -> str:
        try:
            await background.pull(here, 1, number)
        except LLMException as error:
            return error.status_code.name
        return "OK"

    async def all_of_them() -> list[str]:
        missing = here.live.cache_manager.pull_blocks_async(
            BlocksCacheKey(1, 9), here.caches["blocks"], [0], [0]
        )
        with pytest.raises(LLMException) as caught:
            await missing
        assert caught.value.status_code is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
        done = background.pull(here, 1, 0)
        done.result(SECONDS)
        await done
        return list(await asyncio.gather(*map(one, range(40))))

    before = threading.active_count()
    return asyncio.run(all_of_them()), threading.active_count() - before


def test_asyncio_needs_no_thread_of_its_own(start: Start) -> None:
    one, two = start(1), start(2)
    background.link(one, two, 1, 2)
    results, threads = two.do(_await_many)
    assert results == ["OK"] * 40
    assert threads <= 8


def _wait_for(here: nodes.Here) -> list[str]:
    async def waits() -> list[str]:
        found = []
        for task in (here.any["tasks"][0], here.any["tasks"][-1]):
            try:
                await asyncio.wait_for(_awaiting(task), 0.05)
            except asyncio.TimeoutError:
                found.append(f"timeout, done {task.done()}")
        return found

    return asyncio.run(waits())


async def _awaiting(task: TransferTask) -> None:
    await task


def test_a_coroutine_that_is_cancelled_cancels_its_task(start: Start) -> None:
    one, two = start(1), start(2)
    background.link(one, two, 1, 2)
    two.do(held.hold_moves, 1)
    assert two.do(background.hold_pulls, 5)
    assert two.do(_wait_for) == ["timeout, done False", "timeout, done True"]
    two.do(held.let_go)
    assert two.do(background.codes) == ["OK"] * 4 + ["LLM_FAILED"]
