"""The memory pool: whole pages of one memory region, handed out run by run.

Policy (LLM-DataDist API, memory pools): every tensor takes whole pages, at least one; a free run
of exactly that length is reused, the most recently freed first, else the smallest longer run gives
its high-address end; freed runs merge with free neighbours at once. Nothing here waits.

What is handed out is one dict, which changes in one step. What is free follows from that, and is found
anew where an exception interrupted a change.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import TypeAlias

from datadist.base.exclusive import Exclusive
from datadist.base.picklable import PicklableError

__all__ = ["PagePool", "PoolExhausted", "Run"]

Run: TypeAlias = "tuple[int, int]"
"""First page and pages of an allocation; each one is an object of its own."""


class PoolExhausted(PicklableError):
    """The pool has no run of free pages that is long enough.

    ``requested``, ``free`` and ``largest_run`` are pages: those of the whole call, those free when
    it began, and the longest free run left when the first allocation did not fit.
    """

    def __init__(self, message: str, requested: int, free: int, largest_run: int) -> None:
        super().__init__(message)
        self.requested = requested
        self.free = free
        self.largest_run = largest_run


class PagePool:
    """Allocator of page runs in ``[base, base + size)``; a partial last page is never used.

    ``size`` is in bytes, pages are ``1 << page_shift`` bytes. Addresses are aligned to pages
    relative to ``base``. All methods may be called from any thread.

    Raises :class:`ValueError` when not even one page fits.
    """

    def __init__(self, base: int, size: int, page_shift: int) -> None:
        self._base = base
        self._shift = page_shift
        self._capacity = size >> page_shift
        if self._capacity < 1:
            raise ValueError(
                f"a pool of {size} bytes holds no page of {1 << page_shift} bytes: "
                "raise memory_size or lower page_shift"
            )
        self._state = Exclusive()
        self._whole = False
        """Whether what is noted of the free pages is right."""
        self._used: dict[int, Run] = {}
        """By first page: what all of the rest follows from."""
        self._mend()

    def __repr__(self) -> str:
        return (
            f"PagePool({self._base:#x}, {self.pages_used} of {self._capacity} pages "
            f"of {self.page_size} bytes used)"
        )

    @property
    def page_size(self) -> int:
        """Bytes of one page."""
        return 1 << self._shift

    @property
    def pages(self) -> int:
        """All there are."""
        return self._capacity

    @property
    def pages_used(self) -> int:
        """Pages handed out."""
        if self._whole:
            return self._pages_used
        return sum(pages for _, pages in list(self._used.values()))

    @property
    def pages_free(self) -> int:
        """Pages not handed out; they need not be adjacent."""
        return self._capacity - self.pages_used

    @property
    def largest_run(self) -> int:
        """Pages of the longest free run: the largest single allocation that would succeed."""
        return self._state.run(self._largest)

    def allocate(self, sizes: Sequence[int], runs: list[Run] | None = None) -> list[int]:
        """Addresses of one allocation per size in bytes, or none of them at all.

        ``runs`` gets them as :meth:`free_runs` takes them, also where an exception interrupts this.

        Raises :class:`PoolExhausted` when one does not fit, :class:`ValueError` for a size < 1,
        ``RuntimeError`` inside of another call of the same thread.
        """
        pages = [self._pages_of(size) for size in sizes]
        taken = [] if runs is None else runs
        self._state.run(lambda: self._allocate(sizes, pages, taken))
        return [self._base + (start << self._shift) for start, _ in taken]

    def free(self, address: int) -> None:
        """Return the allocation at ``address``; its pages can be had again at once.

        Raises :class:`ValueError` when nothing is allocated there.
        """
        page, rest = divmod(address - self._base, self.page_size)
        run = None if rest else self._used.get(page)
        if run is None:
            raise ValueError(f"no allocation of this pool starts at {address:#x}")
        self.free_runs([run])

    def free_runs(self, runs: Sequence[Run]) -> None:
        """Return allocations; those that were returned before are left alone.

        Waits for nobody: a thread that allocates or frees at this moment returns them after that.
        """
        self._state.post(lambda: self._free(runs))

    def _allocate(self, sizes: Sequence[int], pages: list[int], runs: list[Run]) -> None:
        self._mend()
        before = self.pages_free
        self._whole = False
        taken: list[Run] = []
        for count in pages:
            start = self._take(count)
            if start is None:
                error = self._exhausted(pages, len(taken), sizes[len(taken)], before)
                for run in reversed(taken):
                    self._give_back(*run)
                self._whole = True
                raise error
            taken.append((start, count))
        runs += taken  # noted before they are used: an exception in between takes nothing
        self._used.update({run[0]: run for run in taken})
        self._pages_used += sum(pages)
        self._whole = True

    def _free(self, runs: Sequence[Run]) -> None:
        self._mend()
        self._whole = False
        for run in runs:
            if self._used.get(run[0]) is run:
                del self._used[run[0]]
                self._pages_used -= run[1]
                self._give_back(*run)
        self._whole = True

    def _mend(self) -> None:
        """Find out what is free, unless that is known."""
        if self._whole:
            return
        self._runs: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        # Runs by length; a dict per length keeps the order in which they became free.
        self._bins: dict[int, dict[int, None]] = {}
        self._lengths: list[int] = []
        self._pages_used = 0
        end = 0
        for start, pages in sorted([*self._used.values(), (self._capacity, 0)]):
            if start > end:
                self._insert(end, start - end)
            end = start + pages
            self._pages_used += pages
        self._whole = True

    def _largest(self) -> int:
        self._mend()
        return self._lengths[-1] if self._lengths else 0

    def _pages_of(self, size: int) -> int:
        if size < 1:
            raise ValueError(f"cannot allocate {size} bytes: a size is at least 1")
        return -(-size >> self._shift)

    def _exhausted(self, pages: list[int], index: int, size: int, before: int) -> PoolExhausted:
        largest = self._lengths[-1] if self._lengths else 0
        requested = sum(pages)
        message = (
            f"the memory pool is exhausted: {len(pages)} allocation(s) need {requested} pages of "
            f"{self.page_size} bytes and {before} of {self._capacity} are free; number {index} "
            f"({size} bytes) needs a run of {pages[index]} and the longest free run is {largest}. "
            + self._remedy(requested)
        )
        return PoolExhausted(message, requested, before, largest)

    def _remedy(self, pages: int) -> str:
        if pages <= self._capacity:
            return "Free caches or raise memory_size"
        needed, size = (number << self._shift for number in (pages, self._capacity))
        return f"They need {needed} bytes and the pool has {size}: raise memory_size"

    def _take(self, count: int) -> int | None:
        """First page of a run of ``count`` pages that is free no more; None if there is none."""
        index = bisect_left(self._lengths, count)
        if index == len(self._lengths):
            return None
        length = self._lengths[index]
        run = next(reversed(self._bins[length]))
        self._remove(run)
        if length > count:
            self._insert(run, length - count)
        return run + length - count

    def _give_back(self, start: int, count: int) -> None:
        end = start + count
        before = self._ends.get(start)
        if before is not None:
            self._remove(before)
            start = before
        if end in self._runs:
            end += self._remove(end)
        self._insert(start, end - start)

    def _insert(self, start: int, length: int) -> None:
        self._runs[start] = length
        self._ends[start + length] = start
        if length not in self._bins:
            self._bins[length] = {}
            insort(self._lengths, length)
        self._bins[length][start] = None

    def _remove(self, start: int) -> int:
        length = self._runs.pop(start)
        del self._ends[start + length]
        runs = self._bins[length]
        del runs[start]
        if not runs:
            del self._bins[length]
            del self._lengths[bisect_left(self._lengths, length)]
        return length
