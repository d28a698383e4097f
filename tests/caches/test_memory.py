"""Pools and registered regions of one engine: what is shared, kept, given back (memory.py)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datadist.caches import memory as memories
from datadist.caches.memory import Memory
from datadist.caches.pool import Run
from datadist.caches.pool_config import PoolConfig
from datadist.status import LLMException, LLMStatusCode
from datadist.transport import Placement, Region, RegistrationError
from tests.caches.world import World

PAGE = 1024
POOL = PoolConfig(memory_size=2 * PAGE, page_shift=10)
DEVICE = Placement.DEVICE


class FakeTransport:
    """Memory that is not there; refuses what is above a limit, or lies at ``bad``."""

    def __init__(self, limit: int | None = None, bad: int = 0) -> None:
        limits = {} if limit is None else {DEVICE: limit}
        self.capabilities = SimpleNamespace(max_registered=limits, follows_addresses=True)
        self.bad = bad
        self.batches = 0
        self.live: list[tuple[int, int]] = []

    def allocate(self, size: int, placement: Placement) -> Region:
        return self.register(1 << 30, size, placement)

    def register(self, address: int, size: int, placement: Placement) -> Region:
        if address == self.bad:
            raise RegistrationError("no memory is there")
        self.live.append((address, size))
        return Region(address, size, placement)

    def registering(self) -> AbstractContextManager[None]:
        self.batches += 1
        return nullcontext()

    def release(self, region: Region) -> None:
        self.live.remove((region.address, region.size))


def _memory(transport: FakeTransport) -> Memory:
    given: Any = transport
    return Memory(given)


def _status(call: Callable[[], object]) -> LLMStatusCode:
    with pytest.raises(LLMException) as caught:
        call()
    return caught.value.status_code


# -- registered memory ---------------------------------------------------------------------------


def test_of_addresses_of_which_one_is_refused_none_stays() -> None:
    transport = FakeTransport(bad=3000)
    memory = _memory(transport)
    kept = memory.register([1000], 100, DEVICE, 1)
    assert _status(lambda: memory.register([1000, 2000, 3000], 100, DEVICE, 2)) is (
        LLMStatusCode.LLM_FAILED
    )
    assert transport.live == [(1000, 100)]
    memory.unregister(kept, 1)
    assert transport.live == []


def test_what_a_link_exposes_is_released_after_it() -> None:
    transport = FakeTransport()
    memory = _memory(transport)
    region_ids = memory.register([1000], 100, DEVICE, 1)
    exposed = [*memory.expose("first")]
    memory.expose("second")
    memory.unregister(region_ids, 1)
    assert memory.empty(), "no later link reaches it"
    assert memory.expose("third") == {}
    for _ in range(2):
        memory.conceal(exposed, "first")
        assert transport.live == [(1000, 100)], "another link exposes it"
    memory.conceal(exposed, "second")
    assert transport.live == []


def test_equal_and_contained_ranges_are_registered_once() -> None:
    transport = FakeTransport()
    memory = _memory(transport)
    taken = [memory.register([address], size, DEVICE, user) for user, (address, size) in enumerate(
        ((1000, 100), (1000, 100), (1010, 90), (1000, 1))
    )]  # fmt: skip
    assert len({region for (region,) in taken}) == 1
    for user, region_ids in enumerate(taken):
        assert transport.live == [(1000, 100)]
        for _ in range(2):
            memory.unregister(region_ids, user)
    assert transport.live == []


def test_ranges_that_overlap_in_part_share_what_they_have_in_common() -> None:
    transport = FakeTransport()
    memory = _memory(transport)
    first = memory.register([1000, 3000], 100, DEVICE, 1)
    second = memory.register([950], 2100, DEVICE, 2)
    assert sorted(transport.live) == [(950, 50), (1000, 100), (1100, 1900), (3000, 100)]
    assert memory.begins(second) == [950, 1000, 1100, 3000]
    memory.unregister(second, 2)
    assert sorted(transport.live) == [(1000, 100), (3000, 100)]
    second = memory.register([950], 2100, DEVICE, 3)
    memory.unregister(first, 1)
    assert len(transport.live) == 4, "the other cache reaches its memory"
    memory.unregister(second, 3)
    assert transport.live == []


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20), st.booleans()), max_size=12))
def test_regions_never_overlap_and_hold_all_that_is_registered(
    steps: list[tuple[int, int, bool]],
) -> None:
    transport = FakeTransport()
    memory = _memory(transport)
    kept: dict[int, tuple[set[int], list[int]]] = {}
    for user, (first, size, drop) in enumerate(steps):
        pair = [1000 + first, 1000 + (first * 7) % 61]
        ids = memory.register(pair, size, DEVICE, user)
        kept[user] = {a + n for a in pair for n in range(size)}, ids
        if drop:
            gone = min(kept)
            memory.unregister(kept.pop(gone)[1], gone)
        covered = [byte for begin, count in transport.live for byte in range(begin, begin + count)]
        assert len(covered) == len(set(covered))
        for wanted, ids in kept.values():
            regions = [memory._held[i].region for i in ids]
            assert wanted <= {r.address + n for r in regions for n in range(r.size)}
    for user, (_, ids) in kept.items():
        memory.unregister(ids, user)
    assert transport.live == []


def test_a_part_of_what_only_a_link_still_exposes_is_refused() -> None:
    memory = _memory(FakeTransport())
    ids = memory.register([1000], 100, DEVICE, 1)
    memory.expose("link")
    memory.unregister(ids, 1)
    assert _status(lambda: memory.register([1050], 100, DEVICE, 2)) is (
        LLMStatusCode.LLM_PARAM_INVALID
    )
    memory.register([1050], 50, DEVICE, 3)


def test_what_peers_would_reach_as_it_was_before_is_refused() -> None:
    transport = FakeTransport()
    transport.capabilities.follows_addresses = False
    memory = _memory(transport)
    ids = memory.register([1000], 100, DEVICE, 1)
    memory.expose("link")
    memory.register([1000], 100, DEVICE, 2)  # another use of what is still registered
    memory.unregister(memory.regions_of(2), 2)
    memory.unregister(ids, 1)
    with pytest.raises(
        LLMException, match=r"lie in .* exposed by a live link: unlink first"
    ) as raised:
        memory.register([1000], 100, DEVICE, 3)
    assert raised.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    memory.conceal(ids, "link")
    memory.register([1000], 100, DEVICE, 4)


def test_a_limit_can_be_reached_and_not_passed() -> None:
    transport = FakeTransport(limit=200)
    memory = _memory(transport)
    memory.register([1000], 100, DEVICE, 1)
    assert _status(lambda: memory.register([2000], 101, DEVICE, 2)) is (
        LLMStatusCode.LLM_PARAM_INVALID
    )
    memory.register([2000], 100, DEVICE, 2)
    memory.register([2000], 50, DEVICE, 3)  # which is registered already
    memory.register([4000], 1 << 20, Placement.HOST, 4)


# -- pools ---------------------------------------------------------------------------------------


def _pool() -> Memory:
    memory = _memory(FakeTransport())
    memory.add_pool(DEVICE, POOL)
    return memory


def _usage(memory: Memory) -> tuple[int, int]:
    usage = memory.pool_usage(DEVICE)
    return usage["pages_used"], usage["allocations_returning"]


def test_allocations_on_their_way_back_are_counted() -> None:
    memory = _pool()
    runs: dict[str, list[Run]] = {"one": [], "two": []}
    for owner, of_owner in runs.items():
        memory.allocate(DEVICE, [PAGE], of_owner)
        memory.expect(DEVICE, owner, 1)
        memory.expect(DEVICE, owner, 1)
    assert _usage(memory) == (2, 2)
    for _ in range(2):
        memory.give_back(DEVICE, "one", runs["one"])
        assert _usage(memory) == (1, 1)
    memory.give_back(DEVICE, "two", runs["two"])
    assert _usage(memory) == (0, 0)


def test_an_allocation_waits_for_pages_that_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memories, "RETURN_SECONDS", 120.0)
    memory = _pool()
    runs: list[Run] = []
    memory.allocate(DEVICE, [PAGE, PAGE], runs)
    memory.expect(DEVICE, "owner", 2)
    timer = threading.Timer(0.05, lambda: memory.give_back(DEVICE, "owner", runs))
    timer.start()
    began = time.monotonic()
    assert len(memory.allocate(DEVICE, [2 * PAGE])) == 1
    assert time.monotonic() - began < 60, "it is woken"
    timer.join()


def test_an_allocation_waits_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memories, "RETURN_SECONDS", 120.0)
    memory = _pool()
    memory.allocate(DEVICE, [PAGE])
    began = time.monotonic()
    assert _status(lambda: memory.allocate(DEVICE, [2 * PAGE])) is (LLMStatusCode.LLM_OUT_OF_MEMORY)
    assert time.monotonic() - began < 60
    assert _usage(memory) == (1, 0)


def test_pages_that_do_not_come_back_in_time_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memories, "RETURN_SECONDS", 0.01)
    memory = _pool()
    memory.allocate(DEVICE, [2 * PAGE])
    memory.expect(DEVICE, "owner", 1)
    with pytest.raises(LLMException, match="1 freed allocations wait for confirmations of peers"):
        memory.allocate(DEVICE, [PAGE])


def test_memory_of_a_link_that_the_transport_still_opens_is_not_released_at_the_end() -> None:
    transport = FakeTransport()
    memory = _memory(transport)
    memory.register([4096], 1024, DEVICE, "user")
    exposed = memory.expose("a link")
    memory.register([16384], 1024, DEVICE, "another user")
    memory.close()
    assert transport.live == [(4096, 1024)]
    memory.conceal(list(exposed), "a link")
    assert transport.live == [(4096, 1024)]


def test_what_comes_after_the_end_is_refused_and_frees_are_harmless() -> None:
    world = World()
    cache = world.allocate()
    runs = world.owned._caches[cache.cache_id].runs
    world.memory.close()
    calls: list[Callable[[], object]] = [
        lambda: world.memory.allocate(DEVICE, [1024]),
        lambda: world.memory.register([1 << 20], 1024, DEVICE, 99),
    ]
    for call in calls:
        with pytest.raises(LLMException) as caught:
            call()
        assert caught.value.status_code is LLMStatusCode.LLM_ENGINE_FINALIZED
    world.memory.give_back(DEVICE, cache.cache_id, runs)
    assert world.memory.pool_usage(DEVICE)["pages_used"] == 0
