"""The page pool: its placement policy, its errors, and a model it must agree with."""

from __future__ import annotations

from contextlib import suppress
from threading import Thread

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from datadist.caches.pool import PagePool, PoolExhausted, Run
from tests.interrupts import Interrupt, meanwhile_anew, raise_at, raising_anew

BASE = 0x7000_0123_4000
PAGE = 1 << 10


def pool_of(pages: int) -> PagePool:
    return PagePool(BASE, pages * PAGE, 10)


def pages_of(addresses: list[int]) -> list[int]:
    return [(address - BASE) // PAGE for address in addresses]


def test_a_fresh_pool_hands_out_descending_addresses() -> None:
    assert pages_of(pool_of(8).allocate([PAGE, 1, PAGE + 1])) == [7, 6, 4]


def test_a_partial_last_page_is_never_used() -> None:
    pool = PagePool(BASE, 3 * PAGE - 1, 10)
    assert pool.pages_free == 2
    with pytest.raises(PoolExhausted):
        pool.allocate([1, 1, 1])
    assert pool.pages_free == 2


def test_an_exact_run_is_reused_most_recently_freed_first() -> None:
    pool = pool_of(10)
    kept = pool.allocate([PAGE] * 7)
    for index in (1, 5, 3):
        pool.free(kept[index])
    assert pool.allocate([PAGE] * 3) == [kept[3], kept[5], kept[1]]


def test_without_an_exact_run_the_smallest_longer_one_gives_its_high_end() -> None:
    pool = pool_of(20)
    # From the top: 3 pages, a guard, 2 pages, a guard; 13 pages stay free below.
    three, _, two, _ = pool.allocate([3 * PAGE, PAGE, 2 * PAGE, PAGE])
    pool.free(three)
    pool.free(two)
    assert pool.allocate([PAGE]) == [two + PAGE]
    assert pool.allocate([2 * PAGE]) == [three + PAGE]


def test_the_documented_example_fills_the_pool_exactly() -> None:
    pool = PagePool(BASE, 262144, 16)
    tensors = pool.allocate([65536] * 4)
    with pytest.raises(PoolExhausted):
        pool.allocate([1])
    for address in tensors:
        pool.free(address)
    assert pool.largest_run == 4


def test_exhaustion_gives_the_numbers_and_keeps_nothing() -> None:
    pool = pool_of(5)
    pages = pool.allocate([PAGE] * 5)
    for index in (0, 2, 4):
        pool.free(pages[index])
    with pytest.raises(PoolExhausted) as caught:
        pool.allocate([PAGE, 2 * PAGE])
    error = caught.value
    assert (error.requested, error.free, error.largest_run) == (3, 3, 1)
    assert "need 3 pages of 1024 bytes and 3 of 5 are free" in str(error)
    assert "number 1 (2048 bytes) needs a run of 2 and the longest free run is 1" in str(error)
    assert str(error).endswith("Free caches or raise memory_size")
    assert pool.pages_free == 3
    assert len(pool.allocate([PAGE] * 3)) == 3


def test_freeing_is_no_remedy_for_more_than_the_pool_has() -> None:
    with pytest.raises(PoolExhausted) as caught:
        pool_of(5).allocate([PAGE] * 4 + [2 * PAGE])
    assert str(caught.value).endswith(
        "They need 6144 bytes and the pool has 5120: raise memory_size"
    )


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no page of 1024 bytes"):
        PagePool(BASE, PAGE - 1, 10)
    pool = pool_of(4)
    with pytest.raises(ValueError, match="cannot allocate 0 bytes"):
        pool.allocate([PAGE, 0])
    assert pool.pages_used == 0
    (address,) = pool.allocate([2 * PAGE])
    for wrong in (address + 1, address + PAGE, address - PAGE, 0):
        with pytest.raises(ValueError, match="no allocation of this pool"):
            pool.free(wrong)
    pool.free(address)
    with pytest.raises(ValueError, match="no allocation of this pool"):
        pool.free(address)


def test_threads_never_share_a_page() -> None:
    pool = pool_of(64)
    overlaps: list[int] = []
    owner: dict[int, int] = {}

    def work(me: int) -> None:
        for _ in range(300):
            mine = pages_of(pool.allocate([PAGE] * 8))
            for page in mine:
                if owner.setdefault(page, me) != me:
                    overlaps.append(page)
            for page in mine:
                del owner[page]
                pool.free(BASE + page * PAGE)

    threads = [Thread(target=work, args=(me,)) for me in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not overlaps
    assert (pool.pages_used, pool.largest_run) == (0, 64)


class PoolAgainstModel(RuleBasedStateMachine):
    """A model that keeps one flag per page must always agree."""

    PAGES = 24

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool_of(self.PAGES)
        self.held: dict[int, int] = {}

    def busy(self) -> list[bool]:
        flags = [False] * self.PAGES
        for start, count in self.held.items():
            for page in range(start, start + count):
                assert not flags[page], "two allocations overlap"
                flags[page] = True
        return flags

    def longest(self) -> int:
        text = "".join("x" if flag else "." for flag in self.busy())
        return max(len(run) for run in text.split("x"))

    @rule(sizes=st.lists(st.integers(1, 6 * PAGE), max_size=5))
    def allocate(self, sizes: list[int]) -> None:
        pages = [-(-size // PAGE) for size in sizes]
        try:
            addresses = self.pool.allocate(sizes)
        except PoolExhausted as error:
            self.check_refusal(error, pages)
            return
        assert all((address - BASE) % PAGE == 0 for address in addresses)
        new = dict(zip(pages_of(addresses), pages, strict=True))
        assert not new.keys() & self.held.keys()
        self.held.update(new)

    def check_refusal(self, error: PoolExhausted, pages: list[int]) -> None:
        assert error.requested == sum(pages)
        assert error.largest_run < max(pages)
        if len(pages) == 1:
            assert self.longest() < pages[0]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        start = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[start]
        self.pool.free(BASE + start * PAGE)

    @rule()
    def free_everything(self) -> None:
        for start in self.held:
            self.pool.free(BASE + start * PAGE)
        self.held.clear()
        assert self.pool.largest_run == self.PAGES

    @invariant()
    def agrees(self) -> None:
        flags = self.busy()
        assert self.pool.pages_used == sum(flags)
        assert self.pool.pages_free == self.PAGES - sum(flags)
        assert self.pool.largest_run == self.longest()


TestPoolAgainstModel = PoolAgainstModel.TestCase


# -- interrupted ---------------------------------------------------------------------------------


class _Fragmented:
    """A pool with free runs of 1, 2 and 9 pages, and what is taken of it."""

    def __init__(self) -> None:
        self.pool = pool_of(20)
        self.runs: list[Run] = []
        self.new: list[Run] = []
        sizes = [PAGE, 2 * PAGE, PAGE, PAGE, 3 * PAGE, PAGE, 2 * PAGE]
        taken = self.pool.allocate(sizes, self.runs)
        for index in (3, 1):
            self.pool.free(taken[index])
            del self.runs[index]

    def take_one(self) -> None:
        self.pool.allocate([PAGE], self.runs)

    def check(self, where: str) -> None:
        """Exactly the runs are taken, and all can be had in one piece once they are returned."""
        pages = [page for start, count in self.runs for page in range(start, start + count)]
        assert len(pages) == len(set(pages)), where
        assert self.pool.pages_used == len(pages), where
        self.pool.free_runs(self.runs)
        assert self.pool.pages_free == self.pool.largest_run == 20, where
        self.pool.allocate([20 * PAGE])


SIZES = [[1], [PAGE, 2 * PAGE, 3 * PAGE], [PAGE] * 8, [4 * PAGE, 99 * PAGE]]


@pytest.mark.parametrize("sizes", SIZES)
def test_an_allocation_that_is_interrupted_took_all_or_nothing(sizes: list[int]) -> None:
    def call(world: _Fragmented) -> None:
        with suppress(PoolExhausted):
            world.pool.allocate(sizes, world.new)

    wanted = sum(-(-size // PAGE) for size in sizes)
    for where, world in raising_anew(_Fragmented, call):
        kept = sum(count for _, count in world.runs)
        assert world.pool.pages_used in (kept, kept + wanted), where
        world.take_one()
        world.pool.free_runs(world.new)
        world.check(where)


def test_memory_that_was_noted_and_not_taken_is_not_returned_for_another() -> None:
    for where, world in raising_anew(
        _Fragmented, lambda world: world.pool.allocate([1], world.new)
    ):
        world.take_one()
        world.pool.free_runs(world.new)
        world.pool.free_runs(world.new)
        world.check(where)


@pytest.mark.parametrize("which", [[0], [2], [0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])
def test_a_return_that_is_interrupted_can_be_repeated(which: list[int]) -> None:
    def call(world: _Fragmented) -> None:
        world.pool.free_runs(world.new)

    def prepare() -> _Fragmented:
        world = _Fragmented()
        world.new = [world.runs[index] for index in which]
        world.runs = [run for run in world.runs if run not in world.new]
        return world

    for where, world in raising_anew(prepare, call):
        world.take_one()
        call(world)
        world.check(where)


def test_what_is_freed_inside_of_a_call_is_freed_after_it() -> None:
    def inside(world: _Fragmented) -> None:
        world.pool.free_runs([world.runs.pop(), world.runs.pop()])

    for where, world in meanwhile_anew(
        _Fragmented, lambda world: world.pool.allocate([PAGE, 2 * PAGE], world.new), inside
    ):
        world.runs += world.new
        world.check(where)


class InterruptedPool(RuleBasedStateMachine):
    """Calls that end normally, and calls that an exception ends at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool_of(24)
        self.runs: list[Run] = []

    @rule(sizes=st.lists(st.integers(1, 6 * PAGE), max_size=5), moment=st.integers(1, 80))
    def allocate(self, sizes: list[int], moment: int) -> None:
        new: list[Run] = []

        def call() -> None:
            with suppress(PoolExhausted):
                self.pool.allocate(sizes, new)

        if raise_at(moment, call, Interrupt):
            self.pool.free_runs(new)
        else:
            self.runs += new

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), moment=st.integers(1, 60))
    def free(self, data: st.DataObject, moment: int) -> None:
        picked = data.draw(st.lists(st.sampled_from(self.runs), unique=True))
        if raise_at(moment, lambda: self.pool.free_runs(picked), Interrupt):
            self.pool.free_runs(picked)
        self.runs = [run for run in self.runs if run not in picked]

    @invariant()
    def agrees(self) -> None:
        pages = [page for start, count in self.runs for page in range(start, start + count)]
        assert len(pages) == len(set(pages)) == self.pool.pages_used
        free = "".join("x" if page in pages else "." for page in range(24))
        assert self.pool.largest_run == max(map(len, free.split("x")))


TestInterruptedPool = InterruptedPool.TestCase
