"""What an offer may say of the peer's memory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
import tracemalloc
from typing import Any, NoReturn

import numpy as np
import pytest
from datadist_shm import ShmTransport
from datadist_shm import link as link_module
from datadist_shm.fence import PAGE
from datadist_shm.memory import F_SEAL_FUTURE_WRITE, descriptor_for_peer
from datadist_shm.offer import check_descriptor, parse_offer
from hypothesis import given
from hypothesis import strategies as st

from datadist.base.memory_file import RESIZE_SEALS
from datadist.transport import (
    Access,
    Group,
    LinkError,
    Offer,
    Peer,
    Placement,
    TransportOptions,
)

BASE = 1 << 40
Range = tuple[int, int]


def _offer(ranges: list[Range]) -> bytes:
    regions = [
        {"id": number, "address": address, "size": size, "fd": None}
        for number, (address, size) in enumerate(ranges)
    ]
    return json.dumps({"version": 1, "writable": False, "regions": regions, "fence": None}).encode()


@pytest.mark.parametrize(
    ("ranges", "where"),
    [
        ([(BASE, 100), (BASE + 99, 10)], BASE + 99),
        ([(BASE + 99, 10), (BASE, 100)], BASE + 99),
        ([(BASE, 100), (BASE, 100)], BASE),
        ([(BASE, 100), (BASE, 1)], BASE),
        ([(BASE, 100), (BASE + 10, 5)], BASE + 10),
        ([(BASE, 100), (BASE + 200, 100), (BASE + 299, 1)], BASE + 299),
        ([(1, (1 << 63) - 1), (BASE, 1)], BASE),
    ],
)
def test_regions_that_overlap_are_refused(ranges: list[Range], where: int) -> None:
    with pytest.raises(LinkError, match=f"offer of rank 3 overlap at {where:#x}") as error:
        parse_offer(3, _offer(ranges), 0)
    assert error.value.rank == 3


@pytest.mark.parametrize(
    "ranges", [[], [(BASE, 100)], [(BASE + 100, 1), (BASE, 100), (BASE + 101, 50)]]
)
def test_regions_may_touch(ranges: list[Range]) -> None:
    offer = parse_offer(3, _offer(ranges), 0)
    assert [(region.address, region.size) for region in offer.regions] == ranges


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 12)), max_size=5))
def test_every_overlap_is_found(ranges: list[Range]) -> None:
    places = [place for address, size in ranges for place in range(address, address + size)]
    try:
        parse_offer(3, _offer(ranges), 0)
    except LinkError:
        assert len(set(places)) < len(places)
    else:
        assert len(set(places)) == len(places)


def _memory(seals: int, size: int = 4096) -> int:
    fd = os.memfd_create("offered", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


@pytest.mark.parametrize(
    ("seals", "size", "text"),
    [
        (0, 4096, "could still resize"),
        (fcntl.F_SEAL_GROW, 4096, "could still resize"),
        (fcntl.F_SEAL_SHRINK, 4096, "could still resize"),
        (RESIZE_SEALS, 4095, "offers 4096 bytes in a file of 4095 bytes"),
        (RESIZE_SEALS, 8192, "offers 4096 bytes in a file of 8192 bytes"),
        (RESIZE_SEALS, 4096, None),
        (RESIZE_SEALS | fcntl.F_SEAL_SEAL, 4096, None),
    ],
)
def test_memory_has_its_size_for_good(seals: int, size: int, text: str | None) -> None:
    fd = _memory(seals, size)
    try:
        if text is None:
            check_descriptor(1, fd, 4096)
        else:
            with pytest.raises(LinkError, match=text):
                check_descriptor(1, fd, 4096)
    finally:
        os.close(fd)


def test_pages_are_kept_where_no_hole_can_be_punched() -> None:
    for seals, kept in ((RESIZE_SEALS, False), (RESIZE_SEALS | F_SEAL_FUTURE_WRITE, True)):
        fd = _memory(seals)
        assert check_descriptor(1, fd, 4096).stays is kept
        os.close(fd)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file another user's")
def test_memory_of_another_user_is_refused() -> None:
    fd = _memory(RESIZE_SEALS)
    try:
        os.fchown(fd, 12345, -1)
        with pytest.raises(LinkError, match="memory of user 12345"):
            check_descriptor(1, fd, 4096)
    finally:
        os.close(fd)


def test_what_is_no_memory_file_is_refused() -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(LinkError, match="sent a descriptor that is no memory"):
            check_descriptor(1, reading, 0)
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize(
    ("places", "fence", "count"),
    [
        ([0, 0], None, 1),
        ([0, 0], 1, 2),
        ([0, 1], 1, 2),
        ([1], None, 2),
        ([0], None, 2),
        ([1], 0, 1),
    ],
)
def test_each_descriptor_is_named_once(places: list[int], fence: int | None, count: int) -> None:
    regions = [
        {"id": number, "address": BASE + 8192 * number, "size": 4096, "fd": place}
        for number, place in enumerate(places)
    ]
    data = {"version": 1, "writable": fence is not None, "regions": regions, "fence": fence}
    with pytest.raises(LinkError, match=f"names descriptors .* and came with {count}"):
        parse_offer(1, json.dumps(data).encode(), count)


def test_an_offer_is_taken_once() -> None:
    transport = ShmTransport(TransportOptions())
    peers = {rank: Peer(rank, f"engine-{rank}", os.getpid()) for rank in (0, 1)}
    group = Group("once", 0, peers, None, time.monotonic() + 60)
    link = transport.open(group, [], Access.READ)
    link.attach(1, Offer(_offer([(BASE, 4096)])))
    with pytest.raises(LinkError, match="cannot attach rank 1: it was attached before"):
        link.attach(1, Offer(_offer([(BASE, 8192)])))
    link.close()
    with pytest.raises(LinkError, match="cannot attach rank 1: this link is closed"):
        link.attach(1, Offer(_offer([(BASE, 4096)])))


def test_regions_may_come_in_any_order() -> None:
    memory = np.arange(4 * 4096, dtype=np.int64).view(np.uint8)
    base = memory.ctypes.data
    transport = ShmTransport(TransportOptions())
    peers = {rank: Peer(rank, f"engine-{rank}", os.getpid()) for rank in (0, 1)}
    group = Group("order", 0, peers, None, time.monotonic() + 60)
    link = transport.open(group, [], Access.READ)
    link.attach(1, Offer(_offer([(base + start, 4096) for start in (8192, 0, 16384)])))
    for start in (0, 8192, 16384):
        target = np.zeros(4096, np.uint8)
        vectors = ([target.ctypes.data], [base + start], [4096])
        local, remote, length = (np.array(vector, np.int64) for vector in vectors)
        link.read(1, local, remote, length, 30.0)
        np.testing.assert_array_equal(target, memory[start : start + 4096])
    link.close()


@pytest.mark.parametrize("item", [b"{}", b"0", b"[]", b'{"address":0}'])
@pytest.mark.parametrize("count", [20_000, 1 << 20])
def test_wrong_regions_in_great_numbers_cost_little(item: bytes, count: int) -> None:
    data = b'{"version":1,"writable":false,"fence":null,"regions":[%b]}' % b",".join([item] * count)
    tracemalloc.start()
    with pytest.raises(LinkError, match="offer of rank 3 is not valid") as caught:
        parse_offer(3, data, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(str(caught.value)) < 500
    assert peak < 20 << 20


# -- making one --------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_an_offer_that_cannot_be_made_leaves_no_descriptor(
    monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    made: list[int] = []

    def no_more(*_args: Any) -> NoReturn:
        raise OSError(errno.EMFILE, "Too many open files")

    def descriptor(*args: Any) -> int:
        made.append(no_more() if len(made) + 1 == fails else descriptor_for_peer(*args))
        return made[-1]

    monkeypatch.setattr(link_module, "descriptor_for_peer", descriptor)
    if fails == 3:  # the last one, that of the fence
        monkeypatch.setattr(link_module, "Fence", no_more)
    transport = ShmTransport(TransportOptions())
    regions = [transport.allocate(PAGE, Placement.HOST) for _ in range(2)]
    group = Group("offer", 0, {0: Peer(0, "us"), 1: Peer(1, "them")}, None, time.monotonic() + 60)
    link = transport.open(group, regions, Access.READ_WRITE)
    try:
        with pytest.raises(LinkError, match=r"offer for rank 1: .*Too many open files"):
            link.offer(1)
        assert len(made) == fails - 1
        for fd in made:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)
    finally:
        link.close()
        for region in regions:
            transport.release(region)
