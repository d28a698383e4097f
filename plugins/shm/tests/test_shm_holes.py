"""Memory that its owner has not populated, or not any more: nobody else makes its pages."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from datadist_shm import ShmTransport
from datadist_shm.memory import PoolRegion

from datadist.transport import (
    Access,
    Group,
    Link,
    LinkError,
    Peer,
    Placement,
    TransferTimeout,
    TransportOptions,
)

MIB, PAGE = 1 << 20, mmap.PAGESIZE
SIZE = 16 * MIB
MADV_REMOVE = 9
FALLOC_PUNCH = 0x03
"""FALLOC_FL_PUNCH_HOLE with FALLOC_FL_KEEP_SIZE."""


class Pair:
    """An owner's region and a reader, both of this process."""

    def __init__(self, access: Access, populate: str = "0", search: str = "1") -> None:
        self.owner = ShmTransport(TransportOptions(extra={"populate": populate}))
        self.reader = ShmTransport(TransportOptions(extra={"populate": search}))
        region = self.owner.allocate(SIZE, Placement.HOST)
        assert isinstance(region, PoolRegion)
        self.region = region
        mine = self.reader.allocate(SIZE, Placement.HOST)
        self.mine = mine
        self.links = [
            transport.open(_group(rank), [memory], access)
            for rank, (transport, memory) in enumerate(
                ((self.owner, self.region), (self.reader, mine))
            )
        ]

    def attach(self) -> Link:
        """The reader's link, attached to the owner."""
        self.links[1].attach(0, self.links[0].offer(1))
        return self.links[1]

    def blocks(self) -> int:
        """Bytes of the owner's memory that exist."""
        return os.fstat(self.region.fd).st_blocks * 512

    def read(self, offset: int, size: int, write: bool = False, seconds: float = 30.0) -> None:
        """Read a range of the owner's memory into ours, or write it."""
        vectors = self.mine.address + offset, self.region.address + offset, size
        local, remote, length = (array("q", [number]) for number in vectors)
        move = self.links[1].write if write else self.links[1].read
        move(0, local, remote, length, seconds)

    def ours(self) -> Any:
        """Our memory."""
        return _bytes(self.mine.address)

    def theirs(self) -> Any:
        """The owner's memory, as the owner sees it."""
        return _bytes(self.region.address)

    def close(self) -> None:
        """Undo all."""
        for link in self.links:
            link.close()
        self.owner.release(self.region)
        self.reader.release(self.mine)


def _bytes(address: int) -> Any:
    return np.frombuffer((ctypes.c_uint8 * SIZE).from_address(address), np.uint8)


def _group(rank: int) -> Group:
    peers = {r: Peer(r, f"holes-{r}", os.getpid()) for r in (0, 1)}
    return Group("holes", rank, peers, None, time.monotonic() + 60)


@pytest.fixture
def reading() -> Iterator[Pair]:
    pair = Pair(Access.READ)
    yield pair
    pair.close()


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """The owner does not populate, although others may write."""
    monkeypatch.setattr(PoolRegion, "fill", lambda _self: None)
    pair = Pair(Access.READ_WRITE)
    yield pair
    pair.close()


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """As ``writing``; nothing maps in the background what it saw a moment before."""
    monkeypatch.setattr(PoolRegion, "fill", lambda _self: None)
    pair = Pair(Access.READ_WRITE, search="0")
    yield pair
    pair.close()


def test_attaching_makes_no_page(reading: Pair) -> None:
    reading.theirs()[5 * MIB : 6 * MIB] = 1
    before = reading.blocks()
    reading.attach()
    assert reading.blocks() == before < 2 * MIB + PAGE


@pytest.mark.parametrize("size", [1, PAGE, 300_000, SIZE - 10])
def test_reading_makes_no_page_and_reads_zeros(reading: Pair, size: int) -> None:
    reading.attach()
    reading.ours()[:] = 9
    reading.read(5, size)
    assert reading.blocks() == 0
    assert not reading.ours()[5 : 5 + size].any()
    assert (reading.ours()[5 + size :] == 9).all()


def test_what_exists_in_part_is_read_whole(reading: Pair) -> None:
    reading.attach()
    for page in range(0, SIZE // PAGE, 7):
        reading.theirs()[page * PAGE : page * PAGE + 100] = page % 251
    before = reading.blocks()
    assert before < SIZE
    reading.read(0, SIZE)
    assert reading.blocks() == before
    np.testing.assert_array_equal(reading.ours(), reading.theirs())


def test_what_is_made_later_is_read_from_the_mapping(reading: Pair) -> None:
    reading.attach()
    reading.read(0, SIZE)
    for value in (1, 2):
        reading.theirs()[:] = value
        reading.read(0, SIZE)
        assert (reading.ours() == value).all()


@pytest.mark.parametrize("size", [PAGE, SIZE])
def test_pages_that_were_taken_away_are_not_made_anew(calm: Pair, size: int) -> None:
    calm.theirs()[:] = 3
    calm.attach()
    calm.read(0, SIZE)
    assert (calm.ours() == 3).all()
    libc = ctypes.CDLL(None, use_errno=True)
    long = ctypes.c_long
    assert libc.fallocate(calm.region.fd, FALLOC_PUNCH, long(0), long(SIZE)) == 0
    time.sleep(0.05)  # what was seen counts for some milliseconds
    calm.read(0, size)
    assert calm.blocks() == 0
    assert not calm.ours()[:size].any()


@pytest.mark.parametrize("size", [PAGE, SIZE])
def test_who_writes_waits_for_the_owner_to_make_the_pages(writing: Pair, size: int) -> None:
    writing.attach()
    with pytest.raises(TransferTimeout, match="the owner has not made the pages yet") as error:
        writing.read(0, size, write=True, seconds=1.0)
    assert error.value.link_usable
    assert writing.blocks() == 0
    writing.region.keeper.make_pages(1, 0, SIZE)  # type: ignore[attr-defined]
    writing.ours()[:] = 4
    writing.read(0, size, write=True)
    assert (writing.theirs()[:size] == 4).all()


def test_an_owner_populates_what_others_may_write() -> None:
    pair = Pair(Access.READ_WRITE)
    pair.region.wait_filled(30)
    assert pair.blocks() >= SIZE
    pair.close()


def test_what_others_read_cannot_be_taken_away(reading: Pair) -> None:
    reading.theirs()[:] = 3
    reading.attach()
    libc, long = ctypes.CDLL(None, use_errno=True), ctypes.c_long
    assert libc.fallocate(reading.region.fd, FALLOC_PUNCH, long(0), long(SIZE)) == -1
    address = ctypes.c_void_p(reading.region.address)
    assert libc.madvise(address, ctypes.c_size_t(SIZE), MADV_REMOVE) == -1
    assert (reading.theirs() == 3).all()


def test_a_fence_is_its_owners_memory(writing: Pair) -> None:
    offer = writing.links[0].offer(1)
    fence = offer.fds[-1]
    assert os.fstat(fence).st_blocks > 0
    libc, long = ctypes.CDLL(None, use_errno=True), ctypes.c_long
    assert libc.fallocate(fence, FALLOC_PUNCH, long(0), long(PAGE)) == 0
    with pytest.raises(LinkError, match="a fence without memory"):
        writing.links[1].attach(0, offer)
