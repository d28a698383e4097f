"""Descriptors whose close blocks are closed where nobody waits for that."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from datadist.control import closing
from datadist.control.closing import Closer, is_memory
from datadist.control.messages import Idle, encode
from datadist.control.reactor import Reactor
from datadist.control.session import KERNEL_FDS, Session
from tests.lingering import HANGS, Lingering
from tests.waiting import until

SECONDS = 60.0


@pytest.fixture
def lingering() -> Iterator[Lingering]:
    made = Lingering()
    yield made
    made.free()


def _session(reactor: Reactor) -> tuple[Session, socket.socket, list[str]]:
    ours, theirs = socket.socketpair()
    session, closed = Session(reactor, ours), list[str]()
    session.on_closed = lambda _session, reason: closed.append(reason)
    return session, theirs, closed


def _answers_at_once(reactor: Reactor) -> None:
    began = time.monotonic()
    reactor.call(lambda: None, SECONDS)
    assert time.monotonic() - began < HANGS / 2


@pytest.mark.parametrize("many", [1, 2, KERNEL_FDS])
def test_a_descriptor_that_blocks_in_close_blocks_nobody(
    reactor: Reactor, lingering: Lingering, many: int
) -> None:
    session, theirs, closed = _session(reactor)
    lingering.send(theirs, many)
    reactor.call(session.start, SECONDS)
    theirs.close()
    until(lambda: bool(closed))
    _answers_at_once(reactor)
    assert reactor.closer.waiting > 0, "its close blocks indeed"
    lingering.free()
    until(lambda: reactor.closer.waiting == 0)


def test_descriptors_in_the_queue_of_a_socket_that_is_closed_block_nobody(
    reactor: Reactor, lingering: Lingering
) -> None:
    session, theirs, closed = _session(reactor)
    lingering.send(theirs)
    reactor.call(lambda: session.close("over"), SECONDS)
    assert closed == ["over"]
    _answers_at_once(reactor)
    assert reactor.closer.waiting == 1
    theirs.settimeout(SECONDS)
    with pytest.raises(OSError, match="Broken pipe"):
        theirs.send(b"x")
    theirs.close()


def test_connections_that_were_never_accepted_block_nobody(
    reactor: Reactor, lingering: Lingering
) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as other:
        listener.bind("")
        listener.listen()
        listener.setblocking(False)
        other.connect(listener.getsockname())
        lingering.send(other)
        began = time.monotonic()
        reactor.closer.close_listener(listener)
        assert time.monotonic() - began < HANGS / 2
        assert reactor.closer.waiting == 1
        assert listener.fileno() == -1
        with pytest.raises(OSError, match="Broken pipe"):
            other.send(b"x")


def test_memory_is_closed_at_once_and_waits_for_nothing(
    reactor: Reactor, lingering: Lingering
) -> None:
    reactor.closer.take([lingering.take()])
    fd = os.memfd_create("offered")
    assert is_memory(fd)
    reactor.closer.discard([fd])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert reactor.closer.waiting == 1


def test_sockets_of_honest_peers_are_closed_at_once(reactor: Reactor, lingering: Lingering) -> None:
    reactor.closer.take([lingering.take()])
    session, theirs, closed = _session(reactor)
    reactor.call(session.start, SECONDS)
    theirs.sendall(encode(Idle()))
    reactor.call(session.drain, SECONDS)
    reactor.call(lambda: session.close("over"), SECONDS)
    assert closed == ["over"]
    assert reactor.closer.waiting == 1
    assert theirs.recv(1) == b""
    theirs.close()


def test_the_end_says_what_it_left(lingering: Lingering, caplog: pytest.LogCaptureFixture) -> None:
    closer = Closer("test")
    closer.take([lingering.take(), os.dup(0)])
    closer.stop(0.1)
    assert "2 descriptors that peers sent are not closed after 0.1 s" in caplog.text
    lingering.free()
    until(lambda: closer.waiting == 0)


def test_the_end_closes_what_waits() -> None:
    closer = Closer("test")
    reading, writing = os.pipe()
    closer.take([writing])
    closer.stop()
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_it_is_full_at_its_limit(lingering: Lingering, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closing, "MAX_WAITING", 2)
    closer = Closer("test")
    closer.take([lingering.take()])
    assert not closer.full
    closer.take([os.dup(0)])
    assert closer.full
    lingering.free()
    until(lambda: not closer.full)
    closer.stop()


def test_no_thread_is_started_later(reactor: Reactor) -> None:
    session, theirs, _ = _session(reactor)
    before = set(threading.enumerate())
    reactor.call(session.start, SECONDS)
    theirs.sendall(encode(Idle()) * 100)
    reactor.call(session.drain, SECONDS)
    reactor.call(lambda: session.close("over"), SECONDS)
    assert set(threading.enumerate()) <= before
    theirs.close()
