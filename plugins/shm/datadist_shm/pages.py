"""Pages of pools: huge pages if the machine has them, and populating in the background."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from array import array
from pathlib import Path
from typing import Protocol

from datadist.base.flag import Flag
from datadist.base.memory_file import create_sealed
from datadist.base.threads import start
from datadist.transport import RegistrationError
from datadist_shm import _native
from datadist_shm.forking import let_go_in_children

log = logging.getLogger("datadist.shm")

TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage")
RESERVED = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
HUGE = 2 << 20
SLICE = 32 << 20
"""Bytes that are populated in one call: 5 to 20 ms of work."""
IMPROVE_SECONDS = 30.0
"""How long who waits for pages waits for huge ones: on a busy machine that may take minutes."""
STOP_SECONDS = 0.02
"""How long to wait for threads that need microseconds to stop, unless all processors are busy."""


def transparent() -> bool:
    """Whether the kernel gives shared memory huge pages that it is asked for."""
    general = _selected(TRANSPARENT / "shmem_enabled")
    sized = _selected(TRANSPARENT / f"hugepages-{HUGE >> 10}kB" / "shmem_enabled")
    if general in ("deny", "force"):
        return general == "force"
    return (general if sized in ("inherit", "") else sized) in ("always", "within_size", "advise")


def _selected(path: Path) -> str:
    """The word in brackets of a sysfs choice."""
    with contextlib.suppress(OSError):
        return path.read_text().partition("[")[2].partition("]")[0]
    return ""


def on_demand() -> bool:
    """Whether the kernel makes a huge page that it is told to make. Raises OSError."""
    fd = create_sealed("datadist-probe", HUGE)
    try:
        address = _native.map(fd, HUGE, True, True)
        try:
            left = bytearray(1)
            how, _ = _native.huge_make(address, HUGE, fd, 0, left, array("q", [0]))
            return how == _native.HUGE_MADE and not left[0]
        finally:
            _native.unmap(address, HUGE)
    finally:
        os.close(fd)


def reserved() -> int:
    """Bytes of reserved huge pages that are free."""
    with contextlib.suppress(OSError, ValueError):
        return int(RESERVED.read_text()) * HUGE
    return 0


def choose(requested: str, size: int) -> tuple[str, int]:
    """Kind of pages (``transparent``, ``reserved``, ``small``) and the size, in whole reserved ones.

    Small ones are made huge where the kernel does that on demand, which is no promise. Raises
    :class:`RegistrationError` where huge pages are a must and there are none.
    """
    if requested != "0" and transparent():
        return "transparent", size
    if requested != "1":
        return "small", size
    whole = -(-size // HUGE) * HUGE
    if reserved() >= whole:
        return "reserved", whole
    raise RegistrationError(
        f"huge pages for {size} bytes were asked for (datadist.shm.huge_pages is 1) and this "
        f"machine has none: write advise to {TRANSPARENT / 'shmem_enabled'}, or reserve "
        f"{whole // HUGE} pages (sysctl vm.nr_hugepages; {reserved() // HUGE} are free)"
    )


class Pages(Protocol):
    """Memory whose pages can be made."""

    size: int


class PageMaker(Protocol):
    """Makes pages until a flag is not 0. It keeps no memory mapped."""

    def make(self, begin: int, size: int, stop: array[int]) -> None:
        """Those of a part. Raises OSError."""

    def improve(self, stop: array[int]) -> None:
        """Replace them by faster ones, once all are there."""


class Filling:
    """Populates the pages of a new pool in the background; the pool can be used meanwhile.

    The threads of the program go first: an engine that begins to link has just made its pool. So pages
    are touched by native threads of low priority. The kernel makes them for this one, which needs the
    GIL and therefore has the program's priority.

    The pages are kept by this object alone, not by frames of its thread: a child that is forked meanwhile
    inherits these, and nobody ends them there.
    """

    def __init__(self, pages: Pages, maker: PageMaker) -> None:
        self._pages: Pages | None = pages
        self._done = Flag()
        """Whether all pages are there, or cannot be had, or are not wanted any more."""
        self._ended = Flag()
        """Whether the thread has no more use for the pages."""
        self._stop = array("q", [0])
        self._error: int | None = None
        """The number; the exception would keep the pages mapped by its frames."""
        self._left: list[int] = []
        """The file, once it is only used here."""
        thread = threading.Thread(
            target=self._run, args=(pages.size, maker), name="datadist-shm-pages", daemon=True
        )
        let_go_in_children(self)
        start(thread)  # first: one that does not start would keep the pages in a circle with this
        self._thread = thread

    def _run(self, size: int, maker: PageMaker) -> None:
        try:
            self._make_all(size, maker)
            if self.done:
                maker.improve(self._stop)
        finally:
            self._pages = None
            self._ended.set()
            self._close()

    def _make_all(self, size: int, maker: PageMaker) -> None:
        try:
            for begin in range(0, size, SLICE):
                if self._stop[0]:
                    break
                maker.make(begin, min(SLICE, size - begin), self._stop)
        except OSError as error:
            self._error = error.errno or 0
            log.error("the pages of a pool cannot be had: %s", os.strerror(self._error))
        finally:
            self._done.set()

    def leave(self) -> None:
        """See :mod:`datadist_shm.forking`."""
        self._pages = None
        self._close()

    def _close(self) -> None:
        with contextlib.suppress(IndexError):
            os.close(self._left.pop())

    @property
    def done(self) -> bool:
        """Whether all pages are there."""
        return self._done.is_set() and self._error is None and not self._stop[0]

    def wait(self, timeout: float) -> None:
        """Until all pages are there, and for a while until huge ones have replaced the small ones.

        At most ``timeout`` seconds. Raises :class:`RegistrationError`.
        """
        deadline = time.monotonic() + timeout
        self._done.wait(timeout)
        self._ended.wait(min(max(0.0, deadline - time.monotonic()), IMPROVE_SECONDS))
        self.check()

    def check(self) -> None:
        """Raise :class:`RegistrationError` where it has failed by now."""
        if self._error is not None:
            text = os.strerror(self._error)
            raise RegistrationError(f"the pages of the pool cannot be had: {text}")

    def stop(self, file: int) -> None:
        """End early, and close the file of the pages; both later where no processor is left for that.

        The pages stay mapped until then.
        """
        self._left.append(file)
        self._stop[0] = 1
        try:
            self._thread.join(STOP_SECONDS)
        finally:
            if self._ended.is_set():
                self._close()
