"""Every byte arrives where it must, and no other byte changes."""

from __future__ import annotations

import random
import socket

import pytest

from datadist.testing import operations, transfer_operations
from datadist.testing.families.kit import KINDS, Kit, memory_of, need_write, pair
from datadist.testing.rules import rule
from datadist.testing.testbed import MIB, Linked, Memory, Testbed
from datadist.transport import Access, AddressError

DIRECTIONS = ("read", "write")
GUARD = 4096
SIZES = (1, 2, 3, 255, 4095, 4096, 4097, 65_537, MIB + 1)
LARGE = 64 * MIB
SPACE = 4 * MIB
ROUNDS = 40
AT_ONCE = ((64, 1), (4096, 1), (65_536, 16), (MIB, 1), (MIB, 256))
"""Bytes, and in how many segments."""


class Data(Kit):
    """`read` and `write`; all memory around the segments is compared too."""

    @rule("Link.read", "Link.write")
    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("size", SIZES)
    def test_sizes(self, testbed: Testbed, size: int, direction: str) -> None:
        """One segment at odd addresses."""
        _move_and_check(testbed, [(GUARD + 1, GUARD + 3, size)], direction, size + 2 * GUARD)

    @rule("Link.read")
    def test_64_mib(self, testbed: Testbed) -> None:
        """One large segment."""
        _move_and_check(testbed, [(GUARD, GUARD + 1, LARGE)], "read", LARGE + 2 * GUARD)

    @rule("Link.read", "Link.write")
    @pytest.mark.parametrize("direction", DIRECTIONS)
    def test_unaligned(self, testbed: Testbed, direction: str) -> None:
        """All offsets below 64 bytes at both ends, with lengths around them."""
        segments = [
            (512 * i + i % 64, 512 * i + (7 * i + i // 64) % 64, 1 + (13 * i) % 300)
            for i in range(1, 4000)
        ]
        _move_and_check(testbed, segments, direction)

    @rule("Link.read", "Link.write")
    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("count", [2, 17, 1000, 100_000])
    def test_many_segments(self, testbed: Testbed, count: int, direction: str) -> None:
        """Shuffled, with gaps that must not change."""
        rng = random.Random(count)
        room = SPACE // count
        slots = rng.sample(range(count), count)
        segments = [
            (i * room + rng.randrange(3), slot * room + rng.randrange(3), rng.randint(1, room - 3))
            for i, slot in enumerate(slots)
        ]
        _move_and_check(testbed, segments, direction)

    @rule("Link.read", "Link.write")
    @pytest.mark.parametrize("direction", DIRECTIONS)
    def test_random_segments(self, testbed: Testbed, direction: str) -> None:
        """Of mixed sizes, one call after another over the same link."""
        linked, mine, theirs = pair(testbed, size=SPACE, write=direction == "write")
        rng, expected_write = random.Random(7), []
        target, source = (mine, theirs) if direction == "read" else (theirs, mine)
        for _ in range(20):
            segments = _random_segments(rng)
            outcome = linked.move(0, 1, mine, theirs, segments, write=direction == "write")
            outcome.must_succeed(f"{direction} of {len(segments)} segments")
            expected_write.append(
                target.expected_write(source, segments, into_remote=direction == "write")
            )
        target.check(expected_write)
        source.check()
        linked.close_all()

    @rule("Link.read", "Link.write", "Capabilities.placements")
    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("owner", KINDS)
    @pytest.mark.parametrize("local", KINDS)
    def test_memory_of_every_kind(
        self, testbed: Testbed, local: str, owner: str, direction: str
    ) -> None:
        """Of the transport and of the user, of each placement, at both ends."""
        if direction == "write":
            need_write(testbed)
        members = testbed.processes(2)
        mine, theirs = memory_of(testbed, members[0], local), memory_of(testbed, members[1], owner)
        access = Access.READ_WRITE if direction == "write" else Access.READ
        linked = testbed.link(members, {0: [mine], 1: [theirs]}, access)
        _check_move(linked, mine, theirs, [(10, 20, 30_001), (50_000, 1, 1)], direction)

    @rule("Link.read")
    @pytest.mark.parametrize("kind", ["ctypes", "memoryview", "read-only"])
    def test_vectors_are_taken_by_the_buffer_protocol(self, testbed: Testbed, kind: str) -> None:
        """Any C-contiguous int64 buffer, also one that cannot be written."""
        linked, mine, theirs = pair(testbed)
        order = linked.order(0, 1, mine, theirs, [(1, 2, 300), (5000, 9, 4)])
        outcome = linked.members[0].do(operations.move_with, order, kind)
        outcome.must_succeed(f"a read with vectors of the type {kind}")
        mine.check([mine.expected_write(theirs, [(1, 2, 300), (5000, 9, 4)])])
        linked.close_all()

    @rule("Link.read")
    def test_several_regions_in_one_call(self, testbed: Testbed) -> None:
        """Segments of different regions, at both ends."""
        members = testbed.processes(2)
        mine = [testbed.allocate(members[0]) for _ in range(2)]
        theirs = [testbed.allocate(members[1]) for _ in range(3)]
        linked = testbed.link(members, {0: mine, 1: theirs})
        order = linked.order(0, 1, mine[0], theirs[0], [(0, 0, 1000), (0, 0, 2000), (0, 0, 3000)])
        order.local[1], order.local[2] = mine[1].address + 11, mine[1].address + 9000
        order.remote[1], order.remote[2] = theirs[1].address + 5, theirs[2].address + 7
        outcome = members[0].do(operations.move, order)
        outcome.must_succeed("segments of several regions")
        mine[0].check([mine[0].expected_write(theirs[0], [(0, 0, 1000)])])
        mine[1].check([
            mine[1].expected_write(theirs[1], [(11, 5, 2000)]),
            mine[1].expected_write(theirs[2], [(9000, 7, 3000)]),
        ])  # fmt: skip
        linked.close_all()

    @rule("Link.read", "Link.write")
    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize(("size", "count"), AT_ONCE)
    def test_all_bytes_are_there_at_the_return(
        self, testbed: Testbed, size: int, count: int, direction: str
    ) -> None:
        """Who gets the data looks at it the moment the call has returned, many times."""
        linked, mine, theirs = pair(testbed, size=size, write=direction == "write")
        n = size // count
        segments = [(i * n, i * n, n) for i in range(count)]
        order = linked.order(0, 1, mine, theirs, segments, write=direction == "write")
        wrong = _look_at_once(order, mine, theirs)
        assert wrong is None, f"bytes were missing when {direction} had returned: {wrong}"
        linked.close_all()

    @rule("Link.read")
    def test_later_changes_are_seen(self, testbed: Testbed) -> None:
        """A read returns what is there now, not what was there when the link was made."""
        linked, mine, theirs = pair(testbed)
        for seed in (1001, 1002, 1003):
            theirs.refill(seed)
            outcome = linked.move(0, 1, mine, theirs, [(0, 0, MIB)])
            outcome.must_succeed("a read after the owner changed its memory")
            mine.check([mine.expected_write(theirs, [(0, 0, MIB)])])
        linked.close_all()

    @rule("Link.read", "Link.write", "AddressError")
    @pytest.mark.parametrize(
        ("offset", "size"),
        [(-1, 2), (-MIB, MIB), (MIB - 1, 2), (MIB, 1), (0, MIB + 1), (1 << 40, 1)],
    )
    @pytest.mark.parametrize("direction", DIRECTIONS)
    def test_bad_remote_addresses_move_nothing(
        self, testbed: Testbed, direction: str, offset: int, size: int
    ) -> None:
        """Not even the good segments of the same call; and the link goes on."""
        write = direction == "write"
        linked, mine, theirs = pair(testbed, write=write)
        local = testbed.allocate(linked.members[0], 2 * MIB)
        segments = [(0, 0, 4096), (8192, offset, size)]
        outcome = linked.move(0, 1, local, theirs, segments, write=write)
        outcome.must_be(AddressError, f"{size} bytes from offset {offset}")
        local.check()
        theirs.check()
        outcome = linked.move(0, 1, mine, theirs, [(0, 0, 100)])
        outcome.must_succeed("after a bad address")
        linked.close_all()

    @rule("Link.read", "AddressError")
    @pytest.mark.parametrize("address", [1, (1 << 63) - 8, -8])
    def test_addresses_that_cannot_be(self, testbed: Testbed, address: int) -> None:
        """Around zero and at the end of what fits."""
        linked, mine, theirs = pair(testbed)
        order = linked.order(0, 1, mine, theirs, [(0, 0, 100)])
        order.remote[0] = address
        outcome = linked.members[0].do(operations.move, order)
        outcome.must_be(AddressError, f"address {address}")
        mine.check()
        linked.close_all()


def _move_and_check(
    testbed: Testbed, segments: list[tuple[int, int, int]], direction: str, size: int = SPACE
) -> None:
    linked, mine, theirs = pair(testbed, size=size, write=direction == "write")
    _check_move(linked, mine, theirs, segments, direction)


def _check_move(
    linked: Linked, mine: Memory, theirs: Memory, segments: list[tuple[int, int, int]],
    direction: str,
) -> None:  # fmt: skip
    write = direction == "write"
    outcome = linked.move(0, 1, mine, theirs, segments, write=write)
    outcome.must_succeed(f"{len(segments)} segments")
    target, source = (theirs, mine) if write else (mine, theirs)
    target.check([target.expected_write(source, segments, into_remote=write)])
    source.check()
    linked.close_all()


def _look_at_once(order: operations.Move, mine: Memory, theirs: Memory) -> str | None:
    """Repeat a transfer with new content, which both processes pass on to each other."""
    seeds = range(6000, 6000 + ROUNDS)
    owner_part, part = (
        (transfer_operations.compare_when_told, transfer_operations.write_and_tell)
        if order.write
        else (transfer_operations.fill_when_told, transfer_operations.read_and_compare)
    )
    here, there = socket.socketpair()
    with here, there:  # closed here before results come, so that who waits for the other one ends
        theirs.process.begin(owner_part, theirs.label, seeds, fds=[there.fileno()])
        mine.process.begin(part, order, mine.label, seeds, fds=[here.fileno()])
    outcome, text = mine.process.result()
    said: str | None = theirs.process.result()
    outcome.must_succeed(f"{len(order.local)} segments")
    return said or text


def _random_segments(rng: random.Random) -> list[tuple[int, int, int]]:
    """That do not overlap where they arrive, in random order."""
    edges = sorted(rng.sample(range(SPACE), 2 * rng.randint(1, 40)))
    segments = []
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        size = rng.choice([1, end - begin, (end - begin + 1) // 2])
        segments.append((begin, begin, size))
    rng.shuffle(segments)
    return segments
