"""Several transfers of one pair of ranks at the same time, each over a queue pair of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
from roce import spi
from roce.nodes import start_here
from roce.spi import MIB

from tests.nodes import Node

SIZE = 16 * MIB
PAIRS = 4
PART = SIZE // PAIRS
DATA = spi.expected(1, SIZE)
SLACK = 15.0
"""For an emulated machine whose host is busy."""
FLOOR = 0.5
"""Of the throughput of one after the other. A busy host gives two threads less than one, by chance."""
ROUNDS, ATTEMPTS = 3, 3


class Two:
    """Rank 0, which moves, and rank 1, whose memory is moved."""

    def __init__(self, mover: Node, owner: Node, pairs: tuple[str, str]) -> None:
        self.mover, self.owner = mover, owner
        self.local, self.remote = (
            node.do(spi.start, SIZE, {"extra": {"queue_pairs": count}})
            for node, count in zip((mover, owner), pairs, strict=True)
        )
        self.owner.do(spi.fill, 1)

    def call(
        self, name: str, verb: str, offset: int, size: int, block: int = MIB, times: int = 1,
        timeout: float = 60,
    ) -> tuple[Any, ...]:  # fmt: skip
        """Arguments of :func:`spi.move`: ``size`` bytes at an offset in blocks, so many times."""
        offsets = list(range(offset, offset + size, block)) * times
        local, remote = ([base + n for n in offsets] for base in (self.local, self.remote))
        return name, 1, verb, local, remote, [block] * len(offsets), timeout

    def parts(self, name: str, verb: str, **options: Any) -> list[tuple[Any, ...]]:
        """One call for each queue pair, which together move everything."""
        return [self.call(name, verb, n * PART, PART, **options) for n in range(PAIRS)]

    def here(self) -> Any:
        """The mover's memory."""
        return np.frombuffer(self.mover.do(spi.content), np.uint8)


@contextmanager
def started(*pairs: str) -> Iterator[Two]:
    """Two processes with the transport open, with so many queue pairs each."""
    with ExitStack() as stack:
        nodes = [start_here({}) for _ in range(2)]
        for node in nodes:
            stack.callback(node.close)
        two = Two(nodes[0], nodes[1], (pairs[0], pairs[-1]))
        for node in nodes:
            stack.callback(node.do, spi.stop)
        yield two


@pytest.fixture(scope="module")
def two() -> Iterator[Two]:
    """Two processes with the transport open."""
    with started(str(PAIRS)) as pair:
        yield pair


@pytest.fixture
def link(two: Two, request: pytest.FixtureRequest) -> Iterator[str]:
    """A link of the two; peers may write where the test's name says so."""
    name = request.node.name
    two.mover.do(spi.clear)
    spi.connect(two.mover, two.owner, name, "read_write" if "write" in name else "read")
    yield name
    assert [node.do(spi.close_link, name) for node in (two.mover, two.owner)] == [[], []]


def test_reads_at_the_same_time_move_what_each_was_asked_for(two: Two, link: str) -> None:
    two.mover.do(spi.move_together, *two.parts(link, "read", block=4096))
    assert (two.here() == DATA).all()


def test_writes_at_the_same_time(two: Two, link: str) -> None:
    two.mover.do(spi.fill, 2)
    try:
        two.mover.do(spi.move_together, *two.parts(link, "write", block=4096))
        there = np.frombuffer(two.owner.do(spi.content), np.uint8)
        assert (there == spi.expected(2, SIZE)).all()
    finally:
        two.owner.do(spi.fill, 1)


@pytest.mark.parametrize("pairs", [("1", "4"), ("4", "1"), ("2", "3")])
def test_ends_with_different_numbers_of_queue_pairs(pairs: tuple[str, str]) -> None:
    with started(*pairs) as two:
        spi.connect(two.mover, two.owner)
        two.mover.do(spi.move_together, *two.parts("l", "read"))
        assert (two.here() == DATA).all()
        (line,) = two.mover.do(spi.log_of, "link l to rank 1")
        assert f"{min(pairs)} queue pairs" in line


def test_a_small_read_is_not_behind_a_large_one(two: Two, link: str, record_property: Any) -> None:
    small = two.call(link, "read", SIZE - 4096, 4096, block=4096)
    two.mover.do(spi.move, *small)
    alone = min(two.mover.do(spi.move, *small) for _ in range(10))
    large = two.call(link, "read", 0, SIZE // 2, times=20)
    count, took, whole = two.mover.do(spi.small_beside_large, large, small, 20)
    assert count >= 1, "no small read ended before the large one"
    record_property(
        "reads of 4 KiB beside one of 160 MiB",
        f"{np.median(took) * 1e3:.1f} ms (the median of {count}), alone {alone * 1e3:.1f} ms; the "
        f"large one {whole:.2f} s",
    )


def test_two_reads_at_once_beside_one_after_the_other(
    two: Two, link: str, record_property: Any
) -> None:
    halves = [two.call(link, "read", n * SIZE // 2, SIZE // 2, 65536, 2) for n in range(2)]
    for _ in range(ATTEMPTS):
        apart, at_once = [], []
        for _ in range(ROUNDS):  # in turns, so that what else the host does meets both
            apart.append(sum(two.mover.do(spi.move, *half) for half in halves))
            at_once.append(max(two.mover.do(spi.move_together, *halves)))
        ratio = min(apart) / min(at_once)
        record_property(
            "two reads of 16 MiB in blocks of 64 KiB",
            f"at once {min(at_once):.2f} s, one after the other {min(apart):.2f} s, ratio {ratio:.2f}",
        )
        if ratio >= FLOOR:
            return
    pytest.fail(f"{ratio:.2f}, {ATTEMPTS} times below {FLOOR}")


def test_an_abort_ends_all(two: Two, link: str) -> None:
    moves = [call[2:] for call in two.parts(link, "read", block=256, timeout=60)]
    for kind, text, usable, took in two.mover.do(spi.abort_all, link, 1, moves):
        assert (kind, usable) == ("TransferError", False), text
        assert "was aborted" in text
        assert took < SLACK * 2
    assert not two.here()[-256:].any(), "the reads were over before they were aborted"


def test_a_silent_peer_ends_all_and_nothing_is_written_afterwards(two: Two) -> None:
    """The first write gives up at its deadline, the others end with it, before the peer is lost."""
    spi.connect(two.mover, two.owner, "silent", "read_write")
    two.owner.do(spi.close_link, "silent")
    two.mover.do(spi.clear, 9)
    first, *others = two.parts("silent", "write")
    calls = [(*first[:-1], 0.05), *others]
    results = two.mover.do(spi.try_together, *calls)
    assert results[0][0] in ("TransferTimeout", "PeerLost", "TransferError"), results
    assert all(usable is False and took < SLACK * 2 for _, _, usable, took in results), results
    kind, text, usable, _ = two.mover.do(spi.try_move, *others[0])
    assert (kind, usable) == ("TransferError", False)
    assert "an earlier transfer ended with" in text
    assert (np.frombuffer(two.owner.do(spi.content), np.uint8) == DATA).all()
    two.mover.do(spi.close_link, "silent")


def test_closing_ends_all_and_leaves_nothing(two: Two) -> None:
    before = two.mover.do(spi.resources)
    spi.connect(two.mover, two.owner, "closing")
    two.mover.do(spi.clear)
    calls = two.parts("closing", "read", block=256)
    results = two.mover.do(spi.close_all, "closing", calls)
    assert [kind for kind, *_ in results] == ["TransferError"] * PAIRS, results
    assert all("this link is closed" in text for _, text, *_ in results)
    got = two.here().tobytes()
    two.owner.do(spi.close_link, "closing")
    assert two.here().tobytes() == got
    assert two.mover.do(spi.falls_to, before)
