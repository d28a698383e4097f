"""The owner's side without peers: leases, limits, what is interrupted, what is counted."""

from __future__ import annotations

import gc
import threading
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datadist.base.event_queue import EventQueue
from datadist.caches.directory import KeyName
from datadist.grants import owner
from datadist.grants.own_grant import OwnGrant
from datadist.grants.owner import OwnGrants
from datadist.grants.state import GrantState
from datadist.status import LLMException, LLMStatusCode
from tests.caches.world import World
from tests.interrupts import Interrupt, Watchdog, meanwhile_anew, raising_anew

CACHE = 1
FOREVER = 1e6


class _Words:
    """Words that are a dict."""

    region_id = 5

    def __init__(self) -> None:
        self.values: dict[int, int] = {}
        self.broken = False

    def address(self, slot: int) -> int:
        return 8 * slot

    def write(self, slot: int, value: int) -> None:
        if self.broken:
            raise LLMException("the device is gone", status_code=LLMStatusCode.LLM_FAILED)
        self.values[slot] = value


class _Reactor:
    """Runs nothing by itself."""

    def __init__(self) -> None:
        self.timers: list[tuple[float, Callable[[], object]]] = []
        self.posted: list[Callable[[], object]] = []

    def post(self, call: Callable[[], object]) -> None:
        self.posted.append(call)

    def later(self, delay: float, call: Callable[[], object]) -> Any:
        self.timers.append((delay, call))
        return SimpleNamespace(cancel=lambda: None)

    def run(self) -> None:
        while self.posted:
            self.posted.pop(0)()


class _Owner:
    """An owner of grants with a blocks cache."""

    def __init__(self) -> None:
        self.world = World()
        self.world.allocate_blocks()
        self.words, self.reactor = _Words(), _Reactor()
        self.grants = OwnGrants(
            self.world.owned, cast("Any", self.words), cast("Any", self.reactor), 1, "0" * 32
        )
        self.made: list[OwnGrant] = []

    def record(self, req: int = 1, readers: int = 1, lease: float = FOREVER) -> OwnGrant:
        made = OwnGrant(_name(req), CACHE, np.array([2, 0]), readers, lease)
        made.handle = made
        self.made.append(made)
        return made

    def grant(self, req: int = 1, readers: int = 1, lease: float = FOREVER) -> OwnGrant:
        made = self.record(req, readers, lease)
        self.grants.add(made)
        return made

    def check(self, where: str = "") -> None:
        """What always holds, once the next call has completed what was interrupted."""
        self.grants._run(lambda: None)
        grants = self.grants
        live = set(grants._live.values())
        assert {grants._by_name[grant.name] for grant in live} == live, where
        assert len(grants._by_name) == len(live), where
        assert {g for group in grants._by_cache.values() for g in group} == live, where
        assert all(grant.state is GrantState.GRANTED for grant in live), where
        slots = [grant.slot for grant in live]
        assert len(set(slots)) == len(slots), where
        assert not set(slots) & set(grants._free), where
        for grant in live:
            assert grant.slot is not None
            assert self.words.values[grant.slot] == grant.generation, where
        for slot in grants._free:
            assert self.words.values.get(slot, 1) % 2, where
        for grant in self.made:
            assert (grant.state is GrantState.GRANTED) <= (grant in live or not grant.done.is_set())
        assert not grants._ending, where


def _of_two() -> _Owner:
    """One with the grants 1 and 2."""
    made = _Owner()
    made.grant(1)
    made.grant(2)
    return made


def _name(req: int) -> KeyName:
    return KeyName("request", req, 0)


@pytest.mark.parametrize(("kind", "step"), [(Interrupt, 1), (Watchdog, 3)])
def test_a_grant_that_the_caller_did_not_get_grants_nothing(
    kind: type[BaseException], step: int
) -> None:
    for where, made in raising_anew(_of_two, lambda each: each.grant(1), kind, step):
        made.check(where)
        if len(made.made) == 3:  # it was not interrupted before there was anything
            assert made.made[-1] not in made.grants._live.values(), where
            assert made.made[-1] not in made.grants.take_ended(), where
        made.grant(1)
        made.check(where)


@pytest.mark.parametrize(("kind", "step"), [(Interrupt, 1), (Watchdog, 3)])
def test_a_revocation_that_is_interrupted_has_happened_or_not(
    kind: type[BaseException], step: int
) -> None:
    for where, made in raising_anew(
        _of_two, lambda each: each.grants.revoke(each.made[0]), kind, step
    ):
        made.check(where)
        made.grants.revoke(made.made[0])
        made.check(where)
        assert made.made[0].state is GrantState.REVOKED
        assert made.grants.take_ended() == [made.made[0]], where


@pytest.mark.parametrize("kind", [Interrupt, Watchdog])
def test_ends_are_left_for_the_next_call_where_one_is_interrupted(
    kind: type[BaseException],
) -> None:
    def prepare() -> _Owner:
        made = _Owner()
        for req in range(4):
            made.grants.revoke(made.grant(req))
        taken = made.grants.take_ended()
        made.grants.ended.put(taken[0])  # queued twice, as an interrupt may do
        for req in range(4, 7):
            made.grants.revoke(made.grant(req))
        return made

    for where, made in raising_anew(prepare, lambda each: each.grants.take_ended(), kind):
        assert made.grants.take_ended() == made.made[4:], where
        assert made.grants.take_ended() == [], where


def test_a_cache_that_is_freed_inside_of_another_call() -> None:
    def prepare() -> _Owner:
        made = _Owner()
        made.grant(1)
        return made

    def free(made: _Owner) -> None:
        made.world.owned.deallocate(CACHE)

    def call(made: _Owner) -> None:
        with suppress(LLMException):  # the cache was freed
            made.grant(2)

    for where, made in meanwhile_anew(prepare, call, free, 7):
        made.check(where)
        assert not len(made.grants), where
        assert made.made[0].state is GrantState.REVOKED


class _Seeing(EventQueue[OwnGrant]):
    """Notes what a grant's word holds when the program hears of the end."""

    def __init__(self, words: _Words) -> None:
        super().__init__()
        self.seen: list[int] = []
        self._words = words

    def put(self, event: OwnGrant) -> None:
        assert event.slot is not None
        self.seen.append(self._words.values[event.slot])


def test_a_word_is_odd_before_the_program_hears_of_the_end() -> None:
    made = _Owner()
    grant = made.grant()
    queue = made.grants.ended = _Seeing(made.words)
    made.grants.revoke(grant)
    assert queue.seen == [grant.generation + 1]


def test_no_generation_comes_twice_in_whatever_word() -> None:
    made = _Owner()
    generations = []
    for number in range(200):
        grant = made.grant(number % 7)
        generations.append(grant.generation)
        if number % 3:
            made.grants.revoke(grant)
    assert len(set(generations)) == len(generations)
    assert all(number and number % 2 == 0 for number in generations)
    assert len(made.words.values) <= 8  # words are used again
    made.check()


def test_a_word_that_the_device_does_not_take_keeps_the_grant() -> None:
    made = _Owner()
    grant = made.grant(lease=10.0)
    made.words.broken = True
    with pytest.raises(LLMException, match=r"cannot be revoked.*do not use the blocks"):
        made.grants.revoke(grant)
    assert grant.state.name == "GRANTED"
    made.words.broken = False
    made.check()
    grant.deadline = 0.0
    made.grants._leases[:] = [(0.0, grant.generation)]
    made.grants._on_timer()
    assert grant.state.name == "LAPSED"
    made.check()


def test_a_grant_that_the_device_does_not_take_grants_nothing() -> None:
    made = _Owner()
    earlier = made.grant()
    made.words.broken = True
    for req in (1, 2):
        refused = made.record(req)
        with pytest.raises(LLMException, match="the device is gone"):
            made.grants.add(refused)
        assert refused not in made.grants._live.values()
    made.words.broken = False
    assert earlier.state.name == "GRANTED"
    made.check()
    made.grant()
    assert earlier.state.name == "REVOKED"
    assert made.grant(2).slot == 0  # no slot is lost: there were two at one time
    made.check()


# -- leases ----------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9), st.booleans()), max_size=40))
def test_leases_end_when_they_are_due_and_not_before(steps: list[tuple[int, int, bool]]) -> None:
    made, now = _Owner(), time.monotonic()
    model: dict[int, tuple[OwnGrant, float]] = {}
    for req, lease, renew in steps:
        if renew and req in model:
            made.grants.renew(model[req][0], 100.0 * lease)
        else:
            model[req] = made.grant(req, lease=100.0 * lease), 0.0
        model[req] = model[req][0], model[req][0].deadline
    for hundreds in range(11):
        later = now + 100.0 * hundreds + 50
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "monotonic", lambda later=later: later)
            made.grants._on_timer()
            made.reactor.run()
        for grant, deadline in model.values():
            expected = GrantState.LAPSED if deadline <= later else GrantState.GRANTED
            assert grant.state is expected
    made.check()


def test_many_leases_end_in_several_turns() -> None:
    made = _Owner()
    for req in range(3 * owner.LAPSES):
        made.grant(req, lease=1e-9)
    time.sleep(0.001)
    made.grants._on_timer()
    assert len(made.grants) == 2 * owner.LAPSES
    made.reactor.run()
    delay, again = made.reactor.timers[-1]
    assert delay == 0
    again()
    assert len(made.grants) == owner.LAPSES


def test_one_timer_is_enough_for_any_number() -> None:
    made = _Owner()
    for req in range(50):
        made.grant(req, lease=100.0 + req)
        made.reactor.run()
    assert len(made.reactor.timers) == 1
    made.grant(50, lease=5.0)
    made.reactor.run()
    assert len(made.reactor.timers) == 2


def test_leases_that_ended_early_are_forgotten() -> None:
    """No timer comes before the end of the first one."""
    made = _Owner()
    for req in range(1000):
        made.grants.revoke(made.grant(req))
        made.reactor.run()
    assert len(made.grants._leases) <= owner.MANY_LEASES + 3
    kept = [made.grant(req, lease=100.0 - req) for req in range(5)]
    for number in range(1000):  # each one is earlier
        made.grants.renew(kept[number % 5], 50.0 - number / 100)
    assert len(made.grants._leases) <= owner.MANY_LEASES + 13
    assert made.grants._leases[0] == (kept[4].deadline, kept[4].generation)


# -- readers ---------------------------------------------------------------------------------------


def _ask(made: _Owner, reader: str, req: int = 1) -> bytes:
    answers: list[bytes] = []
    made.grants.asked(reader, _name(req), answers.append)
    return answers[0]


def test_readers_count_once_each() -> None:
    made = _Owner()
    grant = made.grant(readers=2)
    for _ in range(3):
        assert _ask(made, "a") == made.grants.token(grant)
        made.grants.released("a", [grant.generation], [])
        made.grants.released("a", [], [grant.name])
    assert grant.state is GrantState.GRANTED
    made.grants.released("b", [grant.generation + 2, 0, 3], [_name(9)])  # of no grant
    assert grant.state.name == "GRANTED"
    made.grants.released("b", [], [grant.name])
    assert grant.state.name == "CONSUMED"
    assert _ask(made, "b") == b""


@pytest.mark.parametrize(
    ("events", "state"),
    [
        (["ask a", "lose a"], "READER_LOST"),
        (["lose a"], "GRANTED"),
        (["ask a", "done a", "lose a"], "GRANTED"),
        (["ask a", "lose a", "ask b"], "GRANTED"),
        (["ask a", "lose a", "done b"], "READER_LOST"),
        (["ask a", "done b", "lose a"], "READER_LOST"),
        (["ask a", "lose a", "ask a", "done a", "done b"], "CONSUMED"),
        (["ask a", "ask b", "lose a", "lose b"], "READER_LOST"),
        (["ask a", "ask b", "ask c", "lose a", "done b"], "READER_LOST"),
        (["done a", "done b"], "CONSUMED"),
    ],
)
def test_readers_that_are_lost(events: list[str], state: str) -> None:
    made = _Owner()
    readers = 1 if events == ["ask a", "lose a"] else 2
    grant = made.grant(readers=readers)
    for event in events:
        what, reader = event.split()
        if what == "ask":
            _ask(made, reader)
        elif what == "lose":
            made.grants.lost(reader)
        else:
            made.grants.released(reader, [grant.generation], [])
    assert grant.state.name == state
    made.check()


def test_nothing_is_kept_of_readers_and_ended_grants() -> None:
    made = _Owner()
    for req in range(20):
        grant = made.grant(req)
        _ask(made, f"reader {req}", req)
        made.grants.revoke(grant)
    made.grants.lost("reader 3")
    grants = made.grants
    assert [grants._by_reader, grants._by_cache, grants._by_name, grants._live] == [{}] * 4
    assert len(grants.take_ended()) == 20


# -- limits ----------------------------------------------------------------------------------------


def test_too_many_grants_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "MAX_GRANTS", 3)
    made = _Owner()
    for req in range(3):
        made.grant(req)
    with pytest.raises(LLMException, match="3 grants live, and an engine has at most 3"):
        made.grant(3)
    made.grant(2)  # takes the place of the earlier one
    made.check()


def test_grants_beyond_the_words_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "SLOTS", 2)
    made = _Owner()
    grants = [made.grant(req) for req in range(3)]
    assert [grant.slot for grant in grants] == [0, 1, None]
    made.grants.revoke(grants[0])
    assert made.grant(4).slot == 0
    made.grants.revoke(grants[2])


def test_ends_that_nobody_takes_are_limited(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(owner, "MAX_ENDED", 3)
    made = _Owner()
    grants = [made.grant(req) for req in range(6)]
    for grant in grants:
        made.grants.revoke(grant)
    assert made.grants.take_ended() == grants[:3]
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert all(grant.state is GrantState.REVOKED for grant in grants)


def test_ten_thousand_grants_cost_memory_and_time_that_is_linear() -> None:
    made = _Owner()
    gc.collect()
    tracemalloc.start()
    try:
        for req in range(2000):
            made.grant(req)
        first = tracemalloc.get_traced_memory()[0]
        for req in range(2000, 10_000):
            made.grant(req)
        second = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert second < 7 * first
    assert second / 10_000 < 4000, "bytes of a live grant"
    made.grants.close()
    assert len(made.grants) == 0
    assert not made.reactor.timers


def test_threads_grant_and_revoke_at_the_same_time() -> None:
    made = _Owner()

    def run(first: int) -> None:
        for req in range(first, first + 150):
            grant = made.grant(req % 40)
            if req % 3:
                made.grants.revoke(grant)

    threads = [threading.Thread(target=run, args=(150 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    made.check()
