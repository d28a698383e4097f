"""One member that asks for too much of an engine: everybody else is served as if it were not there."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from datadist import (
    BlocksCacheKey,
    CacheDesc,
    DataType,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
)
from datadist.control.messages import Sync, encode
from tests import nodes
from tests.fuzz.templates import TOKEN
from tests.in_process_engine import Engine
from tests.lingering import Lingering
from tests.nodes import Here, Node
from tests.raw_peer import RawPeer, socket_of

Start = Callable[..., Node]
SECONDS = 60.0
OTHERS = {1: 0, 3: 1}
BESIDE_SECONDS = 20.0
"""Seconds that nothing takes beside one that talks without pause; it took 30 s and more."""


def _framed(message: dict[str, Any]) -> bytes:
    body = json.dumps(message).encode()
    return len(body).to_bytes(4, "big") + body


TALK = {
    "answered": encode(Sync(id=1)),
    "acknowledged": _framed({"kind": "directory", "seq": 1, "remove": [1]}),
    "ignored": _framed({"kind": "withdraw", "link": 99}),
    "large": _framed({"kind": "directory", "seq": 1, "remove": list(range(60_000))}),
}


class Chatter:
    """Writes to an engine without pause, and reads what is answered."""

    def __init__(self, raw_peer: RawPeer, frame: bytes) -> None:
        self._sock = raw_peer._sock
        self._sock.settimeout(0.05)
        self._data = memoryview(frame * max(1, (1 << 16) // len(frame)))
        self._end = threading.Event()
        self.sent = 0
        self._threads = [threading.Thread(target=self._write), threading.Thread(target=self._read)]
        for thread in self._threads:
            thread.start()

    def _write(self) -> None:
        at = 0
        while not self._end.is_set():
            try:
                sent = self._sock.send(self._data[at:])
            except TimeoutError:
                continue
            except OSError:
                return
            self.sent += sent
            at = (at + sent) % len(self._data)

    def _read(self) -> None:
        while not self._end.is_set():
            with contextlib.suppress(TimeoutError, ConnectionError):
                if not self._sock.recv(1 << 16):
                    return

    def close(self) -> None:
        """Say nothing more."""
        self._end.set()
        for thread in self._threads:
            thread.join(SECONDS)
        self._sock.close()


@pytest.fixture
def disturbed(start_node: Start, runtime_dir: Path) -> Iterator[Callable[[str], Node]]:
    """An engine to which somebody talks without pause."""
    stack = contextlib.ExitStack()

    def start(talk: str) -> Node:
        node = start_node(1)
        raw_peer = RawPeer(socket_of(runtime_dir, 1), 2, 0)
        assert raw_peer.hear("hello") is not None
        chatter = Chatter(raw_peer, TALK[talk])
        stack.callback(chatter.close)
        deadline = time.monotonic() + SECONDS
        while chatter.sent < 1 << 20:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return node

    with stack:
        yield start


@pytest.mark.parametrize("talk", TALK)
def test_links_pulls_and_the_end_beside_a_member_that_talks_without_pause(
    start_node: Start, disturbed: Callable[[str], Node], talk: str
) -> None:
    one, three = disturbed(talk), start_node(3)
    began = time.monotonic()
    ids = [node.do(nodes.link, "pair", OTHERS) for node in (one, three)]
    for node, comm_id in zip((one, three), ids, strict=True):
        node.do(nodes.wait, comm_id)
    for number in range(3):
        key = BlocksCacheKey(1, number)
        one.do(nodes.make, f"new {number}", "blocks", [8, 64], 4, key)
        three.do(nodes.make, f"new {number}", "blocks", [8, 64], 4)
        three.do(nodes.pull_blocks, key, f"new {number}", [0], [1])
    one.do(nodes.finalize)
    assert time.monotonic() - began < BESIDE_SECONDS


# -- descriptors that block in close -----------------------------------------------------------


@contextlib.contextmanager
def _held(engine: Engine) -> Iterator[None]:
    """While its control thread is kept busy."""
    busy, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        busy.set()
        go_on.wait(SECONDS)

    parts = engine.api._engine
    assert parts is not None
    parts._reactor.post(wait)
    assert busy.wait(SECONDS)
    yield
    go_on.set()


@pytest.mark.parametrize("when", ["before hello", "after hello", "in an offer", "never accepted"])
def test_descriptors_that_block_in_close_block_nobody(engine: Engine, when: str) -> None:
    lingering = Lingering()
    try:
        raw_peer = engine.raw_peer(1, hello=when != "before hello")
        if when != "before hello":
            assert raw_peer.hear("hello") is not None
        with _held(engine):
            if when == "never accepted":
                lingering.send(engine.raw_peer(2)._sock)
            elif when == "in an offer":
                assert raw_peer.offer(TOKEN, {}, [lingering.fd])
                lingering.give_up()
            else:
                lingering.send(raw_peer._sock)
        assert when != "before hello" or raw_peer.closed(SECONDS)
        engine.works()
        began = time.monotonic()
        engine.close()
        assert time.monotonic() - began < 15
    finally:
        lingering.free()


# -- no thread can be had ----------------------------------------------------------------------


def test_no_message_needs_a_thread_to_be_started(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def start(thread: threading.Thread) -> None:
        started.append(thread.name)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    raw_peer = engine.raw_peer(1)
    assert raw_peer.hear("hello") is not None
    vector = "AAAAAAAAAAA="
    for message in (
        {"kind": "fetch", "id": 1, "domain": TOKEN, "source": vector, "target": vector,
         "length": vector, "data_type": 4, "same_type": False, "seconds": 1.0},
        {"kind": "verify", "id": 2, "address": vector, "length": vector, "seconds": 1.0},
        {"kind": "dial", "link": 1, "backend": "shm", "one_sided": False, "seconds": 1.0},
        {"kind": "sync", "id": 3},
    ):  # fmt: skip
        assert raw_peer.say(message)
    heard = set[str]()
    while not {"fetched", "verified", "form", "synced"} <= heard:
        message_ = raw_peer.hear_any()
        assert message_ is not None, f"it ended after {heard}"
        heard.add(message_.kind)
    assert started == []
    monkeypatch.undo()


def _init_without_threads(here: Here, allowed: int) -> tuple[str, int, int]:
    """Init where the thread after so many cannot be had; the error, and what is left of it."""
    started, real = [0], threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if started[0] >= allowed:
            raise RuntimeError("can't start new thread")
        started[0] += 1
        real(thread)

    config = LLMConfig()
    config.enable_cache_manager = True
    config.transfer_backend = "shm"
    config.mem_pool_cfg = '{"memory_size": 1048576}'
    threads = threading.active_count()
    threading.Thread.start = start  # type: ignore[method-assign,assignment]
    try:
        LLMDataDist(LLMRole.MIX, 1).init(config.generate_options())
        text = ""
    except LLMException as error:
        text = str(error)
    finally:
        threading.Thread.start = real  # type: ignore[method-assign]
    deadline = time.monotonic() + SECONDS
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    return text, threading.active_count() - threads, started[0]


@pytest.mark.parametrize("allowed", [2, 4, 6, 8, 10])  # the first one is that of init
def test_init_says_where_no_thread_can_be_had(start_node: Start, allowed: int) -> None:
    node = start_node()
    text, left, started = node.do(_init_without_threads, allowed)
    assert started == allowed
    assert "can't start new thread (see `ulimit -u` for threads)" in text
    assert left == 0
    nodes_ok = node.do(_works)
    assert nodes_ok == 1


def _works(here: Here) -> int:
    nodes.init(here, 1)
    cache = here.live.cache_manager.allocate_cache(CacheDesc(1, [1, 64], DataType.DT_UINT8))
    here.live.cache_manager.deallocate_cache(cache)
    return int(here.live.stats()["cluster_id"])
