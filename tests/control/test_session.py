"""One connection between two engines (session.py)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from datadist.control import session as sessions
from datadist.control.messages import MAX_FDS, MAX_FRAME, Ack, Idle, Message, OfferMessage, encode
from datadist.control.reactor import READ, Reactor
from datadist.control.session import Session, _Frame, close_all
from datadist.transport import Offer
from tests.descriptors import is_open
from tests.waiting import until

SECONDS = 20.0


def _offer(size: int, regions: int, fds: int = 0) -> OfferMessage:
    return OfferMessage(domain="0" * 32, data=bytes(size), fds=fds, regions=list(range(regions)))


def test_descriptors_of_a_message_that_is_too_large_are_closed() -> None:
    ours, theirs = socket.socketpair()
    reactor = Reactor("test")
    session = Session(reactor, ours)
    fd = os.memfd_create("offered")
    try:
        with pytest.raises(ValueError, match=f"offer message .* exceeds {MAX_FRAME}"):
            session.send(_offer(MAX_FRAME, 1, 1), [fd])
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    finally:
        reactor.call(lambda: session.close("end"), 5)
        reactor.stop()
        theirs.close()


def test_the_largest_offer_fits_a_frame() -> None:
    assert len(encode(_offer(Offer.MAX_DATA, 130_000))) < MAX_FRAME
    assert Offer.MAX_FDS == MAX_FDS


class Pair:
    """A session that is read and written on its reactor, and a plain socket at the other end."""

    def __init__(self) -> None:
        ours, self.theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel's least, a few KiB
        self.theirs.settimeout(SECONDS)
        self.reactor = Reactor("test")
        self.session = Session(self.reactor, ours)
        self.closed = threading.Event()
        self.reason = ""
        self.session.on_closed = self._on_closed
        self.reactor.call(self.session.start, SECONDS)

    def _on_closed(self, _session: Session, reason: str) -> None:
        self.reason = reason
        self.closed.set()

    def settle(self) -> None:
        """Return when the reactor has done what was posted so far."""
        self.reactor.call(lambda: None, SECONDS)

    def receive(self, size: int) -> tuple[bytes, list[int]]:
        """So many bytes, and the inodes of the descriptors that came with any of them.

        One call of the kernel may return bytes without descriptors and those with them together,
        so only where a call of this method begins and ends is told apart.
        """
        data, found = b"", []
        while len(data) < size:
            part, fds, flags, _ = socket.recv_fds(self.theirs, size - len(data), MAX_FDS)
            assert part
            assert not flags & socket.MSG_CTRUNC
            found += [os.fstat(fd).st_ino for fd in fds]
            close_all(fds)
            data += part
        return data, found

    def close(self) -> None:
        self.reactor.call(lambda: self.session.close("end"), SECONDS)
        self.reactor.stop()
        self.theirs.close()


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    # what the kernel has not taken is on its way, however long ago it took something
    monkeypatch.setattr(sessions, "STALLED_SECONDS", 600.0)
    made = Pair()
    yield made
    made.close()


def _files(count: int) -> tuple[list[int], list[int]]:
    """Descriptors, and their inodes."""
    fds = [os.memfd_create("offered") for _ in range(count)]
    return fds, [os.fstat(fd).st_ino for fd in fds]


def _is_open(inode: int) -> bool:
    """Whether this process still has a descriptor of a file that only it had."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.stat(f"/proc/self/fd/{name}").st_ino == inode:
                return True
        except OSError:
            continue
    return False


def test_descriptors_go_once_with_the_first_byte_of_a_frame_that_the_kernel_takes_in_parts(
    pair: Pair,
) -> None:
    fds, inodes = _files(2)
    message = _offer(1 << 20, 3, 2)
    pair.session.send(message, fds)
    assert pair.session.hears(pair.session.sending())
    assert not any(map(is_open, fds)), "the kernel has them: ours are closed"
    first, found = pair.receive(1)
    assert found == inodes
    rest, found = pair.receive(len(encode(message)) - 1)
    assert found == []
    assert first + rest == encode(message)
    pair.settle()
    assert not any(map(_is_open, inodes))
    pair.session.send(Idle())
    assert pair.receive(len(encode(Idle()))) == (encode(Idle()), [])


class _Interrupted(Session):
    """A session where a handler of a signal raises right after the kernel has taken something."""

    interrupts = 1

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_sent_at" and self.interrupts:
            self.interrupts -= 1
            raise KeyboardInterrupt
        super().__setattr__(name, value)


@pytest.mark.parametrize("size", [1, 1 << 20], ids=["whole", "in part"])
def test_descriptors_go_once_where_who_sends_is_interrupted(pair: Pair, size: int) -> None:
    fds, inodes = _files(2)
    message = _offer(size, 3, 2)
    pair.session.__class__ = _Interrupted
    with pytest.raises(KeyboardInterrupt):
        pair.session.send(message, fds)
    pair.settle()
    assert not any(map(is_open, fds))
    assert pair.receive(len(encode(message))) == (encode(message), inodes)
    pair.session.send(Idle())
    assert pair.receive(len(encode(Idle()))) == (encode(Idle()), [])


def test_descriptors_of_a_frame_that_waits_go_with_its_own_first_byte(pair: Pair) -> None:
    fds, inodes = _files(3)
    first, second, third = _offer(1 << 18, 1, 1), _offer(1 << 18, 2, 0), _offer(1 << 18, 3, 2)
    for message, passed in ((first, fds[:1]), (second, []), (third, fds[1:])):
        pair.session.send(message, passed)
    for message, passed in ((first, inodes[:1]), (second, []), (third, inodes[1:])):
        frame = encode(message)
        assert pair.receive(1) == (frame[:1], passed)
        assert pair.receive(len(frame) - 1) == (frame[1:], [])


def test_descriptors_that_were_not_sent_are_closed_with_the_session(pair: Pair) -> None:
    fds, inodes = _files(2)
    pair.session.send(_offer(1 << 20, 1, 1), fds[:1])
    pair.session.send(_offer(1, 1, 1), fds[1:])
    assert _is_open(inodes[1])
    pair.reactor.call(lambda: pair.session.close("enough"), SECONDS)
    assert not _is_open(inodes[1])
    fds, inodes = _files(1)
    pair.session.send(_offer(1, 1, 1), fds)  # on a closed session
    assert not _is_open(inodes[0])


def test_descriptors_that_come_before_the_last_byte_reach_the_message(pair: Pair) -> None:
    heard: list[list[int]] = []
    come = threading.Event()

    def take(_session: Session, _message: object, fds: list[int]) -> None:
        heard.append([os.fstat(fd).st_ino for fd in fds])
        sessions.close_all(fds)
        come.set()

    pair.session.on_message = take
    fds, inodes = _files(2)
    frame = encode(_offer(1000, 1, 2))
    socket.send_fds(pair.theirs, [frame[:1]], fds)
    sessions.close_all(fds)
    for byte in (frame[1:7], frame[7:]):
        pair.settle()
        assert not heard
        pair.theirs.sendall(byte)
    assert come.wait(SECONDS)
    assert heard == [inodes]


class _Stuck:
    """A connection whose first call waits, as where a handler of a signal has interrupted it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.inside, self.go_on = sock, threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)

    def sendmsg(self, *arguments: Any) -> int:
        self.inside.set()
        self.go_on.wait(3 * SECONDS)
        return self.sock.sendmsg(*arguments)


@pytest.mark.parametrize("by_reactor", [False, True])
def test_sending_waits_for_no_other_thread(pair: Pair, by_reactor: bool) -> None:
    stuck = _Stuck(pair.session._sock)
    pair.session._sock = stuck  # type: ignore[assignment]
    first = threading.Thread(target=pair.session.send, args=(_offer(1, 1),), daemon=True)
    first.start()
    assert stuck.inside.wait(SECONDS)
    done = threading.Event()

    def second() -> None:
        pair.session.send(_offer(1, 2))
        done.set()

    if by_reactor:
        pair.reactor.post(second)
    else:
        threading.Thread(target=second, daemon=True).start()
    sent = done.wait(SECONDS)
    stuck.go_on.set()
    assert sent, "it waited for the first one"
    for message in (_offer(1, 1), _offer(1, 2)):
        assert pair.receive(len(encode(message)))[0] == encode(message)


def test_who_has_sent_its_own_does_not_go_on_for_others(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    message, others = encode(_offer(1, 1)), 200
    left = [others]
    flush, sender = pair.session._flush, threading.get_ident()
    here: list[int] = []

    def and_somebody_sends() -> str | None:
        if left[0]:
            left[0] -= 1
            pair.session._unsealed.append(_Frame(message, []))
        here.extend([1] if threading.get_ident() == sender else [])
        return flush()

    monkeypatch.setattr(pair.session, "_flush", and_somebody_sends)
    pair.session.inline = True
    pair.session.send(_offer(1, 1))
    assert len(here) < 10
    assert pair.receive(len(message) * (others + 1))[0] == message * (others + 1)


class _Counting:
    """A socket that counts the calls which send, and those which receive."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.calls, self.reads = sock, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)

    def sendmsg(self, *arguments: Any) -> int:
        self.calls += 1
        return self.sock.sendmsg(*arguments)

    def recvmsg(self, *arguments: Any) -> Any:
        self.reads += 1
        return self.sock.recvmsg(*arguments)


def test_what_arrives_is_read_by_one_call(pair: Pair) -> None:
    counting = _Counting(pair.session._sock)
    pair.session._sock = counting  # type: ignore[assignment]
    heard: list[str] = []
    pair.session.on_message = lambda _session, message, _fds: heard.append(message.kind)
    pair.theirs.sendall(encode(Ack(seq=1)) + encode(Ack(seq=2)))
    until(lambda: heard == ["ack", "ack"])
    pair.settle()
    assert counting.reads == 1


@pytest.mark.parametrize("last_is_at_once", [False, True])
def test_what_a_turn_sends_soon_goes_out_together(pair: Pair, last_is_at_once: bool) -> None:
    counting = _Counting(pair.session._sock)
    pair.session._sock = counting  # type: ignore[assignment]
    fds, inodes = _files(2)
    messages = [_offer(1, 1, 2), _offer(1, 2), _offer(1, 3)]

    def send() -> None:
        pair.session.send_soon(messages[0], fds)
        pair.session.send_soon(messages[1])
        (pair.session.send if last_is_at_once else pair.session.send_soon)(messages[2])

    pair.reactor.call(send, SECONDS)
    frames = b"".join(map(encode, messages))
    assert pair.receive(len(frames)) == (frames, inodes)
    pair.settle()
    assert counting.calls == 1


def test_a_turn_that_sends_soon_often_is_followed_by_one_call(pair: Pair) -> None:
    posted: list[int] = []

    def send() -> None:
        before = len(pair.reactor._posted)
        for size in range(1, 4):
            pair.session.send_soon(_offer(1, size))
        posted.append(len(pair.reactor._posted) - before)

    for _ in range(2):
        pair.reactor.call(send, SECONDS)
        pair.settle()
    assert posted == [1, 1]


def test_descriptors_go_with_the_begin_of_their_own_frame(pair: Pair) -> None:
    first, second = _files(1), _files(1)
    messages = [(_offer(1, 1), []), (_offer(1, 2, 1), first[0]), (_offer(1, 3, 1), second[0])]

    def send() -> None:
        for message, fds in messages:
            pair.session.send_soon(message, fds)

    pair.reactor.call(send, SECONDS)
    sizes = [len(encode(message)) for message, _ in messages]
    assert pair.receive(sizes[0]) == (encode(messages[0][0]), [])
    assert pair.receive(sizes[1]) == (encode(messages[1][0]), first[1])
    assert pair.receive(sizes[2]) == (encode(messages[2][0]), second[1])


def test_what_is_sent_soon_elsewhere_is_sent_at_once(pair: Pair) -> None:
    pair.session.send_soon(_offer(1, 1))
    assert pair.receive(len(encode(_offer(1, 1))))[0] == encode(_offer(1, 1))


# -- the process at the other end -----------------------------------------------------------------

LEAVES_A_CHILD = """
import socket, subprocess, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
child = subprocess.Popen(["sleep", "600"], pass_fds=[sock.fileno()], stdout=subprocess.DEVNULL)
print(child.pid)
"""


def test_a_session_ends_with_the_process_although_its_child_keeps_the_socket(
    tmp_path: Path,
) -> None:
    path = tmp_path / "s"
    closed, reasons = threading.Event(), list[str]()
    reactor = Reactor("test")

    def on_closed(_session: Session, reason: str) -> None:
        reasons.append(reason)
        closed.set()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(SECONDS)
        peer = subprocess.Popen(
            [sys.executable, "-c", LEAVES_A_CHILD, str(path)], stdout=subprocess.PIPE, text=True
        )
        with peer:
            session = Session(reactor, listener.accept()[0])
            assert session.peer_pid == peer.pid
            session.on_closed = on_closed
            reactor.call(session.start, SECONDS)
            assert peer.stdout is not None
            child = int(peer.stdout.read())
    try:
        assert closed.wait(SECONDS)
        assert reasons == ["its process ended"]
    finally:
        os.kill(child, signal.SIGKILL)
        reactor.call(lambda: session.close("end"), SECONDS)
        reactor.stop()


# -- bytes that wait for a peer that does not read ------------------------------------------------


def _fill(pair: Pair, limit: int) -> None:
    """Queue frames up to exactly that many bytes which wait."""
    smallest = len(encode(_offer(0, 0)))
    while (room := limit - pair.session._queued) > 0:
        size = min(room, 1 << 16)
        if 0 < room - size < smallest + 4:  # what is left must hold one more frame
            size -= smallest + 4
        frame = _offer(0, 0).model_copy(update={"domain": "0" * (32 + size - smallest)})
        assert len(encode(frame)) == size
        pair.session.send(frame)


def test_a_peer_may_leave_so_many_bytes_unread_and_no_more(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 1 << 20
    monkeypatch.setattr(sessions, "MAX_QUEUED", limit)
    while not pair.session.hears(pair.session.sending()):
        pair.session.send(Idle())
    _fill(pair, limit)
    assert pair.session._queued == limit
    pair.settle()
    assert not pair.closed.is_set()
    pair.session.send(Idle())
    assert pair.closed.wait(SECONDS)
    assert pair.reason == f"it left {limit + len(encode(Idle()))} bytes unread, more than {limit}"


def test_what_was_read_counts_no_more(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 1 << 18
    monkeypatch.setattr(sessions, "MAX_QUEUED", limit)
    frame = encode(_offer(1 << 16, 1))
    for _ in range(12):  # three times the limit
        pair.session.send(_offer(1 << 16, 1))
        assert pair.receive(len(frame))[0] == frame
    pair.settle()
    assert not pair.closed.is_set()


# -- what came, and its end ----------------------------------------------------------------------


def _send_by_them(pair: Pair, data: bytes, fds: list[int]) -> None:
    socket.send_fds(pair.theirs, [data], fds)
    close_all(fds)


def _is_closed_here(inode: int) -> bool:
    deadline = time.monotonic() + SECONDS
    while _is_open(inode):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def test_descriptors_of_a_frame_that_is_not_complete_are_closed_with_the_session(
    pair: Pair,
) -> None:
    fds, inodes = _files(2)
    _send_by_them(pair, encode(_offer(8, 1, 2))[:-1], fds)
    pair.settle()
    pair.theirs.close()
    assert pair.closed.wait(SECONDS)
    assert all(map(_is_closed_here, inodes))


def test_descriptors_that_no_message_names_end_the_session(pair: Pair) -> None:
    inodes = []
    for _ in range(2):
        fds, more = _files(MAX_FDS)
        inodes += more
        _send_by_them(pair, encode(Idle()), fds)
    assert pair.closed.wait(SECONDS)
    assert pair.reason == "it sent descriptors that no message names"
    assert all(map(_is_closed_here, inodes))


def test_descriptors_for_which_there_is_no_room_end_the_session(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel says that it has dropped some: the frame must not be taken without them."""
    received = socket.recv_fds

    def short(*args: Any) -> Any:
        data, fds, flags, address = received(*args)
        close_all(fds)
        return data, [], flags | socket.MSG_CTRUNC if fds else flags, address

    monkeypatch.setattr(socket, "recv_fds", short)
    heard: list[str] = []
    pair.session.on_message = lambda _session, message, _fds: heard.append(message.kind)
    _send_by_them(pair, encode(_offer(8, 1, 1)), _files(1)[0])
    assert pair.closed.wait(SECONDS)
    assert "descriptors it sent were lost" in pair.reason
    assert heard == []


def test_what_a_process_said_before_it_ended_counts(pair: Pair) -> None:
    heard: list[str] = []
    pair.session.on_message = lambda _session, message, _fds: heard.append(message.kind)

    def ends() -> None:  # both are seen at once, in whatever order
        pair.theirs.sendall(encode(Idle()))
        pair.session._on_exit(READ)

    pair.reactor.call(ends, SECONDS)
    assert pair.closed.wait(SECONDS)  # in the next turn where this one took its share
    assert (heard, pair.reason) == (["idle"], "its process ended")


def test_what_has_arrived_is_settled_once_it_was_handled(pair: Pair) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def handle(_session: Session, _message: Message, _fds: list[int]) -> None:
        entered.set()
        assert go_on.wait(SECONDS)

    pair.session.on_message = handle
    assert pair.session.settled()
    try:
        pair.theirs.sendall(encode(Idle()))
        assert entered.wait(SECONDS)
        assert not pair.session.settled(), "it has been read, and is being handled"
        pair.theirs.sendall(encode(Idle()))
        assert not pair.session.settled()
    finally:
        go_on.set()
    deadline = time.monotonic() + SECONDS
    while not pair.session.settled():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_what_nobody_has_read_is_not_settled(pair: Pair) -> None:
    go_on = threading.Event()

    def keep_busy() -> None:
        go_on.wait(SECONDS)

    pair.reactor.post(keep_busy)
    try:
        pair.theirs.sendall(encode(Idle()))
        assert not pair.session.settled()
    finally:
        go_on.set()
    pair.reactor.call(lambda: pair.session.close("over"), SECONDS)
    assert pair.session.settled(), "nothing is waited for after the end"
