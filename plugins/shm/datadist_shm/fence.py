"""The fence: ensures that no peer writes the owner's memory any more.

Where peers may write, each owner shares one page with each writer of a link. The writer counts itself
in ("active"), then reads "revoked", and does nothing if it is set; the owner sets "revoked", then
reads "active". In a total order of these accesses (they are sequentially consistent) either the
writer sees the revocation or the owner sees the writer. Seals cannot do this: they do not touch
mappings that exist.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time

from datadist.base.file_size import set_size
from datadist.base.memory_file import RESIZE_SEALS, create
from datadist_shm import _native
from datadist_shm.memory import Mapping

PAGE = mmap.PAGESIZE


class Fence:
    """The owner's end of one fence page."""

    def __init__(self) -> None:
        self._fd = create("datadist-fence")
        try:
            set_size(self._fd, PAGE)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, RESIZE_SEALS)
            self._mapping = Mapping(self._fd, PAGE, writable=True)
            self._mapping.make_pages(1, 0, PAGE)  # ours, not the writer's
        except BaseException:
            os.close(self._fd)
            raise

    def take_fd(self) -> int:
        """The descriptor for the writer, which changes hands."""
        fd, self._fd = self._fd, -1
        return fd

    def revoke(self) -> None:
        """Prevent new writes."""
        _native.revoke(self._mapping.address)

    def wait_until_empty(self, deadline: float) -> bool:
        """Wait until no writer is active; False at ``deadline`` (time.monotonic)."""
        while _native.active(self._mapping.address):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.001)
        return True
