"""Peers that lie, stall, flood and babble: the engine refuses them and goes on."""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from datadist import (
    CacheDesc,
    CacheKeyByIdAndIndex,
    DataType,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
)
from datadist.rank_table import parse_rank_table
from tests import nodes
from tests.fuzz.seeds import SEEDS, TOKEN
from tests.nodes import MIB, Node
from tests.stranger import Stranger, link, memory, socket_of

Start = Callable[..., Node]
PAIR = {1: 0, 2: 1}
TABLE = parse_rank_table(nodes.table_for(PAIR)).canonical
BASE, SIZE = 1 << 40, 1 << 16
GUARD = 0x77


class Engine:
    """An engine of this process, and what it logged."""

    def __init__(self, runtime_dir: Path) -> None:
        os.environ["DATADIST_RUNTIME_DIR"] = str(runtime_dir)
        self.runtime_dir = runtime_dir
        config = LLMConfig()
        config.enable_cache_manager = True
        config.transfer_backend = "shm"
        config.link_total_time = 10
        config.sync_kv_timeout = 300
        config.mem_pool_cfg = json.dumps({"memory_size": MIB, "page_shift": 12})
        self.api = LLMDataDist(LLMRole.MIX, 1)
        self.log: list[str] = []
        self._strangers: list[Stranger] = []
        self._handler = _Collector(self.log)
        logging.getLogger("datadist").addHandler(self._handler)
        self.api.init(config.generate_options())
        self.cache = self.api.cache_manager.allocate_cache(CacheDesc(2, [1, 64], DataType.DT_UINT8))
        for array in self.cache.numpy():
            array[:] = GUARD

    def stranger(self, number: int = 0, hello: bool = True) -> Stranger:
        """Somebody who connects."""
        made = Stranger(socket_of(self.runtime_dir, 1), number=number, hello=hello)
        self._strangers.append(made)
        return made

    def untouched(self) -> bool:
        """Whether no byte of our cache has changed."""
        return all((array == GUARD).all() for array in self.cache.numpy())

    def works(self) -> None:
        """Somebody else is served."""
        other = self.stranger(900)
        assert other.hear("hello") is not None
        other.close()
        assert self.api.stats()["backend"] == "shm"

    def close(self) -> None:
        """The end."""
        self.api.finalize()
        for stranger in self._strangers:
            stranger.close()
        logging.getLogger("datadist").removeHandler(self._handler)


class _Collector(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(f"{record.levelname} {record.getMessage()}")


@pytest.fixture
def engine(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setenv("DATADIST_RUNTIME_DIR", str(runtime_dir))
    made = Engine(runtime_dir)
    yield made
    made.close()


def _entry(**changes: Any) -> dict[str, Any]:
    entry = {
        "cache_id": 1, "blocks": False, "bases": [BASE, BASE + 4096], "stride": 64, "count": 1,
        "tensor_size": 64, "data_type": 4, "placement": 1, "pooled": True, "accessible": False,
        "regions": [1], "bindings": [],
    }  # fmt: skip
    return {**entry, **changes}


def _offer(fd: int | None = 0, address: int = BASE, size: int = SIZE) -> dict[str, Any]:
    region = {"id": 1, "address": address, "size": size, "fd": fd}
    return {"version": 1, "writable": False, "regions": [region], "fence": None}


def _linked(engine: Engine, entry: dict[str, Any]) -> Stranger:
    """A member whose offer is good, and whose directory says what it likes."""
    stranger = engine.stranger()
    comm_id = engine.api.link("pair", PAIR, nodes.table_for(PAIR))
    fd = memory(SIZE)
    assert link(stranger, "pair", PAIR, TABLE, _offer(), [fd])
    os.close(fd)
    engine.api.wait_link(comm_id)
    stranger.say({"kind": "directory", "seq": 1, "reset": True, "upsert": [entry]})
    return stranger


# -- lies about memory -----------------------------------------------------------------------

LIES: dict[str, dict[str, Any]] = {
    "bases beyond what was offered": {"bases": [BASE + SIZE, BASE]},
    "bases before what was offered": {"bases": [BASE - 1, BASE]},
    "the second of two": {"bases": [BASE, BASE + SIZE - 63]},
    "bases that wrap around": {"bases": [(1 << 64) - 8, BASE]},
    "bases that are negative as int64": {"bases": [1 << 63, BASE]},
    "bases at the very end": {"bases": [(1 << 63) - 1, BASE]},
    "a base of nothing": {"bases": [0, BASE]},
    "a slot that is not there": {"bases": [BASE, BASE], "stride": 1 << 62, "count": 5},
    "many tensors": {"bases": [BASE] * 50},
    "one tensor": {"bases": [BASE]},
    "no bytes": {"stride": 0},
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_about_the_layout_are_refused_before_a_byte_moves(engine: Engine, lie: str) -> None:
    stranger = _linked(engine, _entry(**LIES[lie]))
    for slot in (0, 4):
        with pytest.raises(LLMException):
            engine.api.cache_manager.pull_cache(CacheKeyByIdAndIndex(2, 1, slot), engine.cache)
    assert engine.untouched()
    assert not [line for line in engine.log if "defect" in line or "report" in line]
    stranger.close()
    engine.works()


def test_an_honest_member_is_served(engine: Engine) -> None:
    stranger = _linked(engine, _entry())
    engine.api.cache_manager.pull_cache(CacheKeyByIdAndIndex(2, 1, 0), engine.cache)
    assert all((array == 0).all() for array in engine.cache.numpy())
    stranger.close()


def test_a_member_with_element_types_of_a_newer_version_is_served(engine: Engine) -> None:
    stranger = _linked(engine, _entry(data_type=77))
    for _ in range(3):
        engine.api.cache_manager.pull_cache(CacheKeyByIdAndIndex(2, 1, 0), engine.cache)
    assert len([line for line in engine.log if "data_type number 77" in line]) == 1
    assert not stranger.closed(0.1)
    stranger.close()


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("not sealed", "could still resize"),
        ("too small", "in a file of"),
        ("no memory", "could still resize"),
        ("none", "names descriptors"),
        ("too many", "names descriptors"),
        ("huge", "in a file of"),
        ("nonsense", "is not valid"),
    ],
)
def test_offers_that_could_harm_us_fail_the_link(engine: Engine, what: str, says: str) -> None:
    stranger = engine.stranger()
    comm_id = engine.api.link("pair", PAIR, nodes.table_for(PAIR))
    good = memory(SIZE)
    fds = {
        "not sealed": [memory(SIZE, sealed=False)],
        "too small": [memory(4096)],
        "no memory": [os.open("/dev/zero", os.O_RDWR)],
        "none": [],
        "too many": [good, good],
    }.get(what, [good])
    offer = _offer(size=1 << 62) if what == "huge" else _offer()
    assert link(stranger, "pair", PAIR, TABLE, {} if what == "nonsense" else offer, fds)
    for fd in {*fds, good}:
        os.close(fd)
    with pytest.raises(LLMException, match="FAILED") as error:
        engine.api.wait_link(comm_id)
    assert says in str(error.value)
    stranger.close()
    engine.works()


# -- strangers at the door -------------------------------------------------------------------


def test_silent_and_slow_strangers_are_shown_out(engine: Engine) -> None:
    silent = engine.stranger(hello=False)
    slow = engine.stranger(hello=False)
    started = time.monotonic()
    while time.monotonic() - started < 12 and slow.send(b"\0"):
        time.sleep(0.2)
    assert time.monotonic() - started < 10
    assert silent.closed(10)
    engine.works()


def test_crowds_of_silent_strangers_do_not_stall_a_link(
    start_node: Start, runtime_dir: Path
) -> None:
    first, second = start_node(1, link_total_time=20), start_node(2, link_total_time=20)
    crowd = [
        Stranger(socket_of(runtime_dir, cluster), hello=False)
        for cluster in (1, 2)
        for _ in range(300)
    ]
    nodes.link_pair(first, second)
    for stranger in crowd:
        stranger.close()


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\0\0\0\0", b"\0\0\0\2{}", b"\0\0\0\4null", b"\0"],
)
def test_babble_before_hello(engine: Engine, data: bytes) -> None:
    stranger = engine.stranger(hello=False)
    stranger.send(data)
    assert stranger.closed(10)
    engine.works()


def test_a_large_frame_before_hello_is_not_waited_for(engine: Engine) -> None:
    stranger = engine.stranger(hello=False)
    stranger.send((8 << 20).to_bytes(4, "big") + b" " * 1000)
    assert stranger.closed(2)


def test_descriptors_that_nobody_asked_for_do_not_pile_up(engine: Engine) -> None:
    stranger = engine.stranger()
    assert stranger.hear("hello")
    before = len(os.listdir("/proc/self/fd"))
    frame = b'\0\0\0\x0f{"kind":"idle"}'
    fd = memory(4096)
    for _ in range(100):
        if not stranger.send(frame, [fd] * 16):
            break
    assert stranger.closed(5)
    os.close(fd)
    assert len(os.listdir("/proc/self/fd")) < before + 32
    engine.works()


def test_wishes_without_end_are_cut_short(engine: Engine) -> None:
    stranger = engine.stranger()
    wish = {
        "kind": "announce", "name": "x", "ranks": [[1, 0], [2, 1]], "table": TABLE,
        "backend": "shm", "one_sided": False,
    }  # fmt: skip
    for number in range(20_000):
        if not stranger.say({**wish, "link": number}):
            break
    assert stranger.closed(5)
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
                sock.settimeout(5)
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
        assert [line for line in node.do(nodes.log_of) if "refused pid" in line and "65534" in line]
        node.do(nodes.finalize)


def _move_to(_here: nodes.Here, runtime_dir: str) -> None:
    os.environ["DATADIST_RUNTIME_DIR"] = runtime_dir


# -- anything in any order -------------------------------------------------------------------

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 65), 1 << 65),
    st.sampled_from([0, 1, 2, BASE, BASE + 64, BASE + SIZE, 1 << 62, (1 << 63) - 1, (1 << 64) - 1]),
    st.text(max_size=8),
    st.lists(st.integers(0, 1 << 64), max_size=4),
    st.sampled_from([TOKEN, "0" * 32, "pair", "AAAAAAAAAAA=", "AAAAAAAAAAAAAAAAAAAAAA=="]),
)
MESSAGES = st.sampled_from([json.loads(body) for body in SEEDS["message"]])


@st.composite
def babble(draw: st.DrawFn) -> dict[str, Any]:
    """A message with some of its values changed."""
    message = dict(draw(MESSAGES))
    for name in draw(st.lists(st.sampled_from(sorted(message)), max_size=2)):
        if name != "kind":
            message[name] = draw(LEAVES)
    return message


class HostileMembers(RuleBasedStateMachine):
    """An engine, and members that say anything; it stays usable and loses nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._place = tempfile.TemporaryDirectory(prefix="datadist-")
        self._before = len(os.listdir("/proc/self/fd"))
        self.engine = Engine(Path(self._place.name))
        self.numbers = iter(range(1, 10_000))
        self.token = TOKEN
        self.now = self.engine.stranger(next(self.numbers))

    @initialize(entry=st.fixed_dictionaries({}, optional={
        "bases": st.lists(st.integers(0, (1 << 64) - 1) | st.just(BASE), min_size=1, max_size=4),
        "stride": st.integers(0, (1 << 64) - 1), "count": st.integers(0, (1 << 64) - 1),
    }))  # fmt: skip
    def become_member(self, entry: dict[str, Any]) -> None:
        """Link well, then publish anything."""
        self.engine.api.link("pair", PAIR, nodes.table_for(PAIR))
        fd = memory(SIZE)
        self.token = link(self.now, "pair", PAIR, TABLE, _offer(), [fd]) or TOKEN
        os.close(fd)
        self.now.say({"kind": "directory", "seq": 1, "reset": True, "upsert": [_entry(**entry)]})

    @rule(message=babble(), member=st.booleans())
    def say(self, message: dict[str, Any], member: bool) -> None:
        """Something that looks like a message, about our domain or another."""
        if member and "domain" in message:
            message = {**message, "domain": self.token}
        if not self.now.say(message):
            self.come_again()

    @rule(data=st.binary(min_size=1, max_size=64))
    def babble(self, data: bytes) -> None:
        """Something else."""
        if not self.now.send(data):
            self.come_again()

    @rule()
    def come_again(self) -> None:
        """Hang up and come as another one."""
        self.now.close()
        self.now = self.engine.stranger(next(self.numbers))

    @rule(slot=st.integers(0, 3))
    def pull(self, slot: int) -> None:
        """Whatever they published, a pull succeeds or raises what is documented."""
        try:
            self.engine.api.cache_manager.pull_cache(
                CacheKeyByIdAndIndex(2, 1, slot), self.engine.cache
            )
        except LLMException:
            return

    @rule()
    def link_anew(self) -> None:
        """Wait for them in another domain, for a moment."""
        self.engine.api.unlink(self.engine.api.link("other", PAIR, nodes.table_for(PAIR)))

    @invariant()
    def lives(self) -> None:
        """It answers, and found no defect in itself."""
        assert self.engine.api.stats()["cluster_id"] == 1
        strange = [line for line in self.engine.log if "report it" in line or "defect" in line]
        assert strange == []

    def teardown(self) -> None:
        """Somebody else is served, and nothing is left."""
        self.now.close()
        self.engine.works()
        self.engine.close()
        self.engine.cache = None  # type: ignore[assignment]
        self._place.cleanup()
        assert len(os.listdir("/proc/self/fd")) <= self._before


HostileMembers.TestCase.settings = settings(
    max_examples=int(os.environ.get("DATADIST_HOSTILE_EXAMPLES", "40")),
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestHostileMembers = HostileMembers.TestCase


def test_a_changed_array_is_seen_as_changed(engine: Engine) -> None:
    engine.cache.numpy()[0][0, 3] = np.uint8(1)
    assert not engine.untouched()
