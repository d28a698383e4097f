"""A pull during which its owner may have reused the memory does not succeed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from datadist import CacheDesc, CacheKeyByIdAndIndex, DataType
from tests import nodes, torn
from tests.faults import scenarios
from tests.nodes import MIB, Node

Start = Callable[..., Node]
REUSED = 0x6B6B6B6B


def _reading(start: Start, memory: str) -> tuple[Node, Node, int, int]:
    """An owner and a puller of its cache, in the middle; with the comm ids of both."""
    owner, puller = start(1, pool=16 * MIB), start(2, pool=16 * MIB, sync_kv_timeout=20_000)
    owner.do(nodes.make, "c", "cache", scenarios.SHAPE, scenarios.TENSORS, None, memory)
    owner.do(nodes.fill, "c", 1)
    puller.do(scenarios.prepare, 2)
    ours, theirs = nodes.link_pair(owner, puller)
    puller.do(scenarios.slow_down)
    puller.do(scenarios.begin, "mid-pull")
    return owner, puller, ours, theirs


def _reuse(here: nodes.Here) -> None:
    for array in here.arrays["c"]:
        array[:] = REUSED


def _late_bytes(puller: Node, owner: Node) -> int:
    """How much was read of what replaced the source; all else is from before the pull or from it."""
    found, old, new = puller.do(nodes.read, "c"), scenarios.original(2), scenarios.after_move(2, 1)
    late = [array == REUSED for array in found]
    for number, (is_now, becomes) in enumerate(zip(found, new, strict=True)):
        is_now[scenarios.SLOT][late[number][scenarios.SLOT]] = becomes[scenarios.SLOT][
            late[number][scenarios.SLOT]
        ]
    torn.check_torn(found, old, new, "what was pulled late")
    theirs = owner.do(nodes.read, "c")
    torn.check_unchanged(
        theirs, [np.full_like(array, REUSED) for array in theirs], "what is reused"
    )
    return sum(int(np.count_nonzero(array)) for array in late)


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
    puller.do(scenarios.half_open)  # what the owner says is not heard during the pull
    puller.pause()
    owner.do(nodes.unregister, "c")
    owner.do(_reuse)
    puller.resume()
    status, _, text = puller.do(scenarios.outcome)
    assert _late_bytes(puller, owner) > 0
    assert status == "LLM_KV_CACHE_NOT_EXIST"
    assert "unregistered there meanwhile" in text


def test_a_pool_cache_freed_during_a_pull_is_kept_until_it_ends(start_node: Start) -> None:
    owner, puller, *_ = _reading(start_node, "pool")
    puller.do(scenarios.half_open)
    owner.do(nodes.deallocate, "c")
    assert puller.do(scenarios.outcome)[0] == "OK"
    torn.check_unchanged(puller.do(nodes.read, "c"), scenarios.after_move(2, 1), "what was pulled")


def test_an_owner_whose_connection_is_cut(start_node: Start) -> None:
    owner, puller, *_ = _reading(start_node, "pool")
    puller.do(scenarios.half_open)
    owner.do(scenarios.give_up)
    owner.do(_reuse)
    status, _, text = puller.do(scenarios.outcome)
    assert _late_bytes(puller, owner) > 0
    assert status == "LLM_FAILED"
    assert "unlink and link again" in text


def test_an_owner_that_is_finalized_while_its_puller_is_stopped(start_node: Start) -> None:
    owner, puller, *_ = _reading(start_node, "numpy")
    puller.pause()
    owner.do(nodes.finalize)
    owner.do(_reuse)
    puller.resume()
    status, _, _ = puller.do(scenarios.outcome)
    assert status in ("LLM_FAILED", "LLM_NOT_YET_LINK")


def test_both_unlink_during_a_pull(start_node: Start) -> None:
    owner, puller, ours, theirs = _reading(start_node, "numpy")
    puller.do(_begin_unlink, theirs)
    owner.do(nodes.unlink, ours)
    owner.do(nodes.unregister, "c")
    owner.do(_reuse)
    status, _, text = puller.do(scenarios.outcome)
    puller.do(_end_unlink)
    _late_bytes(puller, owner)
    assert status == "LLM_KV_CACHE_NOT_EXIST"
    assert "unregistered there meanwhile" in text


def _hold(here: nodes.Here) -> None:
    """From now on a read of the link is done, and returns when it is told to."""
    engine = here.live._engine
    assert engine is not None
    (domain,) = engine._all_domains()
    assert domain.attempt is not None
    link: Any = domain.attempt.link
    read = link.read
    done, go_on = here.any["done"], here.any["go on"] = threading.Event(), threading.Event()

    def held(*args: Any) -> Any:
        answer = read(*args)
        done.set()
        assert go_on.wait(60)
        return answer

    link.read = held


def _begin_pull(here: nodes.Here, cache_id: int) -> None:
    """Return once its bytes were read."""
    here.any["go on"].clear()
    here.any["done"].clear()

    def run() -> None:
        try:
            nodes.pull_cache(here, CacheKeyByIdAndIndex(1, cache_id, 0), "mine")
            here.any["outcome"] = ("OK", 0.0, "")
        except Exception as error:
            here.any["outcome"] = (scenarios.status_of(error), 0.0, str(error))

    here.any["thread"] = threading.Thread(target=run)
    here.any["thread"].start()
    assert here.any["done"].wait(60)


def _go_on(here: nodes.Here, seconds: float) -> tuple[str, float, str]:
    """Let the read return after a while; what came of the pull."""
    time.sleep(seconds)
    here.any["go on"].set()
    return scenarios.outcome(here)


LATE = 0.6
"""Seconds, after which an owner may have reused registered memory."""


def _held(start: Start) -> tuple[Node, Node]:
    """An owner of registered cache 1 and of cache 2 from its pool, and a puller that is held."""
    owner, puller = start(1), start(2, sync_kv_timeout=6000)
    for label, memory in (("c", "numpy"), ("pooled", "pool")):
        owner.do(nodes.make, label, "cache", [1, 64], 1, None, memory)
    puller.do(nodes.make, "mine", "cache", [1, 64], 1, None, "numpy")
    nodes.link_pair(owner, puller)
    puller.do(_hold)
    return owner, puller


def test_an_owner_that_does_not_answer_after_a_late_read(start_node: Start) -> None:
    owner, puller = _held(start_node)
    puller.do(_begin_pull, 1)
    assert puller.do(_go_on, LATE)[0] == "OK"  # it answers
    owner.pause()
    puller.do(_begin_pull, 2)
    assert puller.do(_go_on, LATE)[0] == "OK"  # memory of a pool is kept while a pull goes on
    puller.do(_begin_pull, 1)
    status, _, text = puller.do(_go_on, LATE)
    owner.resume()
    assert status == "LLM_FAILED"
    assert "was too slow" in text
    assert "did not confirm that the data is still valid (is it stopped?)" in text
    puller.do(_begin_pull, 1)
    assert puller.do(_go_on, LATE)[0] == "OK"


def _begin_unregister(here: nodes.Here) -> None:
    here.any["unregistering"] = threading.Thread(target=nodes.unregister, args=(here, "mine"))
    here.any["unregistering"].start()
    engine = here.live._engine
    assert engine is not None
    while engine.owned.get(here.caches["mine"].cache_id) is not None:
        here.any["unregistering"].join(0.001)


def _unregisters(here: nodes.Here, timeout: float) -> bool:
    """Whether it still does so after ``timeout`` seconds."""
    here.any["unregistering"].join(timeout)
    return bool(here.any["unregistering"].is_alive())


def test_our_registered_cache_is_let_go_when_its_pull_has_ended(start_node: Start) -> None:
    _, puller = _held(start_node)
    puller.do(_begin_pull, 2)
    puller.do(_begin_unregister)
    assert puller.do(_unregisters, 0.2)
    assert puller.do(_go_on, 0.0)[0] == "OK"
    assert not puller.do(_unregisters, 20)
    assert puller.do(_pull_again) == "LLM_KV_CACHE_NOT_EXIST"


def _pull_again(here: nodes.Here) -> str:
    try:
        nodes.pull_cache(here, CacheKeyByIdAndIndex(1, 2, 0), "mine")
    except Exception as error:
        return scenarios.status_of(error)
    return "OK"


def _say_much(here: nodes.Here) -> None:
    """More than a socket holds, and then be too busy to send the rest."""
    manager = here.live.cache_manager
    for _ in range(400):
        manager.deallocate_cache(manager.allocate_cache(CacheDesc(1, [1, 1], DataType.DT_INT8)))
    nodes.unregister(here, "c")
    engine = here.live._engine
    assert engine is not None
    engine._reactor.post(lambda: time.sleep(1))


def test_what_the_owner_said_last_waits_behind_a_full_socket(start_node: Start) -> None:
    owner, puller, *_ = _reading(start_node, "numpy")
    puller.pause()
    owner.do(_say_much)
    owner.do(_reuse)
    puller.resume()
    status, _, text = puller.do(scenarios.outcome)
    assert _late_bytes(puller, owner) > 0
    assert status == "LLM_KV_CACHE_NOT_EXIST", text


def _begin_unlink_clusters(here: nodes.Here, port: int) -> None:
    def unlink() -> None:
        here.any["codes"] = nodes.unlink_clusters(here, [(1, port)], 10_000)

    here.any["unlinking"] = threading.Thread(target=unlink)
    here.any["unlinking"].start()
    engine = here.live._engine
    assert engine is not None
    while engine._clusters.pairs:
        here.any["unlinking"].join(0.001)


def test_unlink_clusters_lets_a_pull_of_ours_end(
    start_node: Start, free_ports: Callable[[int], list[int]]
) -> None:
    settings = {"pool": 16 * MIB, "sync_kv_timeout": 20_000, "local_comm_res": ""}
    (port,) = free_ports(1)
    owner = start_node(1, listen_ip_info=f"127.0.0.1:{port}", **settings)
    puller = start_node(2, **settings)
    for node, seed in ((owner, 1), (puller, 2)):
        node.do(scenarios.prepare, seed)
    puller.do(nodes.link_clusters, [(1, port)])
    puller.do(scenarios.slow_down)
    puller.do(scenarios.begin, "mid-pull")
    puller.do(_begin_unlink_clusters, port)
    status, _, text = puller.do(scenarios.outcome)
    puller.do(_end_unlink)
    assert status == "OK", text
    scenarios.check_moved(puller, owner, "mid-pull", whole=True)
