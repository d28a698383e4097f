"""The generation words of one engine: one page of 64-bit words, which every link exposes that is made
after it.

A word holds the generation of the grant that has it, which is even, and an odd number afterwards. The
end of the page is scratch memory, into which this engine reads words of others.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from array import array
from collections import deque
from contextlib import suppress

from datadist.base.exclusive import Exclusive
from datadist.caches.memory import Memory
from datadist.status import LLMException, LLMStatusCode
from datadist.transport import Capabilities, Placement, Region, Transport
from datadist.transports.defects import text_of

__all__ = ["SCRATCH", "SLOTS", "Words"]

log = logging.getLogger("datadist.memory")

WORD = 8
SLOTS = 1 << 16
"""Grants with a word at one time; the readers of those beyond ask the owner."""
SCRATCH = 1 << 10
"""Words that may be read at one time."""
PAGE_BYTES = WORD * (SLOTS + SCRATCH)


class Words:
    """Our page. Where the processor does not reach it, words go through memory of the host."""

    def __init__(self, memory: Memory, transport: Transport) -> None:
        self._memory = memory
        self._transport = transport
        self._direct = True
        self._preparing = Exclusive()
        self._prepared = False
        self._page: Region | None = None
        self._host: Region | None = None
        """Memory of the host with one word of staging, and as much scratch memory as the page has."""
        self.region_id = 0
        """Id of the region; 0 where there is no page."""
        self._scratch: deque[int] = deque()
        self._fences = threading.Lock(), threading.Lock()

    def prepare(self) -> None:
        """Make the page, if there is none. Without memory for it readers ask the owner instead.

        Threads that come meanwhile wait for the one that makes it.
        """
        if not self._prepared:
            self._preparing.run(self._prepare)

    def _prepare(self) -> None:
        """What is interrupted is done again: nobody uses the page before the last step."""
        if self._prepared:
            return
        placement, direct = _place(self._transport.capabilities)
        try:
            host = page = None
            if not direct:
                _, host = self._memory.add_region(
                    WORD * (SCRATCH + 1), Placement.HOST, "staging of words"
                )
            region_id, page = self._memory.add_region(PAGE_BYTES, placement, "words")
        except LLMException as error:
            log.warning(
                "there is no page for the generations of grants, so each pull of a granted block asks "
                "the owner: %s",
                error,
            )
            self._prepared = True
            return
        self._host, self._direct, self._page = host, direct, page
        self.region_id, self._scratch = region_id, deque(range(SCRATCH))
        self._prepared = True

    def address(self, slot: int) -> int:
        """Where peers read the word of a slot."""
        assert self._page is not None
        return self._page.address + WORD * slot

    def write(self, slot: int, value: int) -> None:
        """Store a word; what this thread stores afterwards comes after it for every reader.

        Raises LLM_FAILED where the device does not take it.
        """
        address = self.address(slot)
        if self._direct:
            ctypes.c_uint64.from_address(address).value = value
        else:
            assert self._host is not None
            ctypes.c_uint64.from_address(self._host.address).value = value
            try:
                self._copy(address, self._host.address)
            except Exception as error:
                raise LLMException(
                    f"a generation word cannot be written: {text_of(error, self._transport)}",
                    status_code=LLMStatusCode.LLM_FAILED,
                ) from error
        self._fence()

    def _fence(self) -> None:
        """A full barrier: the release of one lock, and the taking of another one after that."""
        for lock in self._fences:
            with lock:
                pass

    def _copy(self, to: int, source: int) -> None:
        one = array("q", [WORD])
        self._transport.copy(array("q", [to]), array("q", [source]), one)

    # -- words of others ---------------------------------------------------------------------

    def take_scratch(self, taken: list[int]) -> None:
        """Add the number of a word that can be read into; none where all are in use, or none exist."""
        with suppress(IndexError):
            taken += map(deque.popleft, (self._scratch,))  # noted in C: an exception loses none

    def give_back(self, number: int) -> None:
        """Nothing is read into that word any more."""
        self._scratch.append(number)

    def scratch_address(self, number: int) -> int:
        """Where to read into."""
        return self.address(SLOTS + number)

    def value(self, number: int) -> int:
        """What was read. Raises what the device raises."""
        address = self.scratch_address(number)
        if not self._direct:
            assert self._host is not None
            self._copy(self._host.address + WORD * (number + 1), address)
            address = self._host.address + WORD * (number + 1)
        return int(ctypes.c_uint64.from_address(address).value)


def _place(capabilities: Capabilities) -> tuple[Placement, bool]:
    """The placement of the page, and whether the processor reaches it.

    Memory of a device that the processor does not reach is what every connection of such devices
    reaches, while memory of the host may be out of reach.
    """
    addressable = capabilities.host_addressable
    usable = capabilities.placements
    if Placement.DEVICE in usable - addressable and Placement.HOST in usable & addressable:
        return Placement.DEVICE, False
    return (Placement.HOST if Placement.HOST in usable & addressable else Placement.DEVICE), True
