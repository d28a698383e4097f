"""Links of the shm transport between real processes, without core."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import multiprocessing
import os
import signal
import socket
import threading
import time
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from datadist_shm import ShmTransport
from datadist_shm.link import AT_ONCE_FDS, ShmLink, Unsettled, _note_flight
from datadist_shm.memory import PeerMapping, PoolRegion
from datadist_shm.offer import OfferData, RegionOffer
from numpy.typing import NDArray

from datadist.base.memory_file import RESIZE_SEALS, create
from datadist.rank_table import RankTable
from datadist.transport import (
    Access,
    AddressError,
    Group,
    LinkError,
    Offer,
    Peer,
    PeerLost,
    Placement,
    Region,
    RegistrationError,
    TransferError,
    TransferTimeout,
    TransportError,
    TransportOptions,
    Unsupported,
)
from tests import descriptors, tasks
from tests.resident import resident
from tests.waiting import until

SIZE = 1 << 20
SPAWN = multiprocessing.get_context("spawn")


def _group(rank: int, pid: int, pidfd: int, name: str) -> Group:
    other = 1 - rank
    peers = {rank: Peer(rank, f"engine-{rank}"), other: Peer(other, f"engine-{other}", pid, pidfd)}
    return Group(
        name, rank, dict(sorted(peers.items())), RankTable("1.0", ()), time.monotonic() + 60
    )


def _owner(sock: socket.socket, pid: int, access: str, links: int, memory: str, size: int) -> None:
    """The peer: gives one region to ``links`` links, then does as it is told."""
    transport = ShmTransport(TransportOptions())
    own = bytearray(size)
    if memory == "pool":
        region = transport.allocate(size, Placement.HOST)
    else:
        address = ctypes.addressof((ctypes.c_char * size).from_buffer(own))
        region = transport.register(address, size, Placement.HOST)
    ctypes.memset(region.address, 7, size)
    if size > SIZE:
        _words(region.address, size)[:] = np.arange(size // 8)
    pidfd = os.pidfd_open(pid)
    opened = []
    for number in range(links):
        link = transport.open(_group(1, pid, pidfd, f"l{number}"), [region], Access(access))
        offer = link.offer(0)
        socket.send_fds(sock, [offer.data], list(offer.fds))
        for fd in offer.fds:
            os.close(fd)
        opened.append(link)
        sock.recv(1)
    while True:
        order = sock.recv(100).decode()
        if order == "close":
            sock.send(json.dumps([sorted(link.close()) for link in opened]).encode())
        elif order == "sum":
            data = ctypes.string_at(region.address, SIZE)
            sock.send(json.dumps([sum(data), data[0]]).encode())
        else:
            return


def _words(address: int, size: int) -> NDArray[np.int64]:
    return np.frombuffer((ctypes.c_char * size).from_address(address), np.int64)


class Pair:
    """A puller in this process and its owner in another one."""

    def __init__(
        self, access: Access, links: int = 1, memory: str = "pool", size: int = SIZE, **extra: str
    ) -> None:
        self.sock, theirs = socket.socketpair()
        args = (theirs, os.getpid(), access.value, links, memory, size)
        self.process = SPAWN.Process(target=_owner, args=args, daemon=True)
        self.process.start()
        theirs.close()
        assert self.process.pid is not None
        self.pid = self.process.pid
        self.pidfd = os.pidfd_open(self.pid)
        self.transport = ShmTransport(TransportOptions(extra=extra))
        self.region = self.transport.allocate(size, Placement.HOST)
        self.links = []
        self.sock.settimeout(60)  # a new interpreter imports all of this first
        for number in range(links):
            link = self.transport.open(
                _group(0, self.pid, self.pidfd, f"l{number}"), [self.region], access
            )
            data, fds, _, _ = socket.recv_fds(self.sock, 65536, 16)
            self.data, self.fds = data, [os.dup(fd) for fd in fds]
            link.attach(1, Offer(data, fds))
            self.sock.send(b"k")
            self.links.append(link)
        self.remote = json.loads(self.data)["regions"][0]["address"]

    def move(
        self, offset: int, size: int, timeout: float = 60, write: bool = False, number: int = 0
    ) -> None:
        local, remote = array("q", [self.region.address]), array("q", [self.remote + offset])
        link = self.links[number]
        (link.write if write else link.read)(1, local, remote, array("q", [size]), timeout)

    def ask(self, order: str) -> Any:
        self.sock.send(order.encode())
        return json.loads(self.sock.recv(65536))

    def close(self) -> None:
        for link in self.links:
            link.close()
        for fd in self.fds:
            os.close(fd)
        self.transport.release(self.region)
        self.sock.close()
        os.kill(self.pid, signal.SIGCONT) if self.process.is_alive() else None
        self.process.kill()
        self.process.join()
        os.close(self.pidfd)


@pytest.fixture
def reading() -> Iterator[Pair]:
    """A pair with read access."""
    pair = Pair(Access.READ)
    yield pair
    pair.close()


@pytest.fixture
def writing() -> Iterator[Pair]:
    """A pair with read and write access."""
    pair = Pair(Access.READ_WRITE)
    yield pair
    pair.close()


def _own(pair: Pair) -> bytes:
    return ctypes.string_at(pair.region.address, SIZE)


@pytest.mark.parametrize("memory", ["pool", "user"])
def test_a_read_moves_these_bytes_only(memory: str) -> None:
    pair = Pair(Access.READ, memory=memory)
    try:
        pair.move(10, 1000)
        assert _own(pair) == b"\7" * 1000 + bytes(SIZE - 1000)
    finally:
        pair.close()


@pytest.mark.parametrize(("offset", "size"), [(-1, 10), (SIZE - 5, 6), (0, SIZE + 1), (1 << 40, 1)])
def test_ranges_outside_of_the_offer_move_nothing(reading: Pair, offset: int, size: int) -> None:
    good, bad = (reading.remote, 16), (reading.remote + offset, size)
    local = array("q", [reading.region.address] * 2)
    remote, length = array("q", [good[0], bad[0]]), array("q", [good[1], bad[1]])
    with pytest.raises(AddressError, match="not memory that rank 1 offered"):
        reading.links[0].read(1, local, remote, length, 5)
    assert _own(reading) == bytes(SIZE)


def test_read_access_cannot_be_turned_into_write_access(reading: Pair) -> None:
    with pytest.raises(Unsupported):
        reading.move(0, 8, write=True)
    (fd,) = reading.fds
    with pytest.raises(PermissionError):
        mmap.mmap(fd, SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    with pytest.raises(PermissionError):
        mmap.mmap(again, SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.pwrite(again, b"x", 0)
    os.close(again)


def test_a_write_arrives(writing: Pair) -> None:
    ctypes.memset(writing.region.address, 9, SIZE)
    writing.move(0, SIZE, write=True)
    assert writing.ask("sum") == [9 * SIZE, 9]


def test_deadline_abort_and_close(reading: Pair) -> None:
    with pytest.raises(TransferTimeout):
        reading.move(0, 8, timeout=0)
    reading.move(0, 8)
    reading.links[0].abort(1)
    with pytest.raises(TransferError, match="aborted"):
        reading.move(0, 8)
    assert reading.links[0].close() == frozenset()
    with pytest.raises(TransferError, match="closed"):
        reading.move(0, 8)


def test_a_dead_owner_is_reported(reading: Pair) -> None:
    reading.process.kill()
    reading.process.join()
    with pytest.raises(PeerLost) as caught:
        reading.move(0, 8)
    assert caught.value.rank == 1


def test_after_the_owner_closed_nothing_is_written(writing: Pair) -> None:
    assert writing.ask("close") == [[]]
    ctypes.memset(writing.region.address, 9, SIZE)
    with pytest.raises(TransferError, match="unlinked"):
        writing.move(0, SIZE, write=True)
    assert writing.ask("sum")[1] == 7


def test_a_member_that_keeps_its_mapping_can_use_it_after_the_owner_closed(writing: Pair) -> None:
    """No mapping can be taken away: the fence stops who keeps to it (SECURITY.md, shm)."""
    with mmap.mmap(writing.fds[0], SIZE) as kept:
        assert writing.ask("close") == [[]]
        assert kept[0] == 7
        kept[0] = 9
        assert writing.ask("sum")[1] == 9


def test_a_member_that_keeps_its_mapping_can_read_and_not_write(reading: Pair) -> None:
    with mmap.mmap(reading.fds[0], SIZE, prot=mmap.PROT_READ) as kept:
        assert reading.ask("close") == [[]]
        assert kept[SIZE - 1] == 7
        with pytest.raises(TypeError, match="readonly"):
            kept[0] = 9


def test_a_writer_that_stopped_inside_is_reported(writing: Pair) -> None:
    fence = writing.links[0]._paths[1].fence
    assert fence is not None
    ctypes.c_int64.from_address(fence.address).value = 1  # as if it stopped in mid-copy
    assert writing.ask("close") == [[0]]
    ctypes.c_int64.from_address(fence.address).value = 0


def test_links_to_one_peer_share_the_mapping() -> None:
    pair = Pair(Access.READ, links=5)
    try:
        assert len(pair.transport._mappings) == 1
        for link in pair.links[:4]:
            link.close()
        pair.move(0, 100, number=4)
        pair.links[4].close()
        assert len(pair.transport._mappings) == 0
    finally:
        pair.close()


def test_closing_during_a_slow_attach_leaves_no_mapping(
    reading: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = reading.transport.open(
        _group(0, reading.pid, reading.pidfd, "slow"), [reading.region], Access.READ
    )
    reading.links[0].close()
    entered, go_on = threading.Event(), threading.Event()
    map_anew = ShmLink._map_anew

    def slowly(*args: Any) -> PeerMapping:
        entered.set()
        assert go_on.wait(20)
        return map_anew(*args)

    def attach() -> None:
        with pytest.raises(LinkError, match="this link was closed"):
            link.attach(1, Offer(reading.data, [os.dup(reading.fds[0])]))
        refused.append(None)

    refused: list[None] = []
    monkeypatch.setattr(ShmLink, "_map_anew", slowly)
    monkeypatch.setattr("datadist_shm.link.CLOSE_SECONDS", 0.1)
    thread = threading.Thread(target=attach)
    thread.start()
    assert entered.wait(20)
    link.close()
    go_on.set()
    thread.join(20)
    assert refused
    assert len(reading.transport._mappings) == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": 2}, "version"),
        ({"regions": [{"id": 1, "address": 0, "size": 1, "fd": 0}]}, "address"),
        ({"regions": []}, "names descriptors"),
        ({"regions": [{"id": 1, "address": 1, "size": SIZE * 2, "fd": 0}]}, "file of"),
        ({"writable": True}, "fence"),
        (
            {
                "regions": [
                    {"id": 1, "address": 4096, "size": SIZE, "fd": 0},
                    {"id": 2, "address": 4096 + SIZE - 1, "size": 1, "fd": None},
                ]
            },
            "overlap at",
        ),
    ],
)
def test_bad_offers_are_refused(reading: Pair, change: dict[str, Any], match: str) -> None:
    group = _group(0, reading.pid, reading.pidfd, "bad")
    link = reading.transport.open(group, [reading.region], Access.READ)
    data = json.dumps({**json.loads(reading.data), **change}).encode()
    before, mapped = descriptors.count(), len(reading.transport._mappings)
    offer = Offer(data, [os.dup(reading.fds[0])])
    assert not link.attach_at_once(1, offer)
    assert os.path.samestat(os.fstat(offer.fds[0]), os.fstat(reading.fds[0])), "it was closed"
    assert len(reading.transport._mappings) == mapped
    with pytest.raises(LinkError, match=match):
        link.attach(1, offer)
    assert descriptors.falls_to(before)
    link.close()


def test_an_offer_of_a_pool_is_taken_at_once(reading: Pair) -> None:
    group = _group(0, reading.pid, reading.pidfd, "at once")
    link = reading.transport.open(group, [reading.region], Access.READ)
    offers = [Offer(reading.data, [os.dup(reading.fds[0])]) for _ in range(2)]
    assert link.attach_at_once(1, offers[0])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(offers[0].fds[0])
    assert not link.attach_at_once(1, offers[1])  # a second time
    with pytest.raises(LinkError, match="attached before"):
        link.attach(1, offers[1])
    remote = json.loads(reading.data)["regions"][0]["address"]
    local, length = array("q", [reading.region.address]), array("q", [8])
    link.read(1, local, array("q", [remote]), length, 10.0)
    assert ctypes.string_at(reading.region.address, 8) == bytes([7]) * 8
    link.close()


def _many(count: int) -> Offer:
    """Of so many regions, each a page of its own."""
    fds = [create("datadist-many") for _ in range(count)]
    for fd in fds:
        os.truncate(fd, 4096)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, RESIZE_SEALS)
    regions = [
        RegionOffer(id=50 + place, address=(place + 1) << 20, size=4096, fd=place)
        for place in range(count)
    ]
    data = OfferData(writable=False, regions=regions, fence=None)
    return Offer(data.model_dump_json().encode(), fds)


def test_offers_of_many_descriptors_are_left_to_a_worker(reading: Pair) -> None:
    group = _group(0, reading.pid, reading.pidfd, "many")
    for count in (AT_ONCE_FDS, AT_ONCE_FDS + 1):
        link, offer = reading.transport.open(group, [reading.region], Access.READ), _many(count)
        at_once = link.attach_at_once(1, offer)
        assert at_once == (count == AT_ONCE_FDS)
        if not at_once:
            link.attach(1, offer)
        link.close()


def test_what_was_mapped_of_an_offer_that_is_not_taken_goes_with_the_link(reading: Pair) -> None:
    group = _group(0, reading.pid, reading.pidfd, "in part")
    link = reading.transport.open(group, [reading.region], Access.READ)
    before, offer = len(reading.transport._mappings), _many(3)
    with open(os.devnull) as null:
        os.dup2(null.fileno(), offer.fds[2])
    assert not link.attach_at_once(1, offer)
    for fd in offer.fds:
        os.close(fd)
    link.close()
    assert len(reading.transport._mappings) == before


def test_other_memory_under_a_known_id_is_refused(reading: Pair) -> None:
    """If the descriptor were closed at once, as the last one, all its pages would be freed there."""
    group = _group(0, reading.pid, reading.pidfd, "other")
    link = reading.transport.open(group, [reading.region], Access.READ)
    fd = create("datadist-other")
    os.truncate(fd, SIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, RESIZE_SEALS)
    offer = Offer(reading.data, [fd])
    assert not link.attach_at_once(1, offer)
    assert os.fstat(fd).st_size == SIZE
    with pytest.raises(LinkError, match="rank 1 changed the memory of region"):
        link.attach(1, offer)
    link.close()


def test_a_transfer_that_goes_on_keeps_our_memory_where_attaching_at_once_failed(
    reading: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = _group(0, reading.pid, reading.pidfd, "again")
    reading.links[0].close()
    link = reading.transport.open(group, [reading.region], Access.READ)
    offer = Offer(reading.data, [os.dup(reading.fds[0])])

    def fail(*args: Any) -> PeerMapping:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(ShmLink, "_map_anew", fail)
        assert not link.attach_at_once(1, offer)
    link.attach(1, offer)
    error = TransferTimeout("not complete", link_usable=True)
    _note_flight(error, object(), link._paths[1])
    assert isinstance(error.in_flight, Unsettled)
    assert reading.region.keeper in error.in_flight._keepers
    error.in_flight._all.discard(error.in_flight)
    link.close()


def test_what_may_wait_is_not_attached_at_once(reading: Pair) -> None:
    """Registered memory, for which the kernel looks at the peer, and descriptors that are no memory."""
    group = _group(0, reading.pid, reading.pidfd, "later")
    link = reading.transport.open(group, [reading.region], Access.READ)
    own = RegionOffer(id=5, address=1 << 20, size=4096, fd=None)
    registered = OfferData(writable=False, regions=[own], fence=None).model_dump_json().encode()
    assert not link.attach_at_once(1, Offer(registered))
    with socket.socket() as stranger:
        assert not link.attach_at_once(1, Offer(reading.data, [stranger.fileno()]))
        assert stranger.getsockname()
    link.close()


def test_memory_that_could_shrink_is_refused(reading: Pair) -> None:
    group = _group(0, reading.pid, reading.pidfd, "bad")
    link = reading.transport.open(group, [reading.region], Access.READ)
    fd = os.memfd_create("loose", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    with pytest.raises(LinkError, match="resize"):
        link.attach(1, Offer(reading.data, [fd]))
    link.close()


def test_memory_that_is_not_ours_is_refused() -> None:
    transport = ShmTransport(TransportOptions())
    with pytest.raises(RegistrationError, match="not memory of this process"):
        transport.register(4096, 4096, Placement.DEVICE)
    with pytest.raises(MemoryError):
        transport.allocate(1 << 55, Placement.HOST)


def test_options_are_checked() -> None:
    for extra, match in (
        ({"nonsense": "1"}, "unknown option"),
        ({"populate": "yes"}, '"0" or "1"'),
    ):
        with pytest.raises(TransportError, match=match):
            ShmTransport(TransportOptions(extra=extra))
    transport = ShmTransport(TransportOptions(extra={"populate": "0"}))
    region = transport.allocate(SIZE, Placement.HOST)
    assert ctypes.string_at(region.address, 8) == bytes(8)
    transport.release(region)


LARGE = 32 << 20
PART = LARGE // 8
SOON = 30.0
"""Seconds, far from the minutes that copies take which nobody ends."""


@pytest.fixture(params=["pool", "user"])
def large(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A pair with a large region, in the pool and in memory of the program."""
    pair = Pair(Access.READ, memory=request.param, size=LARGE)
    yield pair
    pair.close()


@pytest.fixture(params=["pool", "user"])
def unhelped(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """The same, with one thread per transfer: two would write the same bytes in :func:`_endless`."""
    pair = Pair(Access.READ, memory=request.param, size=LARGE, threads="1")
    yield pair
    pair.close()


def test_many_blocks_by_several_threads(large: Pair) -> None:
    block = 12_296
    count = LARGE // block
    rng = np.random.default_rng(3)
    source, target = rng.permutation(count), rng.permutation(count)
    large.links[0].read(
        1,
        large.region.address + target * block,
        large.remote + source * block,
        np.full(count, block, np.int64),
        20,
    )
    words = _words(large.region.address, LARGE)[: count * block // 8].reshape(count, -1)
    expected = np.arange(count * block // 8).reshape(count, -1)
    assert np.array_equal(words[target], expected[source])
    assert not _words(large.region.address, LARGE)[count * block // 8 :].any()


several_writers = pytest.mark.skipif(
    "libtsan" in os.environ.get("LD_PRELOAD", ""),
    reason="a sanitizer ends a process in which two threads write the same bytes",
)
"""Of :func:`_endless` with helpers, where one has to wait for a processor."""


def _endless(pair: Pair, timeout: float, begin: int = 0, size: int = LARGE) -> None:
    """Minutes of copies into a part of the memory."""
    count = 40_000 * LARGE // size
    here, there = pair.region.address + begin, pair.remote + begin
    vectors = [array("q", [n]) * count for n in (here, there, size)]
    pair.links[0].read(1, vectors[0], vectors[1], vectors[2], timeout)


@several_writers
def test_a_deadline_ends_every_thread(large: Pair) -> None:
    before = tasks.count()
    began = time.monotonic()
    with pytest.raises(TransferTimeout):
        _endless(large, 0.1)
    assert time.monotonic() - began < SOON
    assert tasks.falls_to(before)


@several_writers
def test_an_abort_ends_every_thread(large: Pair) -> None:
    before = tasks.count()
    timer = threading.Timer(0.1, large.links[0].abort, (1,))
    timer.start()
    began = time.monotonic()
    with pytest.raises(TransferError, match="aborted"):
        _endless(large, 600)
    assert time.monotonic() - began < SOON
    timer.join()
    assert tasks.falls_to(before)


@several_writers
def test_a_peer_that_dies_meanwhile_is_noticed(large: Pair) -> None:
    timer = threading.Timer(0.1, large.process.kill)
    timer.start()
    began = time.monotonic()
    with pytest.raises(PeerLost):
        _endless(large, 600)
    assert time.monotonic() - began < SOON
    timer.join()


def _pull_endlessly(pair: Pair, count: int) -> tuple[list[threading.Thread], list[str]]:
    """Several at the same time over one link, which are inside; and how each failed.

    Each has a part of the memory of its own, and the last of eight parts is left alone.
    """
    failed: list[str] = []

    def pull(part: int) -> None:
        try:
            _endless(pair, 600, part * PART, PART)
        except TransferError as error:
            failed.append(str(error))

    threads = [threading.Thread(target=pull, args=(part,)) for part in range(count)]
    for thread in threads:
        thread.start()
    until(lambda: len(pair.links[0]._paths[1].inside) == count)
    return threads, failed


@pytest.mark.parametrize("end", ["close", "abort"])
def test_the_end_ends_all_that_is_in_flight_before_memory_is_unmapped(
    unhelped: Pair, end: str
) -> None:
    threads, failed = _pull_endlessly(unhelped, 4)
    if end == "abort":
        unhelped.links[0].abort(1)
        for thread in threads:
            thread.join(SOON)
    assert unhelped.links[0].close() == frozenset()
    assert not unhelped.links[0]._paths[1].inside
    for thread in threads:
        thread.join(SOON)
    assert ["aborted" in text for text in failed] == [True] * 4


def test_a_small_read_ends_beside_large_ones(unhelped: Pair) -> None:
    threads, failed = _pull_endlessly(unhelped, 2)
    last = LARGE - 64
    here, there = unhelped.region.address + last, unhelped.remote + last
    vectors = [array("q", [n]) for n in (here, there, 64)]
    unhelped.links[0].read(1, vectors[0], vectors[1], vectors[2], 30.0)
    assert not failed
    unhelped.links[0].abort(1)
    for thread in threads:
        thread.join(SOON)


def _read_few(link: ShmLink, region: Region, remote: int) -> None:
    vectors = [array("q", [n]) for n in (region.address, remote, 64)]
    link.read(1, vectors[0], vectors[1], vectors[2], 30.0)


def test_pages_that_a_peer_has_made_are_mapped_soon_after_the_link_is_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(
        "DATADIST_SHM_HUGE_PAGES", "0"
    )  # which may replace mapped ones at any moment
    pair = Pair(Access.READ, size=LARGE)
    try:
        deadline = time.monotonic() + 60
        while os.lseek(pair.fds[0], 0, os.SEEK_HOLE) < LARGE:  # the owner makes them
            assert time.monotonic() < deadline
            time.sleep(0.01)
        pair.links[0].close()
        group = _group(0, pair.pid, pair.pidfd, "populated")
        link = pair.transport.open(group, [pair.region], Access.READ)
        link.attach(1, Offer(pair.data, [os.dup(pair.fds[0])]))
        (mapping,) = link._paths[1].keepers
        least = LARGE - LARGE // 64  # the kernel passes over neighbours of a page that are locked
        until(lambda: resident(mapping.address) > least, SOON)
        link.close()
    finally:
        pair.close()


def test_a_search_for_pages_ends_with_the_link() -> None:
    """However much is left to search: a mapping of this size takes long, of which no page is made."""
    pair = Pair(Access.READ)
    assert isinstance(pair.region, PoolRegion)
    pair.region.wait_filled(60)  # by threads that are none of the search
    size, address = 1 << 40, 1 << 45
    fd = create("datadist-large")
    try:
        os.truncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, RESIZE_SEALS)
        region = RegionOffer(id=99, address=address, size=size, fd=0)
        data = OfferData(writable=False, regions=[region], fence=None).model_dump_json().encode()
        for number in range(5):
            link = pair.transport.open(
                _group(0, pair.pid, pair.pidfd, f"large-{number}"), [pair.region], Access.READ
            )
            before = set(os.listdir("/proc/self/task"))
            link.attach(1, Offer(data, [os.dup(fd)]))
            _read_few(link, pair.region, address)
            begun = set(os.listdir("/proc/self/task")) - before
            assert len(begun) == 1
            link.close()
            until(lambda begun=begun: not begun & set(os.listdir("/proc/self/task")), SOON)  # type: ignore[misc]
        assert os.fstat(fd).st_blocks == 0
    finally:
        os.close(fd)
        pair.close()
