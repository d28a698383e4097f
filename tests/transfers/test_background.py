"""Transfers in the background: tasks, their threads, who shares them, and how they end."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from datadist import BlocksCacheKey, CacheKeyByIdAndIndex, LLMException, LLMStatusCode, TransferTask
from tests import held, interrupts, nodes, tasks
from tests.nodes import Node, RemoteError

SECONDS = 60
Start = Callable[..., Node]


@pytest.fixture
def start(start_node: Start) -> Start:
    """Start an engine in one-sided mode, with a blocks cache that has its number in every word."""

    def begin(cluster: int, options: dict[str, str] | None = None, **settings: Any) -> Node:
        settings = {"enable_remote_cache_accessible": True, "sync_kv_timeout": 60_000, **settings}
        node = start_node()
        node.do(_init, cluster, options or {}, settings)
        return node

    return begin


def _init(
    here: nodes.Here, cluster: int, options: dict[str, str], settings: dict[str, Any]
) -> None:
    from datadist import LLMDataDist

    original = LLMDataDist.init

    def init(self: LLMDataDist, given: dict[str, str]) -> None:
        original(self, {**given, **options})

    LLMDataDist.init = init  # type: ignore[method-assign, assignment]
    nodes.init(here, cluster, **settings)
    nodes.make(here, "blocks", "blocks", [64, 1024], 2, BlocksCacheKey(cluster))
    nodes.make(here, "slots", "cache", [2, 1024], 2)
    for label in ("blocks", "slots"):
        for array in here.arrays[label]:
            array[:] = cluster


def _link(first: Node, second: Node, one: int, two: int) -> None:
    name, mapping = f"{one} and {two}", {one: 0, two: 1}
    first.begin(nodes.link_and_wait, name, mapping)
    second.do(nodes.link_and_wait, name, mapping)
    first.result()


def _pull(here: nodes.Here, cluster: int, block: int, **options: Any) -> TransferTask:
    return here.live.cache_manager.pull_blocks_async(
        BlocksCacheKey(cluster), here.caches["blocks"], [block], [block], **options
    )


def _code(task: TransferTask) -> str:
    try:
        task.result(SECONDS)
    except LLMException as error:
        return error.status_code.name
    return "OK"


# -- all four --------------------------------------------------------------------------------


def _move_all(here: nodes.Here) -> tuple[list[str], int, int]:
    manager, blocks, slots = here.live.cache_manager, here.caches["blocks"], here.caches["slots"]
    before, lists = threading.active_count(), ([1, 2], [3, 4])
    key = CacheKeyByIdAndIndex(1, slots.cache_id, 1)
    todo = [
        manager.pull_blocks_async(BlocksCacheKey(1), blocks, *lists),
        manager.pull_cache_async(key, slots, 0),
        manager.push_blocks_async(BlocksCacheKey(1), blocks, [0], [50]),
        manager.push_cache_async(key, slots, 1, notify=b"slot 1"),
    ]
    lists[0][0] = lists[1][0] = 9  # the task has copies
    results = [_code(task) for task in todo]
    assert all(task.done() for task in todo)
    assert [task.cancel() for task in todo] == [False] * 4
    return results, before, threading.active_count()


def test_each_moves_what_the_synchronous_call_moves(start: Start) -> None:
    one, two = start(1), start(2)
    _link(one, two, 1, 2)
    results, before, after = two.do(_move_all)
    assert results == ["OK"] * 4
    assert before < after <= before + 8
    ours, theirs = two.do(nodes.read, "blocks"), one.do(nodes.read, "blocks")
    assert [int(ours[0][block, 0]) for block in (2, 3, 4, 5, 9)] == [2, 1, 1, 2, 2]
    assert [int(theirs[1][block, 0]) for block in (49, 50)] == [1, 2]
    slots = one.do(nodes.read, "slots"), two.do(nodes.read, "slots")
    assert [int(each[0][slot, 0]) for each in slots for slot in (0, 1)] == [1, 2, 1, 2]
    assert one.do(_messages) == [(2, b"slot 1")]


def _messages(here: nodes.Here) -> list[tuple[int, bytes]]:
    deadline = time.monotonic() + SECONDS
    while not (found := here.live.messages()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return [tuple(each) for each in found]  # type: ignore[misc]


def _refusals(here: nodes.Here) -> list[str]:
    manager, blocks, slots = here.live.cache_manager, here.caches["blocks"], here.caches["slots"]
    calls: list[Callable[[], object]] = [
        lambda: manager.pull_blocks_async(BlocksCacheKey(1), blocks, [0], [64]),
        lambda: manager.pull_blocks_async(BlocksCacheKey(1), blocks, [0, 1], [3, 3]),
        lambda: manager.pull_blocks_async(BlocksCacheKey(1), blocks, ["0"], [3]),  # type: ignore[list-item]
        lambda: manager.pull_blocks_async(BlocksCacheKey(2), blocks, [0], [1]),
        lambda: manager.pull_blocks_async(BlocksCacheKey(1), blocks, [0], [1], notify="text"),  # type: ignore[arg-type]
        lambda: manager.pull_blocks_async(
            BlocksCacheKey(1), blocks, [0], [1], timeout_in_millis=-1
        ),
        lambda: manager.pull_cache_async(CacheKeyByIdAndIndex(1, 2, 0), slots, 7),
        lambda: manager.push_blocks_async(BlocksCacheKey(1), blocks, [64], [0]),
        lambda: manager.push_cache_async(CacheKeyByIdAndIndex(1, 2, 0), slots, 2),
        lambda: manager.push_blocks_async(BlocksCacheKey(1), blocks, [0], [0], nothing=1),  # type: ignore[call-arg]
    ]
    return [_outcome(call) for call in calls]


def _outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except LLMException as error:
        return error.status_code.name
    except Exception as error:
        return type(error).__name__
    return "OK"


def test_arguments_are_checked_at_the_call(start: Start) -> None:
    two = start(2)  # not linked: nothing else is looked at
    invalid = "LLM_PARAM_INVALID"
    expected = [invalid, invalid, "TypeError", invalid, "TypeError", invalid]
    assert two.do(_refusals) == [*expected, invalid, invalid, invalid, "TypeError"]


def _not_linked(here: nodes.Here) -> str:
    return _code(_pull(here, 1, 0))


def test_what_only_the_transfer_finds_is_the_tasks(start: Start) -> None:
    assert start(2).do(_not_linked) == "LLM_NOT_YET_LINK"


# -- cancelling ------------------------------------------------------------------------------


def _hold_pulls(here: nodes.Here, count: int, **options: Any) -> bool:
    """Begin pulls; whether as many are inside of the transport as may be."""
    here.any["tasks"] = [_pull(here, 1, number, **options) for number in range(count)]
    return held.inside(here, min(4, count))


def _cancel_all(here: nodes.Here) -> list[bool]:
    return [task.cancel() for task in here.any["tasks"]]


def _codes(here: nodes.Here) -> list[str]:
    return [_code(task) for task in here.any["tasks"]]


def test_who_has_not_begun_is_cancelled_at_once_and_who_has_goes_on(start: Start) -> None:
    one, two = start(1), start(2)
    _link(one, two, 1, 2)
    two.do(held.hold_moves, 1)
    assert two.do(_hold_pulls, 6)
    assert two.do(_cancel_all) == [False] * 4 + [True] * 2
    assert two.do(_done) == [False] * 4 + [True] * 2
    assert two.do(_cancel_all) == [False] * 6
    two.do(held.let_go)
    assert two.do(_codes) == ["OK"] * 4 + ["LLM_FAILED"] * 2
    blocks = two.do(nodes.read, "blocks")[0]
    assert [int(blocks[number, 0]) for number in range(6)] == [1] * 4 + [2] * 2


def _done(here: nodes.Here) -> list[bool]:
    return [task.done() for task in here.any["tasks"]]


def _results_in_time(here: nodes.Here) -> tuple[str, bool]:
    (task,) = here.any["tasks"]
    try:
        task.result(0.01)
    except LLMException as error:
        return error.status_code.name, task.done()
    return "OK", task.done()


def test_waiting_for_a_result_has_an_end(start: Start) -> None:
    one, two = start(1), start(2)
    _link(one, two, 1, 2)
    two.do(held.hold_moves, 1)
    assert two.do(_hold_pulls, 1)
    assert two.do(_results_in_time) == ("LLM_TIMEOUT", False)
    two.do(held.let_go)
    assert two.do(_codes) == ["OK"]
    assert two.do(_results_in_time) == ("OK", True)


# -- sharing ---------------------------------------------------------------------------------


def _beside(here: nodes.Here) -> list[str]:
    """Pulls from cluster 3 while those from cluster 1 are held."""
    return [_code(_pull(here, 3, number)) for number in range(20)]


def _threads(here: nodes.Here) -> int:
    names = [thread.name for thread in threading.enumerate()]
    return sum(name.startswith("datadist-background") for name in names)


@pytest.mark.parametrize("threads", [2, 8])
def test_a_peer_that_does_not_move_leaves_threads_for_others(start: Start, threads: int) -> None:
    one, two, three = start(1), start(2, {"datadist.background_threads": str(threads)}), start(3)
    _link(one, two, 1, 2)
    _link(two, three, 2, 3)
    assert two.do(_threads) == 0
    two.do(held.hold_moves, 1)
    two.do(_begin_many, 30)
    assert two.do(held.inside, threads // 2)
    assert two.do(_beside) == ["OK"] * 20
    assert two.do(_threads) <= threads
    two.do(held.let_go)
    assert two.do(_codes) == ["OK"] * 30
    assert two.do(held.most_inside) == threads // 2


def _begin_many(here: nodes.Here, count: int) -> None:
    here.any["tasks"] = [_pull(here, 1, number) for number in range(count)]


def test_an_option_outside_of_its_range_is_refused(start: Start) -> None:
    for value in ("1", "65", "many"):
        with pytest.raises(RemoteError) as caught:
            start(2, {"datadist.background_threads": value})
        assert caught.value.status == "LLM_PARAM_INVALID"
        assert value in caught.value.text


# -- callbacks and asyncio -------------------------------------------------------------------


def _callbacks(here: nodes.Here) -> tuple[list[str], str]:
    seen: list[str] = []
    told = threading.Event()

    def again(task: TransferTask) -> None:
        seen.append(
            f"again {_outcome(lambda: nodes.pull_blocks(here, BlocksCacheKey(1), 'blocks', [1], [2]))}"
        )
        _pull(here, 1, 5).add_done_callback(lambda _: told.set())

    def raises(task: TransferTask) -> None:
        seen.append("raises")
        raise ValueError("of the callback")

    task = _pull(here, 1, 3)
    task.add_done_callback(lambda each: seen.append(f"first {each is task} {each.done()}"))
    task.add_done_callback(raises)
    task.add_done_callback(again)
    assert told.wait(SECONDS)
    task.add_done_callback(lambda _: seen.append(threading.current_thread().name))
    assert _outcome(lambda: task.add_done_callback(None)) == "TypeError"  # type: ignore[arg-type]
    return seen, _code(task)


def test_callbacks_may_call_the_engine_and_may_raise(start: Start) -> None:
    one, two = start(1), start(2)
    _link(one, two, 1, 2)
    seen, code = two.do(_callbacks)
    assert (seen, code) == (["first True True", "raises", "again OK", "MainThread"], "OK")
    assert "a callback of a task raised" in nodes.said(two, "ERROR", "callback")


def _await_many(here: nodes.Here) -> tuple[list[str], int]:
    async def one(number: int) -> str:
        try:
            await _pull(here, 1, number)
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
        done = _pull(here, 1, 0)
        done.result(SECONDS)
        await done
        return list(await asyncio.gather(*map(one, range(40))))

    before = threading.active_count()
    return asyncio.run(all_of_them()), threading.active_count() - before


def test_asyncio_needs_no_thread_of_its_own(start: Start) -> None:
    one, two = start(1), start(2)
    _link(one, two, 1, 2)
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
    _link(one, two, 1, 2)
    two.do(held.hold_moves, 1)
    assert two.do(_hold_pulls, 5)
    assert two.do(_wait_for) == ["timeout, done False", "timeout, done True"]
    two.do(held.let_go)
    assert two.do(_codes) == ["OK"] * 4 + ["LLM_FAILED"]


# -- the end ---------------------------------------------------------------------------------


def _finalize_inside(here: nodes.Here) -> tuple[list[str], list[str]]:
    """Finalize with held pulls; what callbacks that came with the end found."""
    found: list[str] = []
    told = threading.Event()
    waiting, pull = here.any["tasks"][-1], _pull_of(here)

    def at_end(task: TransferTask) -> None:
        found.append(_outcome(pull))
        here.live.finalize()
        told.set()

    waiting.add_done_callback(at_end)
    here.live.finalize()
    assert told.wait(SECONDS)
    found.append(_outcome(pull))
    return _codes(here), found


def _pull_of(here: nodes.Here) -> Callable[[], object]:
    """Begins a pull of this engine, also when that is over."""
    pull, cache = here.live.cache_manager.pull_blocks_async, here.caches["blocks"]
    return lambda: pull(BlocksCacheKey(1), cache, [0], [0])


def test_finalize_ends_all_of_them(start: Start) -> None:
    one, two = start(1), start(2)
    _link(one, two, 1, 2)
    two.do(held.hold_moves, 1)
    assert two.do(_hold_pulls, 6)
    two.begin(_finalize_inside)
    codes, found = two.result()
    assert codes[4:] == ["LLM_ENGINE_FINALIZED"] * 2
    assert set(codes[:4]) <= {"LLM_FAILED", "LLM_ENGINE_FINALIZED", "OK"}
    assert found == ["LLM_ENGINE_FINALIZED"] * 2


def _callback_that_waits(here: nodes.Here) -> None:
    here.any["gate"] = threading.Event()
    entered = threading.Event()

    def wait(_task: TransferTask) -> None:
        entered.set()
        here.any["gate"].wait(SECONDS)

    _pull(here, 1, 0).add_done_callback(wait)
    assert entered.wait(SECONDS)
    here.live.finalize()
    here.any["gate"].set()


def test_finalize_does_not_wait_for_callbacks(start: Start) -> None:
    one, two = start(1), start(2)
    _link(one, two, 1, 2)
    began = time.monotonic()
    two.do(_callback_that_waits)
    assert time.monotonic() - began < SECONDS


def _fork(here: nodes.Here) -> str:
    pull = _pull_of(here)
    going = here.any["tasks"][0]
    pipe = os.pipe()
    pid = os.fork()
    if not pid:
        told: list[bool] = []
        going.add_done_callback(lambda task: told.append(task.done()))
        words = [_code(going), str(going.done()), str(going.cancel()), str(told)]
        words.append(_outcome(pull))
        os.write(pipe[1], " ".join(words).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    return os.read(pipe[0], 1000).decode()


def test_in_a_forked_child_nothing_goes_on(start: Start) -> None:
    one, two = start(1), start(2)
    _link(one, two, 1, 2)
    two.do(held.hold_moves, 1)
    assert two.do(_hold_pulls, 4)
    ended = "LLM_ENGINE_FINALIZED"
    assert two.do(_fork) == f"{ended} True False [True] {ended}"
    two.do(held.let_go)
    assert two.do(_codes) == ["OK"] * 4


def _without_threads(here: nodes.Here) -> str:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 27, limit[1]))
    try:
        return _outcome(lambda: _pull(here, 1, 0))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)


def test_where_no_thread_can_be_started_the_call_says_so(start: Start) -> None:
    one, two = start(1), start(2)
    _link(one, two, 1, 2)
    before = two.do(tasks_count)
    assert two.do(_without_threads) == "LLM_FAILED"
    assert two.do(tasks_count) == before
    two.do(_begin_many, 3)
    assert two.do(_codes) == ["OK"] * 3


def tasks_count(here: nodes.Here) -> int:
    """Threads of the node."""
    return tasks.count()


def _interrupted(here: nodes.Here) -> int:
    """Calls that begin a transfer, interrupted at one moment after another; each leaves nothing."""
    engine: Any = here.live._engine
    rounds = 0
    made: list[TransferTask] = []
    for where in interrupts.raising(lambda: made.append(_pull(here, 1, 3)), step=5):
        rounds += 1
        while made:  # the exception came when the caller had it
            made.pop().result(SECONDS)
        assert _code(_pull(here, 1, 4)) == "OK", where
    deadline = time.monotonic() + SECONDS
    while engine.background._running and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not engine.background._running
    assert not engine.background._waiting
    assert not any(view.pulls for view in engine.views.values())
    nodes.push_blocks(here, BlocksCacheKey(1), "blocks", [0], [7])
    return rounds


def test_an_interrupted_call_leaves_no_transfer(start: Start) -> None:
    one, two = start(1), start(2)
    _link(one, two, 1, 2)
    assert two.do(_interrupted, timeout=120) > 20


def _interrupted_result(here: nodes.Here) -> int:
    rounds = 0
    for where in interrupts.raising(lambda: here.any["tasks"][0].result(SECONDS), step=3):
        rounds += 1
        assert here.any["tasks"][0].done() is False, where
        if rounds == 5:
            return rounds
    return rounds


def test_an_interrupted_wait_leaves_the_task_as_it_is(start: Start) -> None:
    one, two = start(1), start(2)
    _link(one, two, 1, 2)
    two.do(held.hold_moves, 1)
    assert two.do(_hold_pulls, 1)
    assert two.do(_interrupted_result) > 0
    two.do(held.let_go)
    assert two.do(_codes) == ["OK"]
