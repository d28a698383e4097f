"""Connections over TCP as the meeting place sees them."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from datadist.control.hostport import HostPort
from datadist.control.meeting import Meeting
from datadist.control.messages import HEADER, WIRE_VERSION, Hello, Idle, Message, Welcome, decode
from datadist.control.reactor import Reactor
from tests.tcp_server import LOCAL, SECONDS, SETTINGS, connect, framed, is_closed, prove


@pytest.fixture
def meeting(reactor: Reactor, runtime_dir: Path) -> Iterator[Meeting]:
    """A meeting place."""
    made = reactor.call(lambda: Meeting(reactor, 1, runtime_dir, SETTINGS), SECONDS)
    yield made
    reactor.call(made.close, SECONDS)


@pytest.fixture
def place(reactor: Reactor, meeting: Meeting) -> HostPort:
    """Where it listens."""
    assert meeting.remote is not None
    remote = meeting.remote
    return reactor.call(lambda: remote.listen(LOCAL), SECONDS).endpoint


def _hello(**changes: object) -> Hello:
    return Hello(wire=WIRE_VERSION, incarnation="f" * 32, cluster_id=2).model_copy(update=changes)


def _answer(sock: socket.socket) -> Message:
    (size,) = HEADER.unpack(sock.recv(HEADER.size, socket.MSG_WAITALL))
    return decode(sock.recv(size + 32, socket.MSG_WAITALL)[:size])


def test_saying_hello_and_welcome_makes_a_session(place: HostPort, meeting: Meeting) -> None:
    with connect(place) as sock:
        seals = prove(sock)
        sock.sendall(framed(seals, _hello()))
        answer = _answer(sock)
        assert isinstance(answer, Hello)
        assert answer.incarnation == meeting.address.incarnation
        assert not meeting.sessions
        sock.sendall(framed(seals, Welcome()))
        assert _answer(sock).kind == "idle"
        assert list(meeting.sessions) == ["f" * 32]


@pytest.mark.parametrize("first", [Idle(), Welcome(), None])
def test_who_does_not_say_hello_is_dropped(
    place: HostPort, meeting: Meeting, first: Message | None
) -> None:
    with connect(place) as sock:
        seals = prove(sock)
        if first is not None:
            sock.sendall(framed(seals, first))
        assert is_closed(sock)
    assert not meeting.sessions


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"wire": WIRE_VERSION + 1}, "install the same datadist release"),
        ({"job": "another"}, "set the same DATADIST_JOB"),
    ],
)
def test_another_release_or_job_is_told_ours(
    place: HostPort, meeting: Meeting, caplog: pytest.LogCaptureFixture,
    changes: dict[str, object], remedy: str,
) -> None:  # fmt: skip
    with caplog.at_level(logging.WARNING, "datadist.control"), connect(place) as sock:
        sock.sendall(framed(prove(sock), _hello(**changes)))
        answer = _answer(sock)
        assert isinstance(answer, Hello)
        assert (answer.wire, answer.job) == (WIRE_VERSION, "")
        assert is_closed(sock)
    assert remedy in caplog.text
    assert not meeting.sessions
