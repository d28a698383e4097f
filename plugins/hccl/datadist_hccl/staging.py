"""A staging buffer for local memory that a link does not expose: HCCL moves only memory bound
before.

The bytes are copied through a range of device memory that every link binds; this costs one more
local copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np

from datadist.transport import Placement, RegistrationError, TransferTimeout
from datadist_hccl.memory import Memory
from datadist_hccl.segments import Int64Array

STAGING_BYTES = 4 << 20
PAUSE = 0.0005
"""Seconds between two attempts to get the range."""


class Staging:
    """The range, which one transfer uses at a time.

    HCCL knows it from the beginning to the end: with the last registration of a process it would
    close its network devices, and the next link would wait for them.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.region = memory.allocate(STAGING_BYTES, Placement.DEVICE)
        self._users: dict[object, object] = {}
        """The call that uses the range."""
        try:
            memory.take([self.region])
        except RegistrationError:
            memory.release(self.region)
            raise

    def close(self) -> None:
        """Give the range up, once no link uses it. Raises :class:`AclError`."""
        if not self.region.released:
            self.memory.give_back([self.region])
            self.memory.release(self.region)

    def use(self, deadline: float, work: Callable[[], None]) -> None:
        """Call ``work``, which has the range exclusively; no context manager, see `Communicator.use`.

        Raises :class:`TransferTimeout`.
        """
        users, call = self._users, object()
        try:
            while users.setdefault(self.region, call) is not call:
                if time.monotonic() >= deadline:
                    raise TransferTimeout(
                        "other transfers with memory that their links do not expose took too long; "
                        "link again to expose it",
                        link_usable=True,
                    )
                time.sleep(PAUSE)
            work()
        finally:
            # Nothing is called here: what a signal handler raises would leave the range taken.
            if self.region in users and users[self.region] is call:
                del users[self.region]

    def rounds(
        self, local: Int64Array, remote: Int64Array, length: Int64Array
    ) -> Iterator[tuple[Int64Array, Int64Array, Int64Array, Int64Array]]:
        """Parts that fit at once: local, staged and remote addresses, and lengths."""
        base, rows, used = self.region.address, list[tuple[int, int, int, int]](), 0
        for mine, theirs, size in zip(
            local.tolist(), remote.tolist(), length.tolist(), strict=True
        ):
            done = 0
            while done < size:
                part = min(size - done, STAGING_BYTES - used)
                rows.append((mine + done, base + used, theirs + done, part))
                done, used = done + part, used + part
                if used == STAGING_BYTES:
                    yield _columns(rows)
                    rows, used = [], 0
        if rows:
            yield _columns(rows)


def _columns(
    rows: list[tuple[int, int, int, int]],
) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:
    local, staged, remote, length = np.array(rows, np.int64).T.copy()
    return local, staged, remote, length
