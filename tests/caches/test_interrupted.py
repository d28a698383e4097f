"""Calls that make and free caches, interrupted at every moment: an exception, or other calls inside."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import pytest

from datadist import LLMException
from datadist.caches.directory import KeyName
from tests.caches.world import DEVICE, World
from tests.interrupts import Interrupt, Watchdog, meanwhile_anew, raising_anew, spared

Act: TypeAlias = Callable[[], object]
BASE = 1 << 20
STEP = 41
"""Of a call's thousands of instructions, every so manieth."""


def _world() -> World:
    """Caches: 1 and 2 contiguous, 3 of blocks, 4 and 5 registered; 6 is freed and has a key."""
    world = World()
    world.allocate(1, 2)
    world.allocate()
    world.allocate_blocks(7)
    world.register(BASE, BASE + 4096, keys=(50,))
    world.register(BASE)
    freed = world.allocate(9)
    world.free(freed)
    world.check("at first")
    return world


def _key(number: int) -> KeyName:
    return KeyName("request", number, 0)


MAKING: dict[str, Callable[[World], object]] = {
    "allocate": lambda world: world.allocate(),
    "with keys": lambda world: world.allocate(11, 12),
    "blocks": lambda world: world.allocate_blocks(),
    "blocks with a key": lambda world: world.allocate_blocks(8),
    "register": lambda world: world.register(BASE + 8192, BASE + 16384, keys=(13,)),
    "register overlapping": lambda world: world.register(BASE + 8192, BASE + 10, BASE + 8200),
    "register shared": lambda world: world.register(BASE, BASE + 8192, BASE + 4096),
}
REFUSED: dict[str, Callable[[World], object]] = {
    "too many keys": lambda world: world.allocate(11, 12, 13),
    "a key that is bound": lambda world: world.allocate(11, 1),
    "too large": lambda world: world.allocate(11, tensors=3, slots=20),
}
FREEING: dict[str, Callable[[World], object]] = {
    "a key left": lambda world: world.free(world.caches[0]),
    "deallocate": lambda world: world.free(world.caches[1]),
    "blocks": lambda world: world.free(world.caches[2]),
    "unregister": lambda world: world.unregister(4),
    "unregister shared": lambda world: world.unregister(5),
    "unregister pooled": lambda world: world.unregister(1),
    "a key": lambda world: world.owned.remove_key(_key(2)),
    "the last key": lambda world: world.owned.remove_key(_key(9)),
}


BY_HANDLE = ("a key left", "deallocate", "blocks")


def _forget_freed(world: World) -> None:
    world.caches = [cache for cache in world.caches if cache.cache_id in world.owned._caches]


@pytest.mark.parametrize(("kind", "step"), [(Interrupt, 1), (Watchdog, 7)])
@pytest.mark.parametrize("name", MAKING)
def test_a_cache_that_the_caller_did_not_get_is_given_back(
    name: str, kind: type[BaseException], step: int
) -> None:
    for where, world in raising_anew(_world, MAKING[name], kind, step):
        world.settle()
        got = {cache.cache_id for cache in world.caches}
        assert set(world.owned._caches) == got | {6}, where
        world.check(where)
        if len(got) == 5:  # not where it came after the call
            MAKING[name](world)
            world.check(where)
        world.check_all_can_be_freed(where)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_that_is_interrupted_leaves_nothing(name: str) -> None:
    def call(world: World) -> None:
        with pytest.raises(LLMException):
            REFUSED[name](world)

    for where, world in raising_anew(_world, call):
        world.check(where)
        call(world)
        world.check(where)
        assert len(world.owned._caches) == 6, where


@pytest.mark.parametrize("name", FREEING)
def test_what_frees_can_be_repeated_after_an_exception(name: str) -> None:
    for where, world in raising_anew(_world, FREEING[name]):
        world.check(where)
        if name not in BY_HANDLE:  # the handle may be the user's no more
            FREEING[name](world)
            world.check(where)
        _forget_freed(world)
        world.check_all_can_be_freed(where)


def test_a_peer_that_answers_late_keeps_the_memory_in_spite_of_exceptions() -> None:
    for where, world in raising_anew(_world, lambda world: world.unregister(2)):
        used = world.memory.pool_usage(DEVICE)["pages_used"]
        assert used == 21, where
        world.unregister(2)
        assert world.owned.get(2) is None, where
        assert world.memory.pool_usage(DEVICE)["pages_used"] == used, where
        world.check(where)


def _used_by_a_transfer() -> World:
    world = _world()
    assert world.owned.pin(world.owned._caches[2], 1)
    world.pinned = world.owned._caches[2]
    world.unregister(2)
    world.settle()
    return world


def test_memory_that_a_transfer_uses_is_kept_in_spite_of_exceptions() -> None:
    def unpin(world: World) -> None:
        assert world.pinned is not None
        world.owned.unpin(world.pinned, 1)

    for where, world in raising_anew(_used_by_a_transfer, unpin):
        unpin(world)
        world.check(where)
        _forget_freed(world)
        world.check_all_can_be_freed(where)


def _use_and_free(world: World, several: bool) -> None:
    """As where another thread frees what a transfer uses, and peers have let go of it."""

    def free(_: object) -> None:
        world.owned.deallocate(2)
        spared(world.ack)

    if several:
        world.owned.using_all((1, 2), free)
    else:
        world.owned.using(2, free)


@pytest.mark.parametrize("several", [False, True])
def test_a_transfer_that_is_interrupted_lets_go_of_what_was_freed_meanwhile(several: bool) -> None:
    for where, world in raising_anew(_world, partial(_use_and_free, several=several)):
        assert not any(cache.pins for cache in world.owned._caches.values()), where
        world.check(where)
        _forget_freed(world)
        world.check_all_can_be_freed(where)


# -- other calls inside --------------------------------------------------------------------------


def _free(world: World, cache_id: int) -> None:
    world.free(next(cache for cache in world.caches if cache.cache_id == cache_id))


INSIDE: dict[str, Callable[[World], object]] = {
    "deallocate": lambda world: _free(world, 2),
    "blocks": lambda world: _free(world, 3),
    "a key": lambda world: world.owned.remove_key(_key(2)),
    "unregister": lambda world: world.owned.unregister(4, 60.0, certain=True, waits=False),
    "stats": lambda world: world.memory.pool_usage(DEVICE),
}


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize(
    "outside", ["with keys", "register shared", "a key left", "unregister shared"]
)
def test_freeing_inside_of_another_call(outside: str, inside: str) -> None:
    for where, world in meanwhile_anew(_world, (MAKING | FREEING)[outside], INSIDE[inside], STEP):
        world.check(where)
        _forget_freed(world)
        for cache_id, name in ((2, "deallocate"), (3, "blocks"), (4, "unregister")):
            assert (cache_id in world.owned._caches) == (inside != name), where
        world.check_all_can_be_freed(where)


@pytest.mark.parametrize("inside", ["with keys", "register shared"])
@pytest.mark.parametrize(
    "outside", ["blocks with a key", "register", "a key left", "unregister shared"]
)
def test_making_inside_of_another_call_is_done_or_refused(outside: str, inside: str) -> None:
    refused: list[str] = []

    def make(world: World) -> None:
        try:
            MAKING[inside](world)
        except RuntimeError as error:
            refused.append(str(error))

    for where, world in meanwhile_anew(_world, (MAKING | FREEING)[outside], make, STEP):
        world.check(where)
        _forget_freed(world)
        world.check_all_can_be_freed(where)
    assert refused
    assert all("inside another call" in text for text in refused)


NESTED: dict[str, Callable[[World], object]] = {
    "deallocate": lambda world: _free(world, 2),
    "a key": lambda world: world.owned.remove_key(_key(2)),
    "unregister": lambda world: world.owned.unregister(4, 60.0, certain=True, waits=False),
    "settle": lambda world: world.owned.settle(wait=False),
}


def _beside(world: World, act: Act, beside: list[threading.Thread]) -> None:
    """Run ``act`` while another thread frees a cache, unless that waits for this one."""

    def free() -> None:
        _free(world, 3)
        world.ack()

    other = threading.Thread(target=free, daemon=True)
    beside.append(other)
    other.start()
    other.join(0.02)
    act()


@pytest.mark.parametrize("inside", NESTED)
@pytest.mark.parametrize("outside", ["with keys", "a key left"])
def test_freeing_inside_of_a_call_waits_for_no_thread_that_waits_for_that_call(
    outside: str, inside: str
) -> None:
    places: list[str] = []
    beside: list[threading.Thread] = []

    def work() -> None:
        for where, world in meanwhile_anew(
            _world,
            (MAKING | FREEING)[outside],
            lambda world: _beside(world, lambda: NESTED[inside](world), beside),
            STEP,
        ):
            places.append(where)
            for other in beside:
                other.join(60)
                assert not other.is_alive(), where
            beside.clear()
            assert 3 not in world.owned._caches, where
            world.settle()
            if inside != "settle":
                freed = {"deallocate": 2, "a key": 0, "unregister": 4}[inside]
                assert freed not in world.owned._caches, where
            _forget_freed(world)
            world.check_all_can_be_freed(where)
        places.append("the end")

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(240)
    assert places[-1:] == ["the end"], f"after {places[-1:]} something hung"
    assert len(places) > 5


class _Held:
    """A user's object, in a circle, whose end frees a cache."""

    def __init__(self, free: Act) -> None:
        self.free, self.me = free, self

    def __del__(self) -> None:
        self.free()


def _work(world: World, rounds: int) -> None:
    for number in range(rounds):
        try:
            cache = world.manager.allocate_cache(world.caches[0].cache_desc)
        except LLMException:  # what is to be collected yet fills the pool
            gc.collect()
            continue
        _Held(partial(world.manager.deallocate_cache, cache))
        other = world.manager.register_cache(world.caches[3].cache_desc, [BASE, BASE + 4096])
        _Held(partial(world.owned.unregister, other.cache_id, 60.0, False, False))
        if number % 8 == 0:
            world.memory.pool_usage(DEVICE)
            world.owned.remove_key(_key(number))
    world.finished += 1


@pytest.mark.parametrize("threads", [1, 4])
def test_objects_that_free_caches_when_they_are_collected(threads: int) -> None:
    world = _world()
    done = threading.Event()

    def answer() -> None:
        while not done.wait(0.001):
            world.ack()

    answering = threading.Thread(target=answer)
    answering.start()
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        working = [
            threading.Thread(target=_work, args=(world, 60), daemon=True) for _ in range(threads)
        ]
        for thread in working:
            thread.start()
        for thread in working:
            thread.join(120)
            assert not thread.is_alive()
        assert world.finished == threads
    finally:
        gc.set_threshold(*before)
        done.set()
        answering.join()
    gc.collect()
    world.check("at the end")
    world.check_all_can_be_freed("at the end")
