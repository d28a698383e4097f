"""Frames over sockets that take and give what they like."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from datadist_nixl.stream import HEADER, Ended, Stream

MOST = 1 << 20


@pytest.fixture
def ends() -> Iterator[tuple[Stream, socket.socket]]:
    """A stream, and the plain socket at its other end."""
    with ExitStack() as stack:
        here, there = socket.socketpair()
        stack.callback(there.close)
        there.settimeout(10)
        stream = Stream(here, MOST)
        stack.callback(stream.close)
        yield stream, there


def taken(stream: Stream) -> list[tuple[int, int, bytes]]:
    return [(kind, number, bytes(body)) for kind, number, body in stream.frames()]


def test_frames_arrive_whole_however_they_are_cut(ends: tuple[Stream, socket.socket]) -> None:
    stream, other = ends
    data = b"".join(
        HEADER.pack(len(b), n, n << 40) + b for n, b in enumerate((b"", b"ab", b"c" * 9))
    )
    came = []
    for at in range(len(data)):
        other.send(data[at : at + 1])
        came += taken(stream)
    assert came == [(0, 0, b""), (1, 1 << 40, b"ab"), (2, 2 << 40, b"c" * 9)]
    other.send(data + data[:5])
    assert len(taken(stream)) == 3
    other.send(data[5:])
    assert len(taken(stream)) == 3
    assert taken(stream) == []


def test_what_a_full_socket_does_not_take_is_sent_later(ends: tuple[Stream, socket.socket]) -> None:
    stream, other = ends
    body = bytes(range(256)) * 4000
    stream.put(1, 2, body)
    stream.put(3, 4)
    stream.flush()
    assert stream.unsent
    came = bytearray()
    while len(came) < 2 * HEADER.size + len(body):
        came += other.recv(1 << 16)
        stream.flush()
    assert not stream.unsent
    assert came == HEADER.pack(len(body), 1, 2) + body + HEADER.pack(0, 3, 4)


def test_a_frame_whose_taker_raised_comes_again(ends: tuple[Stream, socket.socket]) -> None:
    stream, other = ends
    other.send(HEADER.pack(0, 1, 1) + HEADER.pack(0, 2, 2))
    with pytest.raises(KeyError):
        _raise_in(stream)
    assert taken(stream) == [(1, 1, b""), (2, 2, b"")]


def test_one_call_takes_frames_for_a_limited_time(
    ends: tuple[Stream, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And takes no more bytes from the socket before."""
    monkeypatch.setattr("datadist_nixl.stream.TURN_SECONDS", -1.0)
    stream, other = ends
    other.send(HEADER.pack(0, 1, 1) + HEADER.pack(0, 2, 2))
    assert taken(stream) == [(1, 1, b"")]
    assert stream.waiting
    other.close()
    assert taken(stream) == [(2, 2, b"")]
    assert not stream.waiting
    with pytest.raises(Ended):
        taken(stream)


def _raise_in(stream: Stream) -> None:
    for _ in stream.frames():
        raise KeyError


def test_the_end_of_the_peer_is_told_from_that_of_the_network(
    ends: tuple[Stream, socket.socket],
) -> None:
    stream, other = ends
    other.close()
    with pytest.raises(Ended) as error:
        taken(stream)
    assert error.value.by_peer
    stream.put(1, 1)
    with pytest.raises(Ended) as error:
        stream.flush()
    assert error.value.by_peer


def test_a_body_that_is_too_large_ends_the_connection(ends: tuple[Stream, socket.socket]) -> None:
    stream, other = ends
    other.send(HEADER.pack(MOST + 1, 1, 1))
    with pytest.raises(Ended, match="at most") as error:
        taken(stream)
    assert not error.value.by_peer
