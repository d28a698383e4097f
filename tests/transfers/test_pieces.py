"""Large transfers in pieces: what is cut, and who has a turn meanwhile where a link has one permit."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datadist import BlocksCacheKey, LLMException
from datadist.transfers.pieces import MIN_PIECE, ROUND, Cutter, move_pieces
from datadist.transfers.plan import Segments
from tests import held, nodes
from tests.nodes import Node

SECONDS = 60
SOCKETS = "tests.socket_transport:SocketTransport"
BLOCK, BLOCKS = 1 << 18, 64
"""Bytes of a block, which is 64 KiB of int32; 16 MiB in all."""
Start = Callable[..., Node]

lengths = st.lists(st.integers(1, 1 << 40), min_size=1, max_size=30)
sizes = st.lists(st.integers(ROUND, 1 << 41), min_size=1, max_size=10)


def _segments(length: list[int]) -> Segments:
    starts = np.cumsum([0, *length[:-1]]) + 4096
    return Segments(
        array("q", starts.tolist()),
        array("q", (starts + 7).tolist()),
        array("q", length),
        sum(length),
    )


@given(lengths, sizes)
def test_pieces_are_the_segments_in_order(length: list[int], size: list[int]) -> None:
    segments, position, step = _segments(length), 4096, 0
    cutter = Cutter(segments)
    while cutter.left and step < 200:
        most = size[step % len(size)]
        piece = cutter.next(most)
        assert 0 < piece.nbytes <= most
        assert piece.nbytes == sum(piece.length)
        assert min(piece.length) > 0
        for local, remote, nbytes in zip(piece.local, piece.remote, piece.length, strict=True):
            assert (local, remote) == (position, position + 7)
            position += nbytes
        step += 1
    assert cutter.taken == position - 4096
    assert cutter.left == sum(length) - cutter.taken


@given(st.lists(st.integers(1, ROUND), min_size=2, max_size=30), st.integers(ROUND, 4 * ROUND))
def test_segments_that_fit_a_piece_stay_whole(length: list[int], size: int) -> None:
    cutter, found = Cutter(_segments(length)), list[int]()
    while cutter.left:
        found += cutter.next(size).length.tolist()
    assert found == length


def test_who_ends_it_before_a_piece_is_not_asked_again() -> None:
    moved = list[int]()

    def turn(taken: int) -> None:
        if taken > 2 * MIN_PIECE:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        move_pieces(_segments([1 << 30]), 1e-9, lambda piece: moved.append(piece.nbytes), turn)
    assert len(moved) == 1


# -- in real engines -------------------------------------------------------------------------


def _init(here: nodes.Here, cluster: int, settings: dict[str, Any]) -> None:
    nodes.init(
        here, cluster, pool=40 << 20,
        **{"transfer_backend": SOCKETS, "enable_remote_cache_accessible": True,
           "sync_kv_timeout": 60_000, **settings},
    )  # fmt: skip
    nodes.make(here, "large", "blocks", [BLOCKS, BLOCK // 4], 1, BlocksCacheKey(cluster))
    nodes.make(here, "small", "blocks", [8, 1024], 1, BlocksCacheKey(cluster, 1))
    for label in ("large", "small"):
        nodes.fill(here, label, cluster)


@pytest.fixture
def start(start_node: Start) -> Start:
    """Start an engine with a large cache and a small one, over sockets unless told otherwise."""

    def begin(cluster: int, **settings: Any) -> Node:
        node = start_node()
        node.do(_init, cluster, settings)
        return node

    return begin


def _pair(start: Start, **settings: Any) -> tuple[Node, Node]:
    one, two = start(1, **settings), start(2, **settings)
    nodes.link_pair(one, two)
    return one, two


def _hold_first_piece(here: nodes.Here, cluster: int) -> None:
    """Note the bytes of each read and write; the first one waits."""
    held.watch_permits(here, cluster)
    link: Any = held.attempt_with(here, cluster).link
    here.any["aborted"] = threading.Event()
    abort = link.abort

    def noted_abort(rank: int) -> Any:
        result = abort(rank)
        here.any["aborted"].set()
        return result

    link.abort = noted_abort
    here.any["moved"], here.any["go"] = [], threading.Event()
    here.any["entered"] = threading.Event()
    for name in ("read", "write"):
        setattr(link, name, _noted(here, getattr(link, name)))


def _noted(here: nodes.Here, move: Callable[..., Any]) -> Callable[..., Any]:
    def noted(rank: int, local: Any, remote: Any, length: Any, timeout: float) -> Any:
        here.any["moved"].append(sum(np.frombuffer(length, np.int64).tolist()))
        if len(here.any["moved"]) == 1:
            here.any["entered"].set()
            assert here.any["go"].wait(SECONDS)
        return move(rank, local, remote, length, timeout)

    return noted


def _entered(here: nodes.Here) -> bool:
    return bool(here.any["entered"].wait(SECONDS))


def _go(here: nodes.Here) -> list[int]:
    here.any["go"].set()
    return list(here.any["moved"])


def _moved(here: nodes.Here) -> list[int]:
    return list(here.any["moved"])


def _large(here: nodes.Here, cluster: int, push: bool) -> None:
    every = list(range(BLOCKS))
    move = nodes.push_blocks if push else nodes.pull_blocks
    more = {"tensor_num_per_layer": 1} if push else {}
    move(here, BlocksCacheKey(cluster), "large", every, every, **more)


def _small(here: nodes.Here, cluster: int) -> int:
    """A pull of one block; after how many operations of the transport it was done."""
    nodes.pull_blocks(here, BlocksCacheKey(cluster, 1), "small", [1], [2])
    return len(here.any["moved"])


@pytest.mark.parametrize("push", [False, True])
def test_a_small_pull_has_a_turn_between_the_pieces_of_a_large_transfer(
    start: Start, push: bool
) -> None:
    one, two = _pair(start)
    two.do(_hold_first_piece, 1)
    two.do(held.begin, "large", _large, 1, push)
    assert two.do(_entered)
    two.do(held.begin, "small", _small, 1)
    assert two.do(held.waiting, 1)
    two.do(_go)
    assert two.do(held.outcome, "small") == "OK"
    assert two.do(held.outcome, "large") == "OK"
    moved = two.do(_moved)
    assert moved[1] == 4096
    assert len(moved) > 2
    assert sum(moved) == BLOCK * BLOCKS + 4096
    ours, theirs = two.do(nodes.read, "large")[0], one.do(nodes.read, "large")[0]
    assert (ours == theirs).all()
    assert (two.do(nodes.read, "small")[0][2] == one.do(nodes.read, "small")[0][1]).all()


def test_two_large_ones_take_turns(start: Start) -> None:
    _, two = _pair(start)
    two.do(_hold_first_piece, 1)
    two.do(held.begin, "first", _large, 1, True)
    assert two.do(_entered)
    two.do(held.begin, "second", _large, 1, True)
    assert two.do(held.waiting, 1)
    two.do(_go)
    assert [two.do(held.outcome, name) for name in ("first", "second")] == ["OK", "OK"]
    assert sum(two.do(_moved)) == 2 * BLOCK * BLOCKS


@pytest.mark.parametrize("end", ["unlink", "finalize", "peer"])
def test_the_end_of_the_link_between_two_pieces(start: Start, end: str) -> None:
    """Unlinking waits for a transfer that has begun, also while it lets another one go first."""
    one, two = _pair(start)
    two.do(_hold_first_piece, 1)
    two.do(held.begin, "large", _large, 1, False)
    assert two.do(_entered)
    two.do(held.begin, "small", _small, 1)
    assert two.do(held.waiting, 1)
    if end == "peer":
        one.kill()
    else:
        two.do(
            held.begin,
            end,
            nodes.unlink if end == "unlink" else nodes.finalize,
            *([1] if end == "unlink" else []),
        )
        assert two.do(_is_dead)
        assert end == "unlink" or two.do(_is_aborted)
    two.do(_go)
    outcome = two.do(held.outcome, "large")
    assert outcome == "OK" if end == "unlink" else "LLMException" in outcome
    if end != "peer":
        assert two.do(held.outcome, end) == "OK"


def _is_aborted(here: nodes.Here) -> bool:
    """Whether the transfers of the link are being ended, in time."""
    return bool(here.any["aborted"].wait(SECONDS))


def _is_dead(here: nodes.Here) -> bool:
    """Whether the link is being closed, in time: no transfer over it is to be found any more."""
    deadline = time.monotonic() + SECONDS
    while here.live._engine is not None and time.monotonic() < deadline:
        try:
            attempt = held.attempt_with(here, 1)
        except (ValueError, LLMException):
            return True
        if attempt.dead:
            return True
        time.sleep(0.002)
    return here.live._engine is None


def _timed_large(here: nodes.Here) -> None:
    every = list(range(BLOCKS))
    nodes.pull_blocks(here, BlocksCacheKey(1), "large", every, every, timeout_in_millis=2000)


def test_the_time_limit_is_that_of_the_whole_call(start: Start) -> None:
    _, two = _pair(start)
    two.do(_hold_first_piece, 1)
    two.do(held.begin, "large", _timed_large)
    assert two.do(_entered)
    two.do(_outlast)
    outcome = two.do(held.outcome, "large")
    assert "LLM_TIMEOUT" in outcome
    assert "timeout_in_millis (2 s)" in outcome


def _outlast(here: nodes.Here) -> None:
    time.sleep(2.05)
    here.any["go"].set()


def _cancel_large(here: nodes.Here) -> tuple[bool, str]:
    every = list(range(BLOCKS))
    task = here.live.cache_manager.pull_blocks_async(
        BlocksCacheKey(1), here.caches["large"], every, every
    )
    assert here.any["entered"].wait(SECONDS)
    begun = task.cancel()
    here.any["go"].set()
    with pytest.raises(LLMException) as caught:
        task.result(SECONDS)
    return begun, str(caught.value)


@pytest.mark.parametrize("backend", [SOCKETS, "shm"])
def test_a_task_that_is_cancelled_ends_before_its_next_piece(start: Start, backend: str) -> None:
    _, two = _pair(start, transfer_backend=backend)
    two.do(_hold_first_piece, 1)
    begun, text = two.do(_cancel_large)
    assert not begun
    (first,) = two.do(_moved)
    assert f"cancelled after {first} of {BLOCK * BLOCKS} bytes (LLM_FAILED)" in text
    two.do(nodes.pull_blocks, BlocksCacheKey(1), "large", [1], [1])


def test_who_has_other_permits_moves_all_at_once(start: Start) -> None:
    _, two = _pair(start, transfer_backend="shm")
    two.do(_hold_first_piece, 1)
    two.do(_go)
    two.do(_large, 1, False)
    assert two.do(_moved) == [BLOCK * BLOCKS]


def _hold_second(here: nodes.Here) -> None:
    """Have the operation that comes next wait as well."""
    here.any["second"], here.any["in_second"] = threading.Event(), threading.Event()
    link: Any = held.attempt_with(here, 1).link
    read = link.read

    def noted(*args: Any) -> Any:
        if len(here.any["moved"]) == 1:
            here.any["in_second"].set()
            assert here.any["second"].wait(SECONDS)
        return read(*args)

    link.read = noted


def _in_second(here: nodes.Here) -> bool:
    here.any["go"].set()
    return bool(here.any["in_second"].wait(SECONDS))


def _end_second(here: nodes.Here) -> None:
    here.any["second"].set()


def test_unlink_waits_for_a_transfer_that_lets_another_go_first(start: Start) -> None:
    _, two = _pair(start)
    two.do(_hold_first_piece, 1)
    two.do(_hold_second)
    two.do(held.begin, "large", _large, 1, False)
    assert two.do(_entered)
    two.do(held.begin, "small", _small, 1)
    assert two.do(held.waiting, 1)
    assert two.do(_in_second)  # the small one has the permit
    assert two.do(held.waiting, 1)  # and the large one waits for it
    two.do(held.begin, "unlink", nodes.unlink, 1)
    assert two.do(_is_dead)
    two.do(_end_second)
    assert [two.do(held.outcome, name) for name in ("small", "large", "unlink")] == ["OK"] * 3
