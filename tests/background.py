"""Engines in one-sided mode that pull in the background, for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from datadist import BlocksCacheKey, LLMDataDist, LLMException, TransferTask
from tests import held, nodes
from tests.nodes import Node

SECONDS = 60
Start = Callable[..., Node]


@pytest.fixture
def start(start_node: Start) -> Start:
    """Start an engine in one-sided mode, with a blocks cache that has its number in every word."""

    def begin(cluster: int, options: dict[str, str] | None = None, **settings: Any) -> Node:
        settings = {"enable_remote_cache_accessible": True, "sync_kv_timeout": 60_000, **settings}
        node = start_node()
        node.do(init, cluster, options or {}, settings)
        return node

    return begin


def init(here: nodes.Here, cluster: int, options: dict[str, str], settings: dict[str, Any]) -> None:
    """Initialise an engine with its caches and further options."""
    original = LLMDataDist.init

    def init(self: LLMDataDist, given: dict[str, str]) -> None:
        original(self, {**given, **options})

    LLMDataDist.init = init  # type: ignore[method-assign, assignment]
    nodes.init(here, cluster, **settings)
    nodes.make(here, "blocks", "blocks", [64, 1024], 2, BlocksCacheKey(cluster))
    nodes.make(here, "slots", "cache", [2, 1024], 2)
    for label in ("blocks", "slots"):
        for array in here.arrays[label]:
            array[:] = cluster


def link(first: Node, second: Node, one: int, two: int) -> None:
    """Link two nodes of these clusters."""
    name, mapping = f"{one} and {two}", {one: 0, two: 1}
    first.begin(nodes.link_and_wait, name, mapping)
    second.do(nodes.link_and_wait, name, mapping)
    first.result()


def pull(here: nodes.Here, cluster: int, block: int, **options: Any) -> TransferTask:
    """Begin to pull a block of a cluster into the same block here."""
    return here.live.cache_manager.pull_blocks_async(
        BlocksCacheKey(cluster), here.caches["blocks"], [block], [block], **options
    )


def code(task: TransferTask) -> str:
    """How a task ended: "OK", or the name of its code."""
    try:
        task.result(SECONDS)
    except LLMException as error:
        return error.status_code.name
    return "OK"


def outcome(call: Callable[[], object]) -> str:
    """How a call ended: "OK", or the name of its code or exception."""
    try:
        call()
    except LLMException as error:
        return error.status_code.name
    except Exception as error:
        return type(error).__name__
    return "OK"


def hold_pulls(here: nodes.Here, count: int, **options: Any) -> bool:
    """Begin pulls; whether as many are inside of the transport as may be."""
    here.any["tasks"] = [pull(here, 1, number, **options) for number in range(count)]
    return held.inside(here, min(4, count))


def codes(here: nodes.Here) -> list[str]:
    """How the tasks of the node ended."""
    return [code(task) for task in here.any["tasks"]]


def done(here: nodes.Here) -> list[bool]:
    """Which of the tasks of the node have ended."""
    return [task.done() for task in here.any["tasks"]]


def pull_of(here: nodes.Here) -> Callable[[], object]:
    """Begins a pull of this engine, also when that is over."""
    pull, cache = here.live.cache_manager.pull_blocks_async, here.caches["blocks"]
    return lambda: pull(BlocksCacheKey(1), cache, [0], [0])
