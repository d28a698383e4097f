"""The memory pool: whole pages of one memory region, handed out run by run.

Policy (LLM-DataDist API, memory pools): every tensor takes whole pages, at least one; a free run
of exactly that length is reused, the most recently freed first, else the smallest longer run gives
its high-address end; freed runs merge with free neighbours at once. Nothing here waits.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from threading import Lock

from datadist.base.portable import Portable

__all__ = ["PagePool", "PoolExhausted"]


class PoolExhausted(Portable):
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
        self._lock = Lock()
        self._used: dict[int, int] = {}
        self._pages_used = 0
        self._runs: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        # Runs by length; a dict per length keeps the order in which they became free.
        self._bins: dict[int, dict[int, None]] = {}
        self._lengths: list[int] = []
        self._insert(0, self._capacity)

    def __repr__(self) -> str:
        return (
            f"PagePool({self._base:#x}, {self._pages_used} of {self._capacity} pages "
            f"of {self.page_size} bytes used)"
        )

    @property
    def page_size(self) -> int:
        """Bytes of one page."""
        return 1 << self._shift

    @property
    def pages_used(self) -> int:
        """Pages handed out."""
        return self._pages_used

    @property
    def pages_free(self) -> int:
        """Pages not handed out; they need not be adjacent."""
        return self._capacity - self._pages_used

    @property
    def largest_run(self) -> int:
        """Pages of the longest free run: the largest single allocation that would succeed."""
        with self._lock:
            return self._lengths[-1] if self._lengths else 0

    def allocate(self, sizes: Sequence[int]) -> list[int]:
        """Addresses of one allocation per size in bytes, or none of them at all.

        Raises :class:`PoolExhausted` when one does not fit, :class:`ValueError` for a size < 1.
        """
        pages = [self._pages_of(size) for size in sizes]
        taken: list[int] = []
        with self._lock:
            before = self.pages_free
            for count in pages:
                start = self._take(count)
                if start is None:
                    error = self._exhausted(pages, len(taken), sizes[len(taken)], before)
                    for page in reversed(taken):
                        self._give_back(page)
                    raise error
                taken.append(start)
        return [self._base + (start << self._shift) for start in taken]

    def free(self, address: int) -> None:
        """Return the allocation at ``address``; its pages can be had again at once.

        Raises :class:`ValueError` when nothing is allocated there.
        """
        page, rest = divmod(address - self._base, self.page_size)
        with self._lock:
            if rest or page not in self._used:
                raise ValueError(f"no allocation of this pool starts at {address:#x}")
            self._give_back(page)

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
            "Free caches or raise memory_size"
        )
        return PoolExhausted(message, requested, before, largest)

    def _take(self, count: int) -> int | None:
        """First page of a run of ``count`` pages that is now used; None if there is none."""
        index = bisect_left(self._lengths, count)
        if index == len(self._lengths):
            return None
        length = self._lengths[index]
        run = next(reversed(self._bins[length]))
        self._remove(run)
        if length > count:
            self._insert(run, length - count)
        start = run + length - count
        self._used[start] = count
        self._pages_used += count
        return start

    def _give_back(self, start: int) -> None:
        count = self._used.pop(start)
        self._pages_used -= count
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
