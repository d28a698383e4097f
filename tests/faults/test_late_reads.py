"""A pull during which its owner may have reused the memory does not succeed."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from tests import nodes
from tests.faults import stage
from tests.nodes import MIB, Node

Start = Callable[..., Node]
PAIR = {1: 0, 2: 1}
REUSED = 0x6B6B6B6B


def _reading(start: Start, memory: str) -> tuple[Node, Node, int, int]:
    """An owner and a puller of its cache, in the middle; with the comm ids of both."""
    owner, puller = start(1, pool=16 * MIB), start(2, pool=16 * MIB, sync_kv_timeout=20_000)
    owner.do(nodes.make, "c", "cache", stage.SHAPE, stage.TENSORS, None, memory)
    owner.do(nodes.fill, "c", 1)
    puller.do(stage.prepare, 2)
    owner.begin(nodes.link_and_wait, "pair", PAIR)
    theirs = puller.do(nodes.link_and_wait, "pair", PAIR)
    puller.do(stage.slow_down)
    puller.do(stage.begin, "mid-pull")
    return owner, puller, owner.result(), theirs


def _reuse(here: nodes.Here) -> None:
    for array in here.arrays["c"]:
        array[:] = REUSED


def _unregister(here: nodes.Here) -> None:
    here.live.cache_manager.unregister_cache(here.caches["c"].cache_id)


def _close_session(here: nodes.Here) -> None:
    engine = here.live._engine
    assert engine is not None
    session = next(iter(engine.views.values())).session
    engine._reactor.call(lambda: session.close("made by the test"), 5)


def _reused_bytes(here: nodes.Here) -> int:
    return sum(int(np.count_nonzero(array == REUSED)) for array in here.arrays["c"])


def _begin_unlink(here: nodes.Here, comm_id: int) -> None:
    here.any["unlinking"] = threading.Thread(target=here.live.unlink, args=(comm_id,))
    here.any["unlinking"].start()
    engine = here.live._engine
    assert engine is not None
    while engine._links.domains:
        here.any["unlinking"].join(0.001)


def _end_unlink(here: nodes.Here) -> None:
    here.any["unlinking"].join(20)
    assert not here.any["unlinking"].is_alive()


def test_a_cache_unregistered_while_its_puller_is_stopped(start_node: Start) -> None:
    owner, puller, *_ = _reading(start_node, "numpy")
    puller.do(stage.half_open)  # what the owner says is not heard during the pull
    puller.pause()
    owner.do(_unregister)
    owner.do(_reuse)
    puller.resume()
    status, _, text = puller.do(stage.outcome)
    assert puller.do(_reused_bytes) > 0
    assert status == "LLM_KV_CACHE_NOT_EXIST"
    assert "unregistered there meanwhile" in text


def test_a_pool_cache_freed_during_a_pull_is_kept_until_it_ends(start_node: Start) -> None:
    owner, puller, *_ = _reading(start_node, "pool")
    puller.do(stage.half_open)
    owner.do(nodes.deallocate, "c")
    assert puller.do(stage.outcome)[0] == "OK"


def test_an_owner_whose_connection_is_cut(start_node: Start) -> None:
    owner, puller, *_ = _reading(start_node, "pool")
    puller.do(stage.half_open)
    owner.do(_close_session)
    owner.do(_reuse)
    status, _, text = puller.do(stage.outcome)
    assert puller.do(_reused_bytes) > 0
    assert status == "LLM_FAILED"
    assert "unlink and link again" in text


def test_both_unlink_during_a_pull(start_node: Start) -> None:
    owner, puller, ours, theirs = _reading(start_node, "numpy")
    puller.do(_begin_unlink, theirs)
    owner.do(nodes.unlink, ours)
    owner.do(_unregister)
    owner.do(_reuse)
    status, _, text = puller.do(stage.outcome)
    puller.do(_end_unlink)
    assert status == "LLM_FAILED"
    assert "has unlinked" in text
