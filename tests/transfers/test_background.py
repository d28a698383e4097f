"""Transfers in the background: what they move, who shares their threads, and their end."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from datadist import BlocksCacheKey, CacheKeyByIdAndIndex, TransferTask
from tests import background, held, interrupts, nodes, tasks
from tests.background import SECONDS, Start, start
from tests.nodes import RemoteError
from tests.waiting import until

__all__ = ["start"]


# -- all four --------------------------------------------------------------------------------


def _move_all(here: nodes.Here) -> tuple[list[str], int]:
    manager, blocks, slots = here.live.cache_manager, here.caches["blocks"], here.caches["slots"]
    lists = [1, 2], [3, 4]
    key = CacheKeyByIdAndIndex(1, slots.cache_id, 1)
    todo = [
        manager.pull_blocks_async(BlocksCacheKey(1), blocks, *lists),
        manager.pull_cache_async(CacheKeyByIdAndIndex(1, slots.cache_id, 0), slots, 0),
        manager.push_blocks_async(BlocksCacheKey(1), blocks, [0], [50]),
        manager.push_cache_async(key, slots, 1, notify=b"slot 1"),
    ]
    lists[0][0] = lists[1][0] = 9  # the task has copies
    results = [background.code(task) for task in todo]
    assert all(task.done() for task in todo)
    assert [task.cancel() for task in todo] == [False] * 4
    return results, _threads(here)


def test_each_moves_what_the_synchronous_call_moves(start: Start) -> None:
    one, two = start(1), start(2)
    background.link(one, two, 1, 2)
    assert two.do(_threads) == 0
    results, threads = two.do(_move_all)
    assert results == ["OK"] * 4
    assert 0 < threads <= 8
    ours, theirs = two.do(nodes.read, "blocks"), one.do(nodes.read, "blocks")
    assert [int(ours[0][block, 0]) for block in (2, 3, 4, 5, 9)] == [2, 1, 1, 2, 2]
    assert [int(theirs[1][block, 0]) for block in (49, 50)] == [1, 2]
    slots = one.do(nodes.read, "slots"), two.do(nodes.read, "slots")
    assert [int(each[0][slot, 0]) for each in slots for slot in (0, 1)] == [1, 2, 1, 2]
    assert one.do(_messages) == [(2, b"slot 1")]


class _List(list[int]):
    """A list of a program's own kind."""


def _reuse_lists(here: nodes.Here) -> None:
    """Begin pulls of block 1 to blocks 40 and on, which have to wait, and use their lists for others."""
    source: list[Any] = [_List([1]), [1], np.array([1])]
    kinds: list[Callable[[list[int]], Any]] = [_List, list, np.array]
    for number, kind in enumerate(kinds):
        target = kind([40 + number])
        here.any["tasks"].append(
            here.live.cache_manager.pull_blocks_async(
                BlocksCacheKey(1), here.caches["blocks"], source[number], target
            )
        )
        source[number][0] = target[0] = 50 + number


def test_lists_of_every_kind_are_copied(start: Start) -> None:
    one, two = start(1), start(2)
    background.link(one, two, 1, 2)
    two.do(held.hold_moves, 1)
    assert two.do(background.hold_pulls, 4)
    two.do(_reuse_lists)
    two.do(held.let_go)
    assert two.do(background.codes) == ["OK"] * 7
    blocks = two.do(nodes.read, "blocks")[0]
    assert [int(blocks[block, 0]) for block in (40, 41, 42, 50, 51, 52)] == [1] * 3 + [2] * 3


def _messages(here: nodes.Here) -> list[tuple[int, bytes]]:
    deadline = time.monotonic() + SECONDS
    while not (found := here.live.messages()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return [tuple(each) for each in found]


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
    return [background.outcome(call) for call in calls]


def test_arguments_are_checked_at_the_call(start: Start) -> None:
    two = start(2)  # not linked: nothing else is looked at
    invalid = "LLM_PARAM_INVALID"
    expected = [invalid, invalid, "TypeError", invalid, "TypeError", invalid]
    assert two.do(_refusals) == [*expected, invalid, invalid, invalid, "TypeError"]


def _not_linked(here: nodes.Here) -> str:
    return background.code(background.pull(here, 1, 0))


def test_what_only_the_transfer_finds_is_the_tasks(start: Start) -> None:
    assert start(2).do(_not_linked) == "LLM_NOT_YET_LINK"


# -- sharing ---------------------------------------------------------------------------------


def _beside(here: nodes.Here) -> list[str]:
    """Pulls from cluster 3 while those from cluster 1 are held."""
    return [background.code(background.pull(here, 3, number)) for number in range(20)]


def _threads(here: nodes.Here) -> int:
    """Those that move in the background; the one that starts the first of them ends by itself."""
    names = [thread.name for thread in threading.enumerate()]
    return sum(bool(re.fullmatch(r"datadist-background-\d+", name)) for name in names)


@pytest.mark.parametrize("threads", [2, 8])
def test_a_peer_that_does_not_move_leaves_threads_for_others(start: Start, threads: int) -> None:
    one, two, three = start(1), start(2, {"datadist.background_threads": str(threads)}), start(3)
    background.link(one, two, 1, 2)
    background.link(two, three, 2, 3)
    assert two.do(_threads) == 0
    two.do(held.hold_moves, 1)
    two.do(_begin_many, 30)
    assert two.do(held.inside, threads // 2)
    assert two.do(_beside) == ["OK"] * 20
    assert two.do(_threads) <= threads
    two.do(held.let_go)
    assert two.do(background.codes) == ["OK"] * 30
    assert two.do(held.most_inside) == threads // 2


def _begin_many(here: nodes.Here, count: int) -> None:
    here.any["tasks"] = [background.pull(here, 1, number) for number in range(count)]


def test_an_option_outside_of_its_range_is_refused(start: Start) -> None:
    for value in ("1", "65", "many"):
        with pytest.raises(RemoteError) as caught:
            start(2, {"datadist.background_threads": value})
        assert caught.value.status == "LLM_PARAM_INVALID"
        assert value in caught.value.text


# -- the end ---------------------------------------------------------------------------------


def _finalize_inside(here: nodes.Here) -> tuple[list[str], list[str]]:
    """Finalize with held pulls; what callbacks that came with the end found."""
    found: list[str] = []
    told = threading.Event()
    waiting, pull = here.any["tasks"][-1], background.pull_of(here)

    def at_end(task: TransferTask) -> None:
        found.append(background.outcome(pull))
        here.live.finalize()
        told.set()

    waiting.add_done_callback(at_end)
    here.live.finalize()
    assert told.wait(SECONDS)
    found.append(background.outcome(pull))
    return background.codes(here), found


def test_finalize_ends_all_of_them(start: Start) -> None:
    one, two = start(1), start(2)
    background.link(one, two, 1, 2)
    two.do(held.hold_moves, 1)
    assert two.do(background.hold_pulls, 6)
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

    background.pull(here, 1, 0).add_done_callback(wait)
    assert entered.wait(SECONDS)
    here.live.finalize()
    here.any["gate"].set()


def test_finalize_does_not_wait_for_callbacks(start: Start) -> None:
    one, two = start(1), start(2)
    background.link(one, two, 1, 2)
    began = time.monotonic()
    two.do(_callback_that_waits)
    assert time.monotonic() - began < SECONDS


def _fork(here: nodes.Here) -> str:
    pull = background.pull_of(here)
    going = here.any["tasks"][0]
    pipe = os.pipe()
    pid = os.fork()
    if not pid:
        told: list[bool] = []
        going.add_done_callback(lambda task: told.append(task.done()))
        words = [background.code(going), str(going.done()), str(going.cancel()), str(told)]
        words.append(background.outcome(pull))
        os.write(pipe[1], " ".join(words).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    return os.read(pipe[0], 1000).decode()


def test_in_a_forked_child_nothing_goes_on(start: Start) -> None:
    one, two = start(1), start(2)
    background.link(one, two, 1, 2)
    two.do(held.hold_moves, 1)
    assert two.do(background.hold_pulls, 4)
    ended = "LLM_ENGINE_FINALIZED"
    assert two.do(_fork) == f"{ended} True False [True] {ended}"
    two.do(held.let_go)
    assert two.do(background.codes) == ["OK"] * 4


def _without_threads(here: nodes.Here) -> str:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 27, limit[1]))
    try:
        return background.outcome(lambda: background.pull(here, 1, 0))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)


def test_where_no_thread_can_be_started_the_call_says_so(start: Start) -> None:
    one, two = start(1), start(2)
    background.link(one, two, 1, 2)
    before = two.do(_tasks)
    assert two.do(_without_threads) == "LLM_FAILED"
    assert two.do(_tasks_fall_to, before)
    two.do(_begin_many, 3)
    assert two.do(background.codes) == ["OK"] * 3


def _tasks(here: nodes.Here) -> int:
    """Threads of the node; some that make pages may be about to end."""
    return tasks.count()


def _tasks_fall_to(here: nodes.Here, number: int) -> bool:
    return tasks.falls_to(number)


def _interrupted(here: nodes.Here) -> int:
    """Calls that begin a transfer, interrupted at one moment after another; each leaves nothing."""
    engine: Any = here.live._engine
    rounds = 0
    made: list[TransferTask] = []
    for where in interrupts.raising(lambda: made.append(background.pull(here, 1, 3)), step=5):
        rounds += 1
        while made:  # the exception came when the caller had it
            made.pop().result(SECONDS)
        assert background.code(background.pull(here, 1, 4)) == "OK", where
    until(lambda: _rests(engine.background), SECONDS)
    assert not any(view.pulls for view in engine.views.values())
    nodes.push_blocks(here, BlocksCacheKey(1), "blocks", [0], [7])
    return rounds


def _rests(background: Any) -> bool:
    """Whether nothing waits or goes on; a thread has what it took of the queue until it is idle again."""
    with background._lock:
        idle = background._idle == background._threads and not background._submitted.qsize()
        return bool(idle) and not (background._running or background._waiting)


def test_an_interrupted_call_leaves_no_transfer(start: Start) -> None:
    one, two = start(1), start(2)
    background.link(one, two, 1, 2)
    assert two.do(_interrupted, timeout=120) > 20


def _left_waiting(here: nodes.Here) -> list[str]:
    """Calls that are interrupted while no transfer can begin; where one was left that nobody knows."""
    engine: Any = here.live._engine
    made, found = list[TransferTask](), []
    for where in interrupts.raising(lambda: made.append(background.pull(here, 1, 3))):
        while engine.background._submitted.qsize():
            time.sleep(0.001)
        with engine.background._lock:
            each = [one for waiting in engine.background._waiting.values() for one in waiting]
        known = {id(task._job) for task in made}
        if any(not (one.completion.has_come() or id(one) in known) for one in each):
            found.append(where)
            for one in each:
                one.cancel()
    return found


def test_an_interrupted_call_leaves_nothing_that_begins_later(start: Start) -> None:
    one, two = start(1), start(2)
    background.link(one, two, 1, 2)
    two.do(held.hold_moves, 1)
    assert two.do(background.hold_pulls, 4)
    found = two.do(_left_waiting)
    two.do(held.let_go)
    assert found == []


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
    background.link(one, two, 1, 2)
    two.do(held.hold_moves, 1)
    assert two.do(background.hold_pulls, 1)
    assert two.do(_interrupted_result) > 0
    two.do(held.let_go)
    assert two.do(background.codes) == ["OK"]
