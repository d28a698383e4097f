"""Public calls with an exception of a handler at every moment in turn, and with calls inside of them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from datadist import (
    BlocksCacheKey,
    CacheDesc,
    DataType,
    LayerSynchronizer,
    LLMDataDist,
    LLMException,
    LLMRole,
    TransferWithCacheKeyConfig,
)
from tests import descriptors, interrupts, nodes, tasks
from tests.nodes import Node
from tests.waiting import until

Start = Callable[..., Node]
PAIR = {1: 0, 2: 1}
LONELY = {2: 0, 9: 1}
DESC = CacheDesc(2, [8, 256], DataType.DT_INT32)
SECONDS = 30.0


class SoftLimit(Exception):
    """As a task queue raises it."""


class Late(TimeoutError):
    """As a watchdog raises it: an OSError."""


class Wrong(ValueError):
    """As a careless handler raises it."""


KINDS = (interrupts.Interrupt, KeyboardInterrupt, SoftLimit, Late, Wrong)


# -- one engine --------------------------------------------------------------------------------


def _use() -> tuple[int, int]:
    return descriptors.count(), tasks.count()


def _nothing_is_left(used: tuple[int, int]) -> bool:
    return descriptors.falls_to(used[0]) and tasks.falls_to(used[1])


def _started(here: nodes.Here) -> LLMDataDist:
    nodes.init(here, 2)
    assert here.engine is not None
    return here.engine


def _wait_for_calls(engine: LLMDataDist) -> None:
    """Calls that were interrupted go on: until those are over that have begun."""
    inner: Any = engine._engine
    inner._caller.call(lambda: None)


def _interrupt_link(here: nodes.Here, kind: type[BaseException]) -> int:
    engine = _started(here)
    rounds = 0
    table = nodes.table_for(LONELY)
    ids: list[int] = []
    for where in interrupts.raising(lambda: ids.append(engine.link("lonely", LONELY, table)), kind):
        rounds += 1
        while ids:  # the exception came when the caller had it
            engine.unlink(ids.pop())
        _wait_for_calls(engine)
        until(
            lambda: not engine.stats()["links"],
            SECONDS,
            f"a domain is left, interrupted at {where}",
        )
    (last,) = ids
    engine.unlink(last)
    assert engine.stats()["links"] == []
    return rounds


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_link_leaves_no_domain(start_node: Start, kind: type) -> None:
    assert start_node().do(_interrupt_link, kind, timeout=120) > 30


def _interrupt_unlink(here: nodes.Here) -> int:
    engine = _started(here)
    rounds, ids = 0, [engine.link("lonely", LONELY, nodes.table_for(LONELY))]
    for where in interrupts.raising(lambda: engine.unlink(ids[-1])):
        rounds += 1
        with suppress(LLMException):  # it has happened
            engine.unlink(ids[-1])
        until(lambda: engine.stats()["links"] == [], SECONDS, where)
        ids.append(engine.link("lonely", LONELY, nodes.table_for(LONELY)))
    return rounds


def test_an_interrupted_unlink_can_be_repeated(start_node: Start) -> None:
    assert start_node().do(_interrupt_unlink, timeout=120) > 30


def _interrupt_init(here: nodes.Here, what: str, kind: type[BaseException]) -> int:
    engine = _started(here)
    options = dict(here.any["options"])
    engine.finalize()
    used, rounds = _use(), 0
    if what == "finalize":
        engine.init(options)
    for _ in interrupts.raising(
        engine.finalize if what == "finalize" else lambda: engine.init(options), kind, step=3
    ):
        rounds += 1
        if rounds % 2 or what == "finalize":
            engine.finalize()
            assert _nothing_is_left(used)
            assert LLMDataDist.llm_engine_instance is None
        engine.init(options)
        engine.link("lonely", LONELY, nodes.table_for(LONELY))
        if what == "init":
            engine.finalize()
            assert _nothing_is_left(used)
    engine.finalize()
    assert _nothing_is_left(used)
    return rounds


@pytest.mark.parametrize("what", ["init", "finalize"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SoftLimit])
def test_an_interrupted_start_or_end_can_be_repeated(
    start_node: Start, what: str, kind: type
) -> None:
    assert start_node().do(_interrupt_init, what, kind, timeout=300) > 5


def _calls_after_a_torn_end(here: nodes.Here) -> list[str]:
    """What calls raise once the exception came after the end had begun, and whether init works."""
    engine = _started(here)
    options, manager = dict(here.any["options"]), engine.cache_manager
    cache = manager.allocate_blocks_cache(DESC)
    inner: Any = engine._engine
    begin = inner.finalize

    def torn() -> None:
        begin()
        raise SoftLimit

    inner.finalize = torn
    with pytest.raises(SoftLimit):
        engine.finalize()
    assert inner.ended.wait(SECONDS)
    inner.finalize = begin
    found = []
    for call in (
        lambda: manager.deallocate_blocks_cache(cache),
        lambda: manager.allocate_blocks_cache(DESC),
        lambda: manager.unregister_cache(cache.cache_id),
    ):
        with pytest.raises(LLMException) as caught:
            call()
        found.append(caught.value.status_code.name)
    with pytest.raises(RuntimeError, match="not initialized"):
        engine.stats()
    engine.init(options)
    engine.cache_manager.allocate_blocks_cache(DESC)
    engine.finalize()
    return found


def test_after_an_end_that_was_interrupted_nothing_begins_but_init(start_node: Start) -> None:
    found = start_node().do(_calls_after_a_torn_end, timeout=60)
    assert found == ["LLM_ENGINE_FINALIZED"] * 3


# -- a pair ------------------------------------------------------------------------------------


class _Final(LayerSynchronizer):
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int) -> bool:
        return True


def _prepare(here: nodes.Here) -> None:
    manager = here.live.cache_manager
    for model in (1, 2):
        here.caches[str(model)] = manager.allocate_blocks_cache(
            DESC, BlocksCacheKey(here.live.cluster_id, model)
        )
    here.caches["slots"] = manager.allocate_cache(DESC)


@pytest.fixture
def pair(start_node: Start) -> tuple[Node, Node]:
    """Two linked engines with blocks caches 1 and 2 each."""
    first, second = (start_node(c, enable_remote_cache_accessible=True) for c in PAIR)
    for node in (first, second):
        node.do(_prepare)
    nodes.link_pair(first, second)
    return first, second


def _calls(here: nodes.Here) -> dict[str, Callable[[], object]]:
    manager, caches = here.live.cache_manager, here.caches
    key = BlocksCacheKey(1, 1)
    config = TransferWithCacheKeyConfig(BlocksCacheKey(1, 2), range(1), range(1))

    def transfer() -> None:
        task = manager.transfer_cache_async(caches["2"], _Final(), [config])
        task.synchronize(5000)
        task.get_results(5000)

    return {
        "pull": lambda: manager.pull_blocks(key, caches["1"], [1], [2]),
        "pull, full": lambda: manager.pull_blocks(
            key, caches["1"], [1], [2], src_layer_range=range(1), dst_layer_range=range(1)
        ),
        "push": lambda: manager.push_blocks(BlocksCacheKey(1, 2), caches["2"], [1], [2]),
        "copy": lambda: manager.copy_cache(caches["slots"], caches["slots"], 1, 2),
        "copy blocks": lambda: manager.copy_blocks(caches["2"], {3: [4, 5]}),
        "transfer": transfer,
    }


def _taken(here: nodes.Here) -> dict[str, Any]:
    engine: Any = here.live._engine
    found = {
        "pins": [c.cache_id for c in engine.owned._caches.values() if c.pins],
        "pulls": [len(view.pulls) for view in engine.views.values() if view.pulls],
        "turns": [
            domain for domain in engine._all_domains()
            if any(permits.taken or permits.line for permits in domain.attempt.permits.values())
        ],
        "tasks": [t.name for t in threading.enumerate() if t.name.startswith("datadist-layers")],
    }  # fmt: skip
    return {name: value for name, value in found.items() if value}


def _interrupt(here: nodes.Here, name: str, kind: type[BaseException]) -> int:
    call = _calls(here)[name]
    call()
    rounds = 0
    for where in interrupts.raising(call, kind):
        rounds += 1
        until(lambda: not _taken(here), SECONDS, f"{_taken(here)}, interrupted at {where}")
        call()
    defects = [line for line in nodes.log_of(here) if "defect" in line or "report it" in line]
    assert defects == []
    return rounds


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["pull", "pull, full", "push", "copy", "copy blocks", "transfer"])
def test_an_interrupted_transfer_passes_the_exception_on_and_leaves_nothing_taken(
    pair: tuple[Node, Node], name: str, kind: type
) -> None:
    assert pair[1].do(_interrupt, name, kind, timeout=300) > 5


def _nest(here: nodes.Here, name: str, inner: str, step: int) -> dict[str, int]:
    call = (
        _calls(here)[name]
        if name != "link"
        else lambda: here.live.unlink(here.live.link("lonely", LONELY, nodes.table_for(LONELY)))
    )
    engine, manager = here.live, here.live.cache_manager
    spare = [manager.allocate_blocks_cache(DESC) for _ in range(20)]

    def free_one() -> None:
        if spare:
            manager.deallocate_blocks_cache(spare.pop())

    actions: dict[str, Callable[[], object]] = {
        "stats": engine.stats,
        "free": free_one,
        "pull": _calls(here)["pull, full"],
        "link": lambda: engine.link("lonely", LONELY, nodes.table_for(LONELY)),
        "allocate": lambda: manager.allocate_blocks_cache(DESC),
        "init": lambda: LLMDataDist(LLMRole.MIX, 5).init({}),
    }
    outcomes = Counter[str]()

    def act() -> None:
        try:
            actions[inner]()
        except LLMException:
            outcomes["done"] += 1  # as anywhere else
        except RuntimeError as error:
            outcomes["refused" if "inside another call" in str(error) else str(error)] += 1
        else:
            outcomes["done"] += 1

    call()
    for _ in interrupts.meanwhile(call, act, step):
        call()
    for cache in spare:
        manager.deallocate_blocks_cache(cache)
    return outcomes


@pytest.mark.parametrize("name", ["pull", "pull, full", "push", "copy", "link"])
@pytest.mark.parametrize("inner", ["stats", "free"])
def test_a_handler_may_ask_and_free_inside_of_a_call(
    pair: tuple[Node, Node], name: str, inner: str
) -> None:
    found = pair[1].do(_nest, name, inner, 7, timeout=300)
    assert set(found) == {"done"}
    assert found["done"] > 5


@pytest.mark.parametrize("name", ["pull, full", "copy", "link"])
@pytest.mark.parametrize("inner", ["pull", "link", "allocate", "init"])
def test_other_calls_are_refused_there_at_once(
    pair: tuple[Node, Node], name: str, inner: str
) -> None:
    found = pair[1].do(_nest, name, inner, 31, timeout=300)
    assert set(found) <= {"refused", "done"}  # done where the call has not begun, or has ended
    assert found["refused"] > 5


def test_a_link_goes_on_after_all_that(pair: tuple[Node, Node]) -> None:
    """Interrupts of every kind, one after the other, on one link."""
    for name in ("pull", "push", "copy"):
        for kind in KINDS:
            pair[1].do(_interrupt, name, kind, timeout=300)
    assert pair[1].do(nodes.log_of, "ERROR") == []
