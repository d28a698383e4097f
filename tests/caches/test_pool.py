"""The page pool: its placement policy, its errors, and a model it must agree with."""

from __future__ import annotations

from threading import Thread

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from datadist.caches.pool import PagePool, PoolExhausted

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
    assert pool.pages_free == 3
    assert len(pool.allocate([PAGE] * 3)) == 3


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
