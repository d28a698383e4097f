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
from datadist.control.runtime_dir import Address
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


@pytest.mark.parametrize("users", [1, 2, 3])
def test_an_address_is_listened_at_until_its_last_user_goes(
    reactor: Reactor, meeting: Meeting, users: int
) -> None:
    assert meeting.remote is not None
    remote = meeting.remote
    listeners = [reactor.call(lambda: remote.listen(LOCAL), SECONDS) for _ in range(users)]
    assert len({id(listener) for listener in listeners}) == 1
    place = listeners[0].endpoint
    for _ in range(users):
        with connect(place) as sock:
            prove(sock)
        reactor.call(lambda: remote.unlisten(LOCAL), SECONDS)
    with pytest.raises(ConnectionRefusedError):
        connect(place)


# -- connections that cross ----------------------------------------------------------------------


class Dialled:
    """An engine of another host that the meeting place dials; it has said hello already."""

    def __init__(self, reactor: Reactor, meeting: Meeting) -> None:
        assert meeting.remote is not None
        remote, self.outcomes = meeting.remote, list[Address | str]()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            place = HostPort("127.0.0.1", listener.getsockname()[1])
            reactor.call(lambda: remote.contact(place, None, self.outcomes.append), SECONDS)
            self.sock = listener.accept()[0]
        self.sock.settimeout(SECONDS)
        self._seals = prove(self.sock, dialled=False)
        assert _answer(self.sock).kind == "hello"

    def say(self, message: Message) -> None:
        """Say something."""
        self.sock.sendall(framed(self._seals, message))


@pytest.fixture
def dialled(reactor: Reactor, meeting: Meeting) -> Iterator[Dialled]:
    made = Dialled(reactor, meeting)
    yield made
    made.sock.close()


@pytest.mark.parametrize("peer", ["0" * 32, "f" * 32])
def test_of_two_connections_that_cross_the_one_of_the_first_incarnation_stays(
    reactor: Reactor, place: HostPort, meeting: Meeting, dialled: Dialled, peer: str
) -> None:
    with connect(place) as dialling:
        seals = prove(dialling)
        dialling.sendall(framed(seals, _hello(incarnation=peer)))
        assert _answer(dialling).kind == "hello"
        dialled.say(_hello(incarnation=peer))
        if peer < meeting.address.incarnation:
            assert is_closed(dialled.sock)
            dialling.sendall(framed(seals, Welcome()))
            assert _answer(dialling).kind == "idle"
        else:
            assert _answer(dialled.sock).kind == "welcome"
            assert is_closed(dialling)
        reactor.call(lambda: None, SECONDS)  # what it said last it has done as well
        assert list(meeting.sessions) == [peer]
    assert dialled.outcomes == [Address(2, peer)]


def test_an_engine_that_was_met_already_gets_no_second_session(
    reactor: Reactor, place: HostPort, meeting: Meeting, dialled: Dialled
) -> None:
    with connect(place) as dialling:
        seals = prove(dialling)
        dialling.sendall(framed(seals, _hello()) + framed(seals, Welcome()))
        assert [_answer(dialling).kind for _ in range(2)] == ["hello", "idle"]
        (session,) = meeting.sessions.values()
        dialled.say(_hello())
        assert is_closed(dialled.sock)
        reactor.call(lambda: None, SECONDS)  # what it said last it has done as well
        assert list(meeting.sessions.values()) == [session]
        assert not session.closed
    assert dialled.outcomes == [Address(2, "f" * 32)]
