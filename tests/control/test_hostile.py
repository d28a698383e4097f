"""Peers that lie, stall, flood and babble: the engine refuses them and goes on."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from datadist import CacheKeyByIdAndIndex, LLMException, LLMStatusCode
from tests import descriptors, nodes
from tests.fuzz.seeds import SEEDS
from tests.fuzz.templates import TOKEN
from tests.in_process_engine import BASE, PAIR, SIZE, TABLE, Engine, entry_of, offer_of
from tests.nodes import Node
from tests.raw_peer import RawPeer, link, memory

Start = Callable[..., Node]
FAR_MS = 30_000
"""Where a pull need not wait for a peer that says nothing."""


def _linked(engine: Engine, entry: dict[str, Any]) -> RawPeer:
    """A member whose offer is good, and whose directory says what it likes."""
    raw_peer = engine.raw_peer()
    comm_id = engine.api.link("pair", PAIR, nodes.table_for(PAIR))
    fd = memory(SIZE)
    assert link(raw_peer, "pair", PAIR, TABLE, offer_of(), [fd])
    os.close(fd)
    engine.api.wait_link(comm_id)
    raw_peer.say({"kind": "directory", "seq": 1, "reset": True, "upsert": [entry]})
    raw_peer.say({"kind": "sync", "id": 7})
    raw_peer.hear("synced")  # it was taken, or it ended the session
    return raw_peer


# -- lies about memory -----------------------------------------------------------------------

OUTSIDE = "are not memory that rank 1 offered"
INVALID, BROKEN = LLMStatusCode.LLM_PARAM_INVALID, LLMStatusCode.LLM_NOT_YET_LINK
FRAME = "it sent a frame that is not valid: directory.upsert.0"

LIES: dict[str, tuple[dict[str, Any], LLMStatusCode, str]] = {
    "bases beyond what was offered": ({"bases": [BASE + SIZE, BASE]}, INVALID, OUTSIDE),
    "bases before what was offered": ({"bases": [BASE - 1, BASE]}, INVALID, OUTSIDE),
    "the second of two": ({"bases": [BASE, BASE + SIZE - 63]}, INVALID, OUTSIDE),
    "a base of nothing": ({"bases": [0, BASE]}, INVALID, OUTSIDE),
    "bases that wrap around": ({"bases": [(1 << 64) - 8, BASE]}, BROKEN, f"{FRAME}.bases.0: Input"),
    "bases that are negative as int64": ({"bases": [1 << 63, BASE]}, BROKEN, f"{FRAME}.bases.0"),
    "bases at the very end": ({"bases": [(1 << 63) - 1, BASE]}, BROKEN, "are no memory"),
    "a slot that is not there": (
        {"bases": [BASE, BASE], "stride": 1 << 62, "count": 5},
        BROKEN,
        f"{FRAME}: Value error, 5 slots that begin {1 << 62} bytes apart do not fill 64 bytes",
    ),
    "many tensors": ({"bases": [BASE] * 50}, INVALID, "50 of the owner's 50 tensors to 2"),
    "one tensor": ({"bases": [BASE]}, INVALID, "1 of the owner's 1 tensors to 2"),
    "no bytes": ({"stride": 0}, BROKEN, f"{FRAME}: Value error, 1 slots that begin 0 bytes apart"),
    "blocks of no bytes": (
        {"stride": 64, "count": 2},
        BROKEN,
        "64 bytes apart do not fill 64 bytes",
    ),
    "blocks that overlap": (
        {"stride": 16, "count": 2},
        BROKEN,
        "16 bytes apart do not fill 64 bytes",
    ),
    "cuts without regions": ({"cuts": [BASE + 8] * 3}, BROKEN, "are no cuts"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_about_the_layout_are_refused_before_a_byte_moves(engine: Engine, lie: str) -> None:
    changes, status, reason = LIES[lie]
    raw_peer = _linked(engine, entry_of(**changes))
    manager = engine.api.cache_manager
    with pytest.raises(LLMException) as error:
        manager.pull_cache(CacheKeyByIdAndIndex(2, 1, 0), engine.cache, timeout_in_millis=FAR_MS)
    assert error.value.status_code is status
    if status is BROKEN:
        assert engine.ended(reason), engine.ends()
    else:
        assert reason in str(error.value)
        assert engine.ends() == []
    with pytest.raises(LLMException) as error:  # a slot that it may tell of later
        manager.pull_cache(CacheKeyByIdAndIndex(2, 1, 4), engine.cache)
    assert error.value.status_code in (status, LLMStatusCode.LLM_TIMEOUT)
    assert engine.untouched()
    assert not [line for line in engine.log if "defect" in line or "report" in line]
    raw_peer.close()
    engine.works()


def test_an_honest_member_is_served(engine: Engine) -> None:
    raw_peer = _linked(engine, entry_of())
    engine.api.cache_manager.pull_cache(
        CacheKeyByIdAndIndex(2, 1, 0), engine.cache, timeout_in_millis=FAR_MS
    )
    assert all((array == 0).all() for array in engine.cache.numpy())
    raw_peer.close()


def test_a_member_with_element_types_of_a_newer_version_is_served(engine: Engine) -> None:
    raw_peer = _linked(engine, entry_of(data_type=77))
    for _ in range(3):
        engine.api.cache_manager.pull_cache(
            CacheKeyByIdAndIndex(2, 1, 0), engine.cache, timeout_in_millis=FAR_MS
        )
    assert len([line for line in engine.log if "data_type number 77" in line]) == 1
    assert not raw_peer.closed(0.1)
    raw_peer.close()


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("not sealed", "could still resize"),
        ("too small", "in a file of"),
        ("no memory", "rank 1 sent a descriptor that is no memory"),
        ("none", "names descriptors"),
        ("too many", "names descriptors"),
        ("huge", "in a file of"),
        ("nonsense", "is not valid"),
        ("overlapping", "overlap at"),
    ],
)
def test_offers_that_could_harm_us_fail_the_link(engine: Engine, what: str, says: str) -> None:
    raw_peer = engine.raw_peer()
    comm_id = engine.api.link("pair", PAIR, nodes.table_for(PAIR))
    good = memory(SIZE)
    fds = {
        "not sealed": [memory(SIZE, sealed=False)],
        "too small": [memory(4096)],
        "no memory": [os.open("/dev/zero", os.O_RDWR)],
        "none": [],
        "too many": [good, good],
    }.get(what, [good])
    offer = offer_of(size=1 << 62) if what == "huge" else offer_of()
    if what == "overlapping":
        offer["regions"].append({"id": 2, "address": BASE + SIZE - 1, "size": 1, "fd": None})
    assert link(raw_peer, "pair", PAIR, TABLE, {} if what == "nonsense" else offer, fds)
    for fd in {*fds, good}:
        os.close(fd)
    with pytest.raises(LLMException, match="FAILED") as error:
        engine.api.wait_link(comm_id)
    assert says in str(error.value)
    raw_peer.close()
    engine.works()


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
MESSAGES = st.sampled_from([json.loads(body) for body in SEEDS["message"] if body[:1] != b"\0"])


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
        self._before = descriptors.count()
        self.engine = Engine(Path(self._place.name))
        self.numbers = iter(range(1, 10_000))
        self.token = TOKEN
        self.now = self.engine.raw_peer(next(self.numbers))

    @initialize(entry=st.fixed_dictionaries({}, optional={
        "bases": st.lists(st.integers(0, (1 << 64) - 1) | st.just(BASE), min_size=1, max_size=4),
        "stride": st.integers(0, (1 << 64) - 1), "count": st.integers(0, (1 << 64) - 1),
    }))  # fmt: skip
    def become_member(self, entry: dict[str, Any]) -> None:
        """Link well, then publish anything."""
        self.engine.api.link("pair", PAIR, nodes.table_for(PAIR))
        fd = memory(SIZE)
        self.token = link(self.now, "pair", PAIR, TABLE, offer_of(), [fd]) or TOKEN
        os.close(fd)
        self.now.say({"kind": "directory", "seq": 1, "reset": True, "upsert": [entry_of(**entry)]})

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
        self.now = self.engine.raw_peer(next(self.numbers))

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
        assert descriptors.falls_to(self._before)


HostileMembers.TestCase.settings = settings(
    max_examples=int(os.environ.get("DATADIST_HOSTILE_EXAMPLES", "40")),
    stateful_step_count=25,
    suppress_health_check=list(HealthCheck),
)
TestHostileMembers = HostileMembers.TestCase


def test_a_changed_array_is_seen_as_changed(engine: Engine) -> None:
    engine.cache.numpy()[0][0, 3] = np.uint8(1)
    assert not engine.untouched()
