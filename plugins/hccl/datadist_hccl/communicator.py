"""One communicator of HCCL: made, prepared with the peers, used from several threads, destroyed.

Calls of the library cannot be interrupted. `close` waits a limited time for threads that are inside
of a call. After that time the last of these threads destroys the communicator.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from datadist.transport import LinkError
from datadist_hccl import abi, names
from datadist_hccl.acl import AclError, Device
from datadist_hccl.memory import HcclRegion, Memory
from datadist_hccl.one_sided import Hccl, HcclError

log = logging.getLogger("datadist.hccl")
T = TypeVar("T")

FIRST_SLICE_SECONDS = 1
SLICE_SECONDS = 10
"""Longest single attempt to connect to the peers; an unlink is detected between two attempts."""
PAUSE = 0.2
CLOSE_PAUSE = 0.001
QUICK_SECONDS = 1.0
SPARE_ATTEMPTS = 2
"""Failures that are retried: the end of a peer's attempt looks like a failure."""
NOT_RETRYABLE = frozenset({abi.HCCL_PARA, abi.HCCL_PTR, abi.HCCL_NOT_SUPPORT, abi.HCCL_NOT_FOUND})
"""Results of an attempt that a retry would not change."""
STILL_EXISTS = frozenset({abi.HCCL_PARA, abi.HCCL_PTR, abi.HCCL_RUNTIME, abi.HCCL_AGAIN})
"""Results of HcclCommDestroy that say that the communicator is still there."""
REFUSED = frozenset({abi.ACL_INVALID, abi.ACL_NO_CONTEXT, abi.ACL_OTHER_CONTEXT})
"""Results of aclrtDestroyStream that say the same of the stream."""


class Closed(Exception):
    """The communicator was closed meanwhile."""


class Communicator:
    """A communicator and the regions that it exposes."""

    def __init__(self, device: Device, hccl: Hccl, memory: Memory, name: str) -> None:
        self.name = name
        self.hccl = hccl
        self._device = device
        self._memory = memory
        self._state = threading.RLock()
        self._inside: set[object] = set()
        """Calls that use it; :meth:`use` takes no lock."""
        self._closed = False
        self._handle: int | None = None
        self._streams: list[int] = []
        self._regions: Sequence[HcclRegion] = ()
        self._bound: list[int] = []
        self.shared: list[HcclRegion] = []
        """After the end: those of the regions that other links still expose."""
        self._named = False
        self._state_unknown = False
        """Whether the communicator may be gone, although destroying it failed."""
        self._holding = True
        device.hold()

    def use(self, work: Callable[[int], T]) -> T:
        """What ``work`` returns for the handle (0 before :meth:`create`), in the device's context.

        It is no context manager: where a handler of a signal raises at the end of one, the communicator
        would count as in use for ever. Raises :class:`Closed`.
        """
        token = object()
        try:
            self._inside.add(token)
            if self._closed:  # after the above: who closes looks at what is inside after that
                raise Closed
            with self._device.bound():
                return work(self._handle or 0)
        finally:
            self._inside.discard(token)  # in C: no handler of a signal comes before that
            if self._closed and not self._inside and (self._holding or not self.ended):
                self._end()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    @property
    def ended(self) -> bool:
        """Whether it was closed and nothing is left of it."""
        return self._closed and self._handle is None and not self._streams

    # -- the beginning -----------------------------------------------------------------------

    def create(
        self, table: str, rank: int, regions: Sequence[HcclRegion],
        traffic_class: int | None, service_level: int | None, deadline: float,
        unwanted: Callable[[], bool],
    ) -> None:  # fmt: skip
        """Make it and bind the regions, which peers reach once they are met; inside only.

        Waits for an earlier one of this name that is being destroyed. Raises :class:`LinkError`,
        :class:`Closed`.
        """
        self._take_name(deadline, unwanted)
        handles = self._memory.take(regions)
        self._regions = regions
        try:
            self._handle = self.hccl.create(table, rank, self.name, traffic_class, service_level)
            for handle in handles:
                self._bound.append(handle)
                self.hccl.call("HcclCommBindMem", self._handle, handle)
        except HcclError as error:
            raise LinkError(
                f"HCCL cannot make the communicator {self.name!r}: {error} (the environment variables "
                "HCCL_* and the rank table are what it checks)"
            ) from error

    def _take_name(self, deadline: float, unwanted: Callable[[], bool]) -> None:
        def give_up() -> bool:
            return self._closed or unwanted()

        self._named = names.take(self._device.number, self.name, deadline, give_up)
        if self._named:
            return
        if give_up():
            raise Closed
        raise LinkError(
            f"an earlier communicator {self.name!r} of this process is not destroyed yet: HCCL is still "
            "inside one of its calls"
        )

    def prepare(self, deadline: float, attempts: int, unwanted: Callable[[], bool]) -> None:
        """Meet all peers; inside only. Given up between slices when it is ``unwanted``.

        Raises :class:`LinkError`, :class:`Closed`.
        """
        assert self._handle is not None
        forgiven = attempts - 1 + SPARE_ATTEMPTS
        longest = FIRST_SLICE_SECONDS
        while True:
            began = time.monotonic()
            seconds = max(1, min(longest, int(deadline - began)))
            longest = min(2 * longest, SLICE_SECONDS)  # short at first: a mistake is noticed early
            try:
                self.hccl.prepare(self._handle, seconds)
                return
            except HcclError as error:
                now = time.monotonic()
                if error.code != abi.HCCL_TIMEOUT and now - began < QUICK_SECONDS:
                    forgiven -= 1
                if self._closed or unwanted():
                    raise Closed from error
                if error.code in NOT_RETRYABLE or forgiven < 0 or now >= deadline:
                    raise LinkError(_why_not_prepared(error)) from error
                log.debug("%s: %s; trying again", self.name, error)
            time.sleep(min(PAUSE, max(0.0, deadline - time.monotonic())))

    def remap(self, ranges: list[tuple[int, int]]) -> None:
        """Make those of the ranges (address, size) that it exposes reachable anew.

        Raises :class:`HcclError`, :class:`AclError`.
        """
        exposed = {region.address for region in self._regions}
        mine = [(address, size) for address, size in ranges if address in exposed]
        try:
            if mine:
                self.use(lambda handle: self.hccl.remap(handle, mine) if handle else None)
        except Closed:
            return

    def create_stream(self) -> int:
        """A stream that ends with the communicator; inside only."""
        stream = self._device.runtime.create_stream()
        self._streams.append(stream)
        return stream

    def destroy_stream(self, stream: int) -> None:
        """Drop what is queued on a stream, and the stream; inside only.

        Raises :class:`AclError` where it was not stopped, or not destroyed.
        """
        self._device.runtime.call("aclrtStreamAbort", stream)
        try:
            self._device.runtime.call("aclrtDestroyStream", stream)
        except AclError as error:
            if error.code in REFUSED:
                raise
            self._mark_state_unknown("a stream", error)
        self._streams.remove(stream)

    def _mark_state_unknown(self, what: str, error: Exception) -> None:
        """Do not use an object again that may be destroyed already: that would end the process."""
        self._holding = False
        log.error(
            "%r: whether %s is gone is not known, device %d stays open: %s",
            self.name, what, self._device.number, error,
        )  # fmt: skip

    # -- the end -----------------------------------------------------------------------------

    def close(self, grace_seconds: float) -> bool:
        """Destroy it, or let the last thread inside do that after ``grace_seconds`` seconds.

        Returns whether it is gone.
        """
        with self._state:
            first, self._closed = not self._closed, True
        deadline = time.monotonic() + grace_seconds
        while self._inside and time.monotonic() < deadline:
            time.sleep(CLOSE_PAUSE)
        if not self._inside and (first or not self.ended):
            self._end()
        return self.ended

    def _end(self) -> None:
        with self._state:  # held to the end, so that every caller of close finds it done
            try:
                with self._device.bound():
                    self._destroy_all()
            except AclError as error:
                log.error("closing the communicator %r: %s", self.name, error)
                return
            if self._holding and self.ended:
                self._holding = False
                self._try(self._device.drop)

    def _destroy_all(self) -> None:
        for stream in list(self._streams):
            self._try(self.destroy_stream, stream)
        for memory in list(self._bound):
            if self._try(self._unbind, memory):
                self._bound.remove(memory)
        if self._handle is not None and not self._state_unknown:
            self._destroy(self._handle)
        if self.ended and self._regions:
            self.shared = self._memory.give_back(self._regions)
            self._regions = ()
        if self._named and self._handle is None:
            self._named = False
            names.give_back(self._device.number, self.name)

    def _destroy(self, handle: int) -> None:
        try:
            self.hccl.destroy(handle)
            self._handle = None
        except HcclError as error:
            self._state_unknown = error.code not in STILL_EXISTS
            if self._state_unknown:
                self._mark_state_unknown("the communicator", error)
            else:
                log.error("closing the communicator %r: %s", self.name, error)

    def _unbind(self, memory: int) -> None:
        try:
            self.hccl.call("HcclCommUnbindMem", self._handle, memory)
        except HcclError as error:
            if error.code != abi.HCCL_PARA:  # PARA: it was not bound, as binding it had failed
                raise

    def _try(self, step: Callable[..., object], *args: object) -> bool:
        try:
            step(*args)
        except (AclError, HcclError) as error:
            log.error("closing the communicator %r: %s", self.name, error)
            return False
        return True


def _why_not_prepared(error: HcclError) -> str:
    text = f"HCCL did not meet all ranks: {error}"
    if error.code == abi.HCCL_TIMEOUT:
        return text + "; a rank did not link in time, or its rank table differs"
    if error.code == abi.HCCL_INTERNAL:
        return text + (
            "; registered memory may be unfit: DEVICE memory needs 2 MiB alignment and huge pages "
            "over HCCS, HOST memory over RDMA must come from the pool or aclrtMallocHost"
        )
    if error.code == abi.HCCL_NOT_SUPPORT:
        return text + "; these chips have no HCCS connection: set HCCL_INTRA_ROCE_ENABLE=1"
    return text
