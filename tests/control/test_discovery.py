"""Who gets a session with an engine, who does not, and what ends one (discovery.py)."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from datadist.control import discovery
from datadist.control.account import Item
from datadist.control.messages import MAX_FDS, MAX_FRAME, WIRE_VERSION
from datadist.control.runtime_dir import Address
from tests import descriptors, nodes
from tests.fuzz.templates import TOKEN
from tests.in_process_engine import SECONDS, TABLE, Engine
from tests.nodes import Node
from tests.raw_peer import RawPeer, memory, socket_of

Start = Callable[..., Node]


def test_silent_and_slow_strangers_are_shown_out(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "HANDSHAKE_SECONDS", 1.0)
    silent = engine.raw_peer(hello=False)
    slow = engine.raw_peer(hello=False)
    assert slow.send((4000).to_bytes(4, "big"))
    started = time.monotonic()
    while time.monotonic() - started < 30 and slow.send(b" "):  # never silent for long
        time.sleep(0.1)
    assert time.monotonic() - started < 30
    assert silent.closed(SECONDS)
    assert engine.ended("it did not say hello in time", times=2), engine.ends()
    monkeypatch.setattr(discovery, "HANDSHAKE_SECONDS", SECONDS)  # for who works
    engine.works()


def test_an_engine_of_another_job_is_not_served(engine: Engine) -> None:
    """It has another place; one that comes to ours nevertheless has no session."""
    hello = {"kind": "hello", "wire": WIRE_VERSION, "cluster_id": 2}
    for number, more in enumerate(({}, {"dial_back": True}, {"refused": True})):
        raw_peer = engine.raw_peer(number, hello=False)
        incarnation = f"{number:032x}"
        raw_peer.say({**hello, "incarnation": incarnation, "job": "another", **more})
        assert raw_peer.closed(SECONDS)
    assert engine.ended("it belongs to another job", times=3), engine.ends()
    assert not [line for line in engine.log if "refused its link" in line]
    engine.works()


def test_of_a_crowd_that_says_nothing_the_eldest_goes(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "MAX_HANDSHAKES", 4)
    monkeypatch.setattr(discovery, "HANDSHAKE_SECONDS", 600.0)  # none goes because its time is over
    crowd = [engine.raw_peer(hello=False) for _ in range(4)]
    engine.works()  # there was room for that one: it takes the place of the oldest
    assert crowd[0].closed(SECONDS)
    assert engine.ended("too many others wait")
    assert not any(raw_peer.closed(0.05) for raw_peer in crowd[1:])
    crowd.append(engine.raw_peer(hello=False))
    assert not any(raw_peer.closed(0.05) for raw_peer in crowd[1:])
    crowd.append(engine.raw_peer(hello=False))
    assert crowd[1].closed(SECONDS)
    assert not any(raw_peer.closed(0.05) for raw_peer in crowd[2:])


def test_crowds_of_silent_strangers_do_not_stall_a_link(
    start_node: Start, runtime_dir: Path
) -> None:
    first, second = start_node(1), start_node(2)
    crowd = [
        RawPeer(socket_of(runtime_dir, cluster), hello=False)
        for cluster in (1, 2)
        for _ in range(300)
    ]
    nodes.link_pair(first, second)
    for raw_peer in crowd:
        raw_peer.close()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "it sent a frame of 1195725856 bytes, more than 4096"),
        (b"\xff" * 64, "it sent a frame of 4294967295 bytes, more than 4096"),
        (b"\0\0\0\0", "it sent a frame that is not valid: text: Invalid JSON"),
        (b"\0\0\0\2{}", "it sent a frame that is not valid: text: Unable to extract tag"),
        (b"\0\0\0\4null", "it sent a frame that is not valid: text: "),
        (b'\0\0\0\x0f{"kind":"idle"}', "it said idle before hello"),
        (b"\0", "it did not say hello in time"),
    ],
)
def test_babble_before_hello(
    engine: Engine, data: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "in time" in reason:
        monkeypatch.setattr(discovery, "HANDSHAKE_SECONDS", 1.0)
    raw_peer = engine.raw_peer(hello=False)
    raw_peer.send(data)
    assert raw_peer.closed(SECONDS)
    assert engine.ended(reason), engine.ends()
    monkeypatch.setattr(discovery, "HANDSHAKE_SECONDS", SECONDS)
    engine.works()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"wire": WIRE_VERSION + 1}, "it speaks another protocol version"),
        ({"incarnation": "f" * 32}, "it dialled although it should have knocked"),
        ({"incarnation": "0"}, "it sent a frame that is not valid: hello.incarnation"),
        ({"cluster_id": -1}, "it sent a frame that is not valid: hello.cluster_id"),
        ({"program": "x" * 81}, "it sent a frame that is not valid: hello.program"),
        ({"more": 1}, "it sent a frame that is not valid: hello.more"),
        ({"dial_back": True}, "knocked"),
        ({"refused": True}, "it may not link"),
    ],
)
def test_hellos_that_begin_no_session(engine: Engine, changes: dict[str, Any], reason: str) -> None:
    hello = {"kind": "hello", "wire": WIRE_VERSION, "incarnation": "0" * 32, "cluster_id": 2}
    raw_peer = engine.raw_peer(hello=False)
    raw_peer.say({**hello, **changes})
    assert raw_peer.closed(SECONDS)
    assert engine.ended(reason), engine.ends()
    engine.works()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"kind": "hello", "wire": WIRE_VERSION, "incarnation": "0" * 32, "cluster_id": 2},
         "it sent hello where that has no meaning"),
        ({"kind": "welcome"}, "it sent welcome where that has no meaning"),
        ({"kind": "shout"}, "it sent a frame that is not valid: text: Input tag 'shout'"),
        ({"kind": "sync", "id": -1}, "it sent a frame that is not valid: sync.id"),
        ({"kind": "ready", "domain": "x"}, "it sent a frame that is not valid: ready.domain"),
        ({"kind": "offer", "domain": TOKEN, "data": "", "fds": MAX_FDS + 1, "regions": []},
         "it sent a frame that is not valid: offer.fds"),
        ({"kind": "offer", "domain": TOKEN, "data": "", "fds": 1, "regions": []},
         "it sent fewer descriptors than it said"),
        ({"kind": "goodbye"}, "it said goodbye"),
    ],
)  # fmt: skip
def test_what_ends_a_session_is_named(engine: Engine, message: dict[str, Any], reason: str) -> None:
    raw_peer = engine.raw_peer()
    assert raw_peer.hear("hello")
    assert raw_peer.say(message)
    assert raw_peer.closed(SECONDS)
    assert engine.ended(reason), engine.ends()
    engine.works()


DIALLED = "f" * 32
HELLO = {"kind": "hello", "wire": WIRE_VERSION, "cluster_id": 2}


@pytest.fixture
def dialled(engine: Engine) -> Iterator[socket.socket]:
    """The socket of an engine that ours dials when that engine has knocked; its backlog is short."""
    directory = os.open(engine.runtime_dir, os.O_PATH)  # paths of sockets are short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{directory}/{Address(2, DIALLED).file_name}")
        listener.listen(0)
        listener.settimeout(SECONDS)
        yield listener
    os.close(directory)


def _request_dial_back(engine: Engine) -> None:
    engine.raw_peer(hello=False).say({**HELLO, "incarnation": DIALLED, "dial_back": True})


def test_another_engine_than_the_one_dialled_has_no_session(
    engine: Engine, dialled: socket.socket
) -> None:
    """As where a name in the runtime directory leads to somebody else."""
    _request_dial_back(engine)
    with dialled.accept()[0] as answering:
        answering.settimeout(SECONDS)
        body = json.dumps({**HELLO, "incarnation": "e" * 32}).encode()
        answering.sendall(len(body).to_bytes(4, "big") + body)
        while answering.recv(4096):
            pass
    assert engine.ended("another engine answered than the one dialled"), engine.ends()
    engine.works()


def test_an_engine_that_has_many_to_accept_is_dialled_again(
    engine: Engine, dialled: socket.socket
) -> None:
    with ExitStack() as crowd:
        before = 0
        with suppress(BlockingIOError):
            while True:
                sock = crowd.enter_context(socket.socket(socket.AF_UNIX))
                sock.setblocking(False)
                sock.connect(dialled.getsockname())
                before += 1
        _request_dial_back(engine)
        assert engine.ended("knocked")
        engine.works()  # it has dialled in vain
        for _ in range(before + 1):
            last = crowd.enter_context(dialled.accept()[0])
        last.settimeout(SECONDS)
        assert b'"hello"' in last.recv(4096)


def test_a_session_that_neither_end_needs_is_closed(engine: Engine, start_node: Start) -> None:
    """By the one whose incarnation comes first, with a goodbye to the other one."""
    pair, other = {1: 0, 2: 1}, start_node(2)
    other.begin(nodes.link_and_wait, "pair", pair)
    comm_id = engine.api.link("pair", pair, nodes.table_for(pair))
    engine.api.wait_link(comm_id)
    other_id = other.result()
    engine.api.unlink(comm_id)
    other.do(nodes.unlink, other_id)
    ends = ("ended: neither end needs it", "ended: it said goodbye")
    deadline = time.monotonic() + SECONDS
    while not any(end in line for line in engine.ends() for end in ends):
        assert time.monotonic() < deadline, engine.ends()
        time.sleep(0.005)


def test_a_large_frame_before_hello_is_not_waited_for(engine: Engine) -> None:
    raw_peer = engine.raw_peer(hello=False)
    raw_peer.send((8 << 20).to_bytes(4, "big") + b" " * 1000)
    assert raw_peer.closed(SECONDS)
    assert engine.ended("it sent a frame of 8388608 bytes, more than 4096")


@pytest.mark.parametrize("over", [0, 1])
def test_a_frame_may_be_so_large_and_no_larger(engine: Engine, over: int) -> None:
    raw_peer = engine.raw_peer()
    assert raw_peer.hear("hello")
    size = MAX_FRAME + over
    body = b'{"kind":"sync","id":7' + b" " * (size - 22) + b"}"
    assert len(body) == size
    raw_peer.send(size.to_bytes(4, "big") + body)
    if over:
        assert raw_peer.closed(SECONDS)
        assert engine.ended(f"it sent a frame of {size} bytes, more than {MAX_FRAME}")
    else:
        assert raw_peer.hear("synced") is not None


def test_descriptors_that_nobody_asked_for_do_not_pile_up(engine: Engine) -> None:
    raw_peer = engine.raw_peer()
    assert raw_peer.hear("hello")
    before = descriptors.count()
    frame = b'\0\0\0\x0f{"kind":"idle"}'
    fd = memory(4096)
    for _ in range(100):
        if not raw_peer.send(frame, [fd] * 16):
            break
    assert raw_peer.closed(SECONDS)
    assert engine.ended("it sent descriptors that no message names")
    os.close(fd)
    assert descriptors.falls_to(before + 31)
    engine.works()


MOST_WISHES = Item.WISHES.limit


def test_a_peer_may_have_so_many_wishes_and_no_more(engine: Engine) -> None:
    raw_peer = engine.raw_peer()
    announcement = {
        "kind": "announce", "name": "x", "ranks": [[1, 0], [2, 1]], "table": TABLE,
        "backend": "shm", "one_sided": False,
    }  # fmt: skip
    for number in range(MOST_WISHES):
        assert raw_peer.say({**announcement, "link": number})
    raw_peer.say({"kind": "withdraw", "link": 5})
    raw_peer.say({**announcement, "link": MOST_WISHES})
    raw_peer.say({"kind": "sync", "id": 7})
    assert raw_peer.hear("synced") is not None
    raw_peer.say({**announcement, "link": MOST_WISHES + 1})
    assert raw_peer.closed(SECONDS)
    many = f"it has {MOST_WISHES + 1} links that it waits for, more than {MOST_WISHES}"
    assert engine.ended(many)
    engine.works()


def _as_nobody(path: str) -> str:
    """Connect as user 65534, in a child."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(SECONDS)
                sock.connect(path)
                answer = repr(sock.recv(100))
        except OSError as error:
            answer = type(error).__name__
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading) as pipe:
        return pipe.read()


def test_another_user_is_refused(start_node: Start) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    with tempfile.TemporaryDirectory(prefix="datadist-") as place:
        runtime_dir = Path(place) / "run"
        runtime_dir.mkdir(mode=0o700)
        node = start_node()
        node.do(_move_to, str(runtime_dir))
        node.do(nodes.init, 1)
        path = socket_of(runtime_dir, 1)
        assert _as_nobody(str(path)) == "PermissionError"  # the directory is closed
        for place_to_open, mode in ((Path(place), 0o755), (runtime_dir, 0o755), (path, 0o777)):
            place_to_open.chmod(mode)
        assert _as_nobody(str(path)) in ("b''", "ConnectionResetError")
        nodes.said(node, "", "refused pid", "65534")
        node.do(nodes.finalize)


def _move_to(_here: nodes.Here, runtime_dir: str) -> None:
    os.environ["DATADIST_RUNTIME_DIR"] = runtime_dir
