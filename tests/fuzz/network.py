"""A live listener and a live dial, over TCP: strangers, forgers, and what is said behind the handshake.

An input decides who dials, whether the other end has the key, what is changed on the way, and which
messages follow. Afterwards an honest peer must be met, and nothing may be left.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from datadist.control.channel import Handshake, HandshakeError
from datadist.control.discovery import Discovery
from datadist.control.hostport import HostPort
from datadist.control.messages import HEADER, WIRE_VERSION, Message, decode
from datadist.control.reactor import Reactor
from datadist.control.runtime_dir import Address
from datadist.control.session import Session
from datadist.control.tcp import NetworkSettings
from tests.fuzz.choices import Choices, changed, tampered
from tests.fuzz.handshakes import KEY, WRONG, attempt, conversation
from tests.fuzz.templates import TEMPLATES
from tests.in_process_engine import Collector

SECONDS = 50.0
HANDSHAKE_SIZE = 48 + 32
"""Bytes that either end says in it."""
MESSAGES = 8
"""Of one input, at most."""
LINGER = struct.pack("ii", 1, 0)
"""Closing resets the connection, so that no port waits for its end."""


class Wire:
    """The other end of a connection: what it does is up to the input."""

    def __init__(self, sock: socket.socket, dialled: bool, key: bytes) -> None:
        sock.settimeout(SECONDS)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
        self.sock = sock
        self.handshake = Handshake(key, dialled)
        self.said: list[bytes] = []
        """All that is to be said, before it is changed."""
        self.heard: list[bytes] = []
        self.arrived = b""
        self.touched = False
        self._ends: list[tuple[int, str]] = []
        """Where each message ends in what is said, and its kind."""
        self._sealed: list[bytes] = []

    def send(self, data: bytes, arrives: bytes) -> None:
        """Say something that arrives as something else."""
        self.touched = self.touched or arrives != data
        self.said.append(data)
        with suppress(OSError):
            self.sock.sendall(arrives)
            self.arrived += arrives

    def arrived_true(self) -> list[str]:
        """Kinds of the messages that arrive as they were said, also where a later one brings them."""
        said = b"".join(self.said)
        return [kind for end, kind in self._ends if self.arrived.startswith(said[:end])]

    def babble(self, data: bytes) -> None:
        """Send bytes that no end with the key would say now. Raises ``OSError`` when it has closed."""
        self.sock.sendall(data)
        self.arrived += data

    def shake_hands(self, choices: Choices | None = None) -> None:
        """The handshake; what is said may be changed."""
        data = self.handshake.begin()
        while True:
            if data:
                self.send(
                    data, tampered(data, choices, self.said + self.heard) if choices else data
                )
            if not self.handshake.wanted or self.touched:
                return
            data = self._answer()
            if not data and self.handshake.wanted:
                return

    def _answer(self) -> bytes:
        while wanted := self.handshake.wanted:
            data = self.receive(wanted)
            if not data:
                return b""
            self.heard.append(data)
            try:
                answer = self.handshake.feed(data)
            except HandshakeError:
                return b""
            if answer:
                return answer
        return b""

    def receive(self, size: int) -> bytes:
        """What comes next; nothing at the end."""
        try:
            return self.sock.recv(size)
        except ConnectionError:
            return b""

    def say(self, message: dict[str, Any], choices: Choices | None = None) -> None:
        """A frame with its MAC, which may be changed."""
        assert self.handshake.seals is not None
        body = json.dumps(message).encode()
        frame = HEADER.pack(len(body)) + body
        sealed = frame + self.handshake.seals.sending.next(frame)
        self.send(sealed, tampered(sealed, choices, [*self._sealed, frame]) if choices else sealed)
        self._sealed.append(sealed)
        self._ends.append((sum(map(len, self.said)), message["kind"]))

    def hear(self) -> Message | None:
        """The next message; None at the end. Raises where its MAC is wrong."""
        frame = self._exactly(HEADER.size)
        body = self._exactly(HEADER.unpack(frame)[0]) if frame else b""
        tag = self._exactly(32) if body else b""
        if not tag:
            return None
        assert self.handshake.seals is not None
        assert self.handshake.seals.receiving.check(frame + body, tag)
        return decode(body)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            if not (more := self.receive(size - len(data))):
                return b""
            data += more
        return data

    def end(self) -> None:
        """Say no more, and wait until the other end has closed: it has handled everything then."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        while self.receive(1 << 16):
            pass


class Net:
    """The target: an engine's runtime directory with a listener; call it with an input."""

    def __init__(self, place: Path, stack: ExitStack) -> None:
        self._reactor = Reactor("fuzzed")
        stack.callback(self._reactor.stop)
        self._discovery = Discovery(self._reactor, 1, place, NetworkSettings(KEY), "")
        assert self._discovery.remote is not None
        self._remote = self._discovery.remote
        self.inside = 0
        """Connections whose handshake succeeded."""
        self._count_those_inside()
        self._discovery.on_message = self._on_message
        self._heard: list[Message] = []
        self._outcomes: list[Address | str] = []
        self._call(self._discovery.start)
        self._listener = self._call(lambda: self._remote.listen(HostPort("127.0.0.1", 0)))
        stack.callback(lambda: self._call(self._discovery.close))
        self._server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self._server.settimeout(SECONDS)
        self._log: list[str] = []
        logger, handler = logging.getLogger("datadist"), Collector(self._log)
        logger.addHandler(handler)
        stack.callback(logger.removeHandler, handler)
        self._transcript = conversation()
        self._serve()
        self._descriptors = len(os.listdir("/proc/self/fd"))

    def _call(self, function: Callable[[], Any]) -> Any:
        return self._reactor.call(function, SECONDS)

    def _count_those_inside(self) -> None:
        meet = self._remote._meet

        def counted(*args: Any) -> None:
            self.inside += 1
            meet(*args)

        self._remote._meet = counted  # type: ignore[assignment, method-assign]

    def _on_message(self, session: Session, message: Message, _fds: list[int]) -> None:
        self._heard.append(message)

    def __call__(self, data: bytes) -> bool:
        """Whether the other end got in. Raises where that was wrong, or the engine has suffered."""
        self._heard.clear()
        self._outcomes.clear()
        self._log.clear()
        self.inside = 0
        choices = Choices(data)
        how = choices.byte()
        dialled, knows = how % 2 == 0, how // 2 % 4 != 3
        wire = self._connect(dialled, KEY if knows else WRONG)
        try:
            (self._play_forger if knows else self._play_unauthenticated)(wire, choices)
            wire.end()
        finally:
            wire.sock.close()
        self._check(wire, dialled)
        inside = self.inside > 0
        self._serve()
        self._until_at_rest()
        return inside

    def _connect(self, dialled: bool, key: bytes) -> Wire:
        if dialled:
            place = self._listener.endpoint
            return Wire(socket.create_connection(place, SECONDS), True, key)
        place = HostPort("127.0.0.1", self._server.getsockname()[1])
        self._call(lambda: self._remote.contact(place, None, self._outcomes.append, again=False))
        return Wire(self._server.accept()[0], False, key)

    # -- the other end ---------------------------------------------------------------------------

    def _play_unauthenticated(self, wire: Wire, choices: Choices) -> None:
        said = list(self._transcript)
        said.append(wire.handshake.begin() or bytes(48))
        while not choices.over:
            with suppress(OSError):
                wire.babble(attempt(choices, said, wire.handshake))
                self._call(lambda: None)
                wire.sock.setblocking(False)
                said.append(wire.sock.recv(1 << 12) or b"\0")
            wire.sock.settimeout(SECONDS)

    def _play_forger(self, wire: Wire, choices: Choices) -> None:
        """Has the key, and a wire that changes what it says."""
        wire.shake_hands(choices)
        if wire.handshake.seals is None or wire.touched:
            while wire.touched and not choices.over:
                with suppress(OSError):
                    wire.babble(attempt(choices, wire.said + wire.heard, wire.handshake))
            return
        incarnation = secrets.token_hex(16)
        for _ in range(MESSAGES):
            if choices.over:
                return
            wire.say(self._message(choices, incarnation), choices)

    def _message(self, choices: Choices, incarnation: str) -> dict[str, Any]:
        how = choices.byte()
        hello = _hello(incarnation, 3)
        own = self._discovery.address.incarnation
        message = [hello, {"kind": "welcome"}, choices.pick(TEMPLATES)][how % 3]
        return changed(message, choices, [own, incarnation]) if how >= 128 else message

    # -- what must hold --------------------------------------------------------------------------

    def _check(self, wire: Wire, dialled: bool) -> None:
        """After everything was handled: who got in, and what was taken from them."""
        for _ in range(2):
            self._call(lambda: None)
        hands = b"".join(wire.said)[:HANDSHAKE_SIZE]
        may = len(hands) == HANDSHAKE_SIZE and wire.arrived[:HANDSHAKE_SIZE] == hands
        assert self.inside == may, f"{self.inside} got in, untouched: {may}: {self._log[-3:]}"
        kinds = [message.kind for message in self._heard]
        true = wire.arrived_true()
        untouched = [kind for kind in true[2 if dialled else 1 :] if kind != "idle"]
        assert kinds == untouched[: len(kinds)], f"{kinds} were taken, {true} arrived untouched"
        assert len(self._outcomes) == (0 if dialled else 1), f"ends of a dial: {self._outcomes}"

    def _serve(self) -> None:
        """An honest peer gets in, is heard, and goes."""
        heard = len(self._heard)
        wire = self._connect(True, KEY)
        try:
            wire.shake_hands()
            assert wire.handshake.seals is not None, f"an honest peer was refused: {self._log[-3:]}"
            wire.say(_hello(secrets.token_hex(16), 9))
            answer = wire.hear()
            assert answer is not None, f"an honest peer was not answered: {self._log[-3:]}"
            assert answer.kind == "hello"
            wire.say({"kind": "welcome"})
            wire.say({"kind": "sync", "id": 7})
            wire.say({"kind": "goodbye"})
            wire.end()
        finally:
            wire.sock.close()
        assert [message.kind for message in self._heard[heard:]] == ["sync"]

    def left(self) -> dict[str, Any]:
        """What the runtime directory still holds of peers."""
        discovery, remote = self._discovery, self._remote
        held: dict[str, Any] = {
            "proving": [*self._listener._strangers, *self._listener._members],
            "dials": remote._dials, "met": remote._met,
            "sessions": discovery.sessions, "handshakes": discovery._handshakes, "idle": discovery._idle,
            "idle peers": discovery._peer_idle, "holds": discovery._holds,
        }  # fmt: skip
        return {name: repr(there)[:300] for name, there in held.items() if there}

    def _until_at_rest(self) -> None:
        deadline = time.monotonic() + SECONDS
        while left := self._call(self.left):
            assert time.monotonic() < deadline, f"not let go of: {left}"
            time.sleep(0.0005)
        while len(os.listdir("/proc/self/fd")) > self._descriptors:
            assert time.monotonic() < deadline, "descriptors were not closed"
            time.sleep(0.0005)
        bad = [line for line in self._log if "report it" in line or "defect" in line]
        assert not bad, "\n".join(bad)


def _hello(incarnation: str, cluster: int) -> dict[str, Any]:
    return {"kind": "hello", "wire": WIRE_VERSION, "incarnation": incarnation, "cluster_id": cluster,
            "dial_back": False, "refused": False, "job": "", "program": ""}  # fmt: skip


@contextmanager
def network() -> Iterator[Callable[[bytes], bool]]:
    """The target, with a listener as long as it is needed."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="datadist-")))
        yield Net(place, stack)
