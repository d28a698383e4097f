"""Connections over TCP as the runtime directory sees them."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from datadist.control.discovery import Discovery
from datadist.control.hostport import HostPort
from datadist.control.messages import (
    HEADER,
    MAX_HELLO,
    WIRE_VERSION,
    Hello,
    Idle,
    Message,
    Mismatch,
    Welcome,
    decode,
)
from datadist.control.network_discovery import (
    MAX_MET,
    MAX_MET_PER_HOST,
    MAX_UNNEEDED,
    MAX_UNNEEDED_PER_HOST,
)
from datadist.control.reactor import Reactor, Timer
from datadist.control.runtime_dir import Address
from datadist.control.tcp import HANDSHAKE_SECONDS
from tests.tcp_server import LOCAL, SECONDS, SETTINGS, connect, framed, is_closed, prove


@pytest.fixture
def discovery(reactor: Reactor, runtime_dir: Path) -> Iterator[Discovery]:
    """A runtime directory."""
    made = reactor.call(lambda: Discovery(reactor, 1, runtime_dir, SETTINGS), SECONDS)
    yield made
    reactor.call(made.close, SECONDS)


@pytest.fixture
def place(reactor: Reactor, discovery: Discovery) -> HostPort:
    """Where it listens."""
    assert discovery.remote is not None
    remote = discovery.remote
    return reactor.call(lambda: remote.listen(LOCAL), SECONDS).endpoint


def _hello(**changes: object) -> Hello:
    return Hello(wire=WIRE_VERSION, incarnation="f" * 32, cluster_id=2).model_copy(update=changes)


def _answer(sock: socket.socket) -> Message:
    (size,) = HEADER.unpack(sock.recv(HEADER.size, socket.MSG_WAITALL))
    return decode(sock.recv(size + 32, socket.MSG_WAITALL)[:size])


def test_saying_hello_and_welcome_makes_a_session(place: HostPort, discovery: Discovery) -> None:
    with connect(place) as sock:
        seals = prove(sock)
        sock.sendall(framed(seals, _hello()))
        answer = _answer(sock)
        assert isinstance(answer, Hello)
        assert answer.incarnation == discovery.address.incarnation
        assert not discovery.sessions
        sock.sendall(framed(seals, Welcome()))
        assert _answer(sock).kind == "idle"
        assert list(discovery.sessions) == ["f" * 32]


@pytest.mark.parametrize("first", [Idle(), Welcome(), None])
def test_who_does_not_say_hello_is_dropped(
    place: HostPort, discovery: Discovery, first: Message | None
) -> None:
    with connect(place) as sock:
        seals = prove(sock)
        if first is not None:
            sock.sendall(framed(seals, first))
        assert is_closed(sock)
    assert not discovery.sessions


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"wire": WIRE_VERSION + 1}, "install the same datadist release"),
        ({"job": "another"}, "set the same DATADIST_JOB"),
    ],
)
def test_another_release_or_job_is_told_ours(
    place: HostPort, discovery: Discovery, caplog: pytest.LogCaptureFixture,
    changes: dict[str, object], remedy: str,
) -> None:  # fmt: skip
    with caplog.at_level(logging.WARNING, "datadist.control"), connect(place) as sock:
        sock.sendall(framed(prove(sock), _hello(**changes)))
        answer = _answer(sock)
        assert isinstance(answer, Hello)
        assert (answer.wire, answer.job) == (WIRE_VERSION, "")
        assert is_closed(sock)
    assert remedy in caplog.text
    assert not discovery.sessions


@pytest.mark.parametrize("users", [1, 2, 3])
def test_an_address_is_listened_at_until_its_last_user_goes(
    reactor: Reactor, discovery: Discovery, users: int
) -> None:
    assert discovery.remote is not None
    remote = discovery.remote
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
    """An engine of another host that the runtime directory dials; it has said hello already."""

    def __init__(self, reactor: Reactor, discovery: Discovery) -> None:
        assert discovery.remote is not None
        remote, self.outcomes = discovery.remote, list[Address | str]()
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
def dialled(reactor: Reactor, discovery: Discovery) -> Iterator[Dialled]:
    made = Dialled(reactor, discovery)
    yield made
    made.sock.close()


@pytest.mark.parametrize("peer", ["0" * 32, "f" * 32])
def test_of_two_connections_that_cross_the_one_of_the_first_incarnation_stays(
    reactor: Reactor, place: HostPort, discovery: Discovery, dialled: Dialled, peer: str
) -> None:
    with connect(place) as dialling:
        seals = prove(dialling)
        dialling.sendall(framed(seals, _hello(incarnation=peer)))
        assert _answer(dialling).kind == "hello"
        dialled.say(_hello(incarnation=peer))
        if peer < discovery.address.incarnation:
            assert is_closed(dialled.sock)
            dialling.sendall(framed(seals, Welcome()))
            assert _answer(dialling).kind == "idle"
        else:
            assert _answer(dialled.sock).kind == "welcome"
            assert is_closed(dialling)
        reactor.call(lambda: None, SECONDS)  # what it said last it has done as well
        assert list(discovery.sessions) == [peer]
    assert dialled.outcomes == [Address(2, peer)]


def test_an_engine_that_was_met_already_gets_no_second_session(
    reactor: Reactor, place: HostPort, discovery: Discovery, dialled: Dialled
) -> None:
    with connect(place) as dialling:
        seals = prove(dialling)
        dialling.sendall(framed(seals, _hello()) + framed(seals, Welcome()))
        assert [_answer(dialling).kind for _ in range(2)] == ["hello", "idle"]
        (session,) = discovery.sessions.values()
        dialled.say(_hello())
        assert is_closed(dialled.sock)
        reactor.call(lambda: None, SECONDS)  # what it said last it has done as well
        assert list(discovery.sessions.values()) == [session]
        assert not session.closed
    assert dialled.outcomes == [Address(2, "f" * 32)]


# -- who has the key, and is no member -----------------------------------------------------------


def _from(place: HostPort, host: str) -> socket.socket:
    return socket.create_connection(place, SECONDS, source_address=(host, 0))


def _hosts(count: int) -> list[str]:
    return [f"127.0.0.{number + 1}" for number in range(count)]


def _warnings(caplog: pytest.LogCaptureFixture, word: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if word in record.getMessage()]


def test_a_frame_before_hello_is_a_small_one(place: HostPort, discovery: Discovery) -> None:
    with connect(place) as sock:
        seals = prove(sock)
        sock.sendall(HEADER.pack(MAX_HELLO + 1))
        assert is_closed(sock)
    with connect(place) as sock:
        seals = prove(sock)
        sock.sendall(framed(seals, _hello()))
        assert _answer(sock).kind == "hello"
        sock.sendall(HEADER.pack(MAX_HELLO + 1))
        assert is_closed(sock)
    assert not discovery.sessions


def test_a_frame_before_hello_is_a_small_one_for_who_dials(dialled: Dialled) -> None:
    dialled.sock.sendall(HEADER.pack(MAX_HELLO + 1))
    assert is_closed(dialled.sock)


def test_a_member_says_large_frames(place: HostPort, discovery: Discovery) -> None:
    heard: list[Message] = []
    discovery.on_message = lambda _session, message, _fds: heard.append(message)
    with connect(place) as sock:
        seals = prove(sock)
        large = Mismatch(link=1, reason="x" * 4096)
        sock.sendall(b"".join(framed(seals, each) for each in (_hello(), Welcome(), large)))
        assert [_answer(sock).kind for _ in range(2)] == ["hello", "idle"]
        sock.sendall(framed(seals, large))
        deadline = time.monotonic() + SECONDS
        while len(heard) < 2:
            assert time.monotonic() < deadline
    assert heard == [large, large]


def test_proof_and_hello_share_one_time(place: HostPort, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a new one after the proof: who has the key and stalls is a stranger."""
    asked: list[float] = []
    later = Reactor.later

    def noting(self: Reactor, delay: float, call: Callable[[], object]) -> Timer:
        asked.append(delay)
        return later(self, delay, call)

    monkeypatch.setattr(Reactor, "later", noting)
    with connect(place) as sock:
        time.sleep(1)
        prove(sock)
        deadline = time.monotonic() + SECONDS
        while not any(0 < seconds < HANDSHAKE_SECONDS for seconds in asked):
            assert time.monotonic() < deadline
    assert min(s for s in asked if s > 0.1) <= HANDSHAKE_SECONDS - 0.5


@pytest.mark.parametrize("says_hello", [False, True])
@pytest.mark.parametrize(
    ("hosts", "most"), [(_hosts(1), MAX_MET_PER_HOST), (_hosts(8), MAX_MET)], ids=["one", "many"]
)
def test_who_proves_the_key_and_becomes_no_session_has_few_places(
    place: HostPort, reactor: Reactor, discovery: Discovery, caplog: pytest.LogCaptureFixture,
    hosts: list[str], most: int, says_hello: bool,
) -> None:  # fmt: skip
    assert discovery.remote is not None
    met = discovery.remote._met
    with ExitStack() as stack, caplog.at_level(logging.WARNING, "datadist.control"):
        for number in range(2 * most):
            sock = stack.enter_context(_from(place, hosts[number % len(hosts)]))
            seals = prove(sock)
            if says_hello:
                sock.sendall(framed(seals, _hello(incarnation=f"{number:032x}")))
                assert _answer(sock).kind == "hello"
            assert reactor.call(lambda: len(met), SECONDS) <= most
        engine = stack.enter_context(_from(place, "127.0.0.99"))
        engine.sendall(framed(prove(engine), _hello()))
        assert _answer(engine).kind == "hello"
    assert 1 <= len(_warnings(caplog, "that are no session yet")) <= len(hosts)


def test_an_engine_that_dials_again_has_one_place(
    place: HostPort, reactor: Reactor, discovery: Discovery
) -> None:
    assert discovery.remote is not None
    met = discovery.remote._met
    with ExitStack() as stack:
        socks = [stack.enter_context(connect(place)) for _ in range(4)]
        for sock in socks:
            sock.sendall(framed(prove(sock), _hello()))
            assert _answer(sock).kind == "hello"
        assert all(is_closed(sock) for sock in socks[:-1])
        assert reactor.call(lambda: len(met), SECONDS) == 1
        unreachable = stack.enter_context(_from(place, "127.0.0.2"))
        unreachable.sendall(framed(prove(unreachable), _hello()))
        assert _answer(unreachable).kind == "hello"
        assert reactor.call(lambda: len(met), SECONDS) == 2


def _become_session(stack: ExitStack, place: HostPort, host: str, number: int) -> socket.socket:
    sock = stack.enter_context(_from(place, host))
    seals = prove(sock)
    hello = _hello(incarnation=f"{number:032x}", cluster_id=number + 10)
    sock.sendall(framed(seals, hello) + framed(seals, Welcome()))
    assert _answer(sock).kind == "hello"
    return sock


@pytest.mark.parametrize(
    ("hosts", "most"),
    [(_hosts(1), MAX_UNNEEDED_PER_HOST), (_hosts(8), MAX_UNNEEDED)],
    ids=["one", "many"],
)
def test_sessions_that_no_link_needs_are_few(
    place: HostPort, reactor: Reactor, discovery: Discovery, caplog: pytest.LogCaptureFixture,
    hosts: list[str], most: int,
) -> None:  # fmt: skip
    """And one that a link needs is not among them."""
    with ExitStack() as stack, caplog.at_level(logging.WARNING, "datadist.control"):
        needed = _become_session(stack, place, "127.0.0.1", 0)
        assert _answer(needed).kind == "idle"
        (session,) = discovery.sessions.values()
        reactor.call(lambda: discovery.hold(session, "a link"), SECONDS)
        for number in range(1, 2 * most):
            sock = _become_session(stack, place, hosts[number % len(hosts)], number)
            assert _answer(sock).kind == "idle"
            assert reactor.call(lambda: len(discovery.sessions), SECONDS) <= most + 1
        assert not session.closed
    assert 1 <= len(_warnings(caplog, "that no link needs")) <= len(hosts)


def test_one_host_has_so_many_sessions(
    place: HostPort, reactor: Reactor, discovery: Discovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datadist.control.network_discovery.MAX_SESSIONS_PER_HOST", 3)
    with ExitStack() as stack:
        for number in range(3):
            sock = _become_session(stack, place, "127.0.0.1", number)
            assert _answer(sock).kind == "idle"
            session = discovery.sessions[f"{number:032x}"]
            reactor.call(partial(discovery.hold, session, "a link"), SECONDS)
        refused = stack.enter_context(connect(place))
        prove(refused)
        assert is_closed(refused)
        _become_session(stack, place, "127.0.0.2", 9)


def test_members_are_expected_where_they_were_named(reactor: Reactor, discovery: Discovery) -> None:
    assert discovery.remote is not None
    remote = discovery.remote
    remote.expect("table", ["10.0.0.1", "::ffff:10.0.0.2", "a name", None, "x.x.x.x", "fe80::1%lo"])
    remote.expect("call", ["10.0.0.1"])
    for host in ("10.0.0.1", "10.0.0.2", "fe80::1"):
        assert remote.expects(host)
    assert not remote.expects("10.0.0.3")
    remote.forget("table")
    assert [remote.expects(host) for host in ("10.0.0.1", "10.0.0.2")] == [True, False]
    remote.forget("call")
    remote.forget("call")
    assert not remote.expects("10.0.0.1")
