"""Transfers that stay in flight after their calls: nothing that they may touch is used meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from datadist import BlocksCacheKey, CacheDesc, DataType, LLMException
from datadist.links import in_flight
from tests import late_transport, nodes
from tests.nodes import Node, RemoteError
from tests.waiting import until

Start = Callable[..., Node]
LATE, FORCED = "tests.late_transport:LateTransport", "tests.late_transport:ForcedTransport"
BLOCKS, BLOCK = 16, 4096
POOL = 3 * BLOCKS * BLOCK
KEY = BlocksCacheKey(1)
FAR_MS = 20_000
"""The transport says long before that a transfer goes on: of it alone, not of a slow machine."""


def _make(here: nodes.Here, label: str, memory: str, value: int, key: Any = None) -> None:
    desc = CacheDesc(1, [BLOCKS, BLOCK], DataType.DT_UINT8)
    manager = here.live.cache_manager
    if memory == "pool":
        cache = manager.allocate_blocks_cache(desc, key)
        here.arrays[label] = cache.numpy()
    else:
        here.arrays[label] = [here.any.setdefault(memory, np.zeros((BLOCKS, BLOCK), np.uint8))]
        addresses = [here.arrays[label][0].ctypes.data]
        cache = manager.register_blocks_cache(desc, addresses, key, remote_accessible=True)
    here.caches[label] = cache
    here.arrays[label][0][:] = value


def _drop(here: nodes.Here, label: str) -> None:
    cache = here.caches[label]
    if label in here.any:
        here.live.cache_manager.unregister_cache(cache.cache_id)
    else:
        here.live.cache_manager.deallocate_blocks_cache(cache)


def _move(
    here: nodes.Here, label: str, what: str, key: Any = KEY, blocks: int = BLOCKS,
    millis: int | None = None,
) -> str:  # fmt: skip
    manager, every = here.live.cache_manager, list(range(blocks))
    options: dict[str, Any] = {"timeout_in_millis": millis}
    try:
        if what == "push":
            manager.push_blocks(
                key, here.caches[label], every, every, tensor_num_per_layer=1, **options
            )
        else:
            manager.pull_blocks(key, here.caches[label], every, every, **options)
    except LLMException as error:
        return str(error)
    return "done"


def _values(here: nodes.Here, label: str) -> list[int]:
    return sorted({int(value) for value in np.unique(here.arrays[label][0])})


def _set(here: nodes.Here, name: str, value: Any) -> None:
    setattr(in_flight, name, value)


def _hold(here: nodes.Here, hold: bool) -> None:
    (late_transport.HELD.set if hold else late_transport.HELD.clear)()


def _forced(here: nodes.Here) -> list[list[int]]:
    return late_transport.FORCED


def _fits(here: nodes.Here, caches: int = 2) -> bool:
    """Whether there is room in the pool, which has three places, for so many caches."""
    desc = CacheDesc(caches, [BLOCKS, BLOCK], DataType.DT_UINT8)
    try:
        cache = here.live.cache_manager.allocate_blocks_cache(desc)
    except LLMException:
        return False
    here.live.cache_manager.deallocate_blocks_cache(cache)
    return True


def _start(start: Start, *clusters: int, backend: str = LATE) -> list[Node]:
    return [
        start(
            cluster, pool=POOL, transfer_backend=backend, enable_remote_cache_accessible=True,
            sync_kv_timeout=FAR_MS,
        )
        for cluster in clusters
    ]  # fmt: skip


def _link(name: str, group: dict[int, Node]) -> int:
    """Its comm id at cluster 2."""
    mapping = {cluster: rank for rank, cluster in enumerate(group)}
    for node in group.values():
        node.begin(nodes.link_and_wait, name, mapping)
    ids = {cluster: int(node.result()) for cluster, node in group.items()}
    return ids[2]


@pytest.mark.parametrize("known", [False, True])
def test_a_pull_from_a_stopped_peer_lands_in_no_pages_that_are_used_again(
    start_node: Start, known: bool
) -> None:
    owner, reader, third = _start(start_node, 1, 2, 3)
    owner.do(_make, "theirs", "pool", 1, KEY)
    reader.do(_make, "mine", "pool", 2)
    _link("old", {1: owner, 2: reader})
    _link("other", {2: reader, 3: third})
    if known:
        assert reader.do(_move, "mine", "pull") == "done"
    owner.pause()
    assert "LLM_TIMEOUT" in reader.do(_move, "mine", "pull")
    reader.do(_drop, "mine")
    reader.do(_make, "again", "pool", 3, BlocksCacheKey(2, 7))
    third.do(_make, "source", "pool", 4)
    assert third.do(_move, "source", "push", BlocksCacheKey(2, 7)) == "done"
    assert not reader.do(_fits)
    owner.resume()
    until(lambda: bool(reader.do(_fits)), what="the quarantine ends once it has settled")
    assert reader.do(_values, "again") == [4]


def test_a_pull_from_a_stopped_peer_keeps_registered_memory(start_node: Start) -> None:
    owner, reader, third = _start(start_node, 1, 2, 3)
    owner.do(_make, "theirs", "pool", 1, KEY)
    reader.do(_make, "mine", "mine", 2, BlocksCacheKey(2, 7))
    _link("old", {1: owner, 2: reader})
    comm_id = _link("other", {2: reader, 3: third})
    owner.pause()
    assert "LLM_TIMEOUT" in reader.do(_move, "mine", "pull")
    third.do(_make, "source", "pool", 4)
    assert third.do(_move, "source", "pull", BlocksCacheKey(2, 7)) == "done"
    with pytest.raises(RemoteError, match="stays registered: a pull from cluster 1") as caught:
        reader.do(_drop, "mine")
    assert caught.value.status == "LLM_FAILED"
    assert reader.do(nodes.link_error, comm_id) is None, "that link has nothing in flight"
    owner.resume()
    until(lambda: reader.do(_values, "mine") == [1])
    until(lambda: bool(reader.do(_unregistered)))
    assert third.do(_values, "source") == [2]


def _unregistered(here: nodes.Here) -> bool:
    try:
        _drop(here, "mine")
    except LLMException:
        return False
    return True


def test_a_push_to_a_stopped_peer_lands_in_no_pages_that_are_used_again(start_node: Start) -> None:
    target, writer, third = _start(start_node, 1, 2, 3)
    target.do(_make, "theirs", "pool", 1, KEY)
    writer.do(_make, "mine", "pool", 2)
    _link("old", {1: target, 2: writer})
    _link("other", {1: target, 2: writer, 3: third})
    writer.do(_hold, True)
    assert "LLM_TIMEOUT" in writer.do(_move, "mine", "push")
    target.do(_drop, "theirs")
    target.do(_make, "again", "pool", 3, BlocksCacheKey(1, 7))
    third.do(_make, "source", "pool", 4)
    assert third.do(_move, "source", "push", BlocksCacheKey(1, 7)) == "done"
    assert not target.do(_fits)
    writer.do(_hold, False)
    until(lambda: bool(target.do(_fits)), what="the writer has settled")
    assert target.do(_values, "again") == [4]
    writer.do(_drop, "mine")
    until(lambda: bool(writer.do(_fits, 3)))


@pytest.mark.parametrize("what", ["pull", "push"])
def test_what_does_not_settle_is_forced_and_costs_the_connection(
    start_node: Start, what: str
) -> None:
    owner, mover = _start(start_node, 1, 2, backend=FORCED)
    owner.do(_make, "theirs", "pool", 1, KEY)
    mover.do(_make, "mine", "pool", 2)
    comm_id = _link("pair", {1: owner, 2: mover})
    mover.do(_set, "FORCE_SECONDS", 0.1)
    mover.do(_hold, True)
    assert "LLM_TIMEOUT" in mover.do(_move, "mine", what)
    mover.do(_drop, "mine")
    until(lambda: bool(mover.do(_fits, 3)), what="forced, it settles")
    assert mover.do(_forced) == [[0]]
    assert f"a {what}" in mover.do(nodes.link_error, comm_id)
    assert "the connection was given up" in mover.do(nodes.link_error, comm_id)
    mover.do(_make, "mine", "pool", 2)
    mover.do(_hold, False)
    assert "LLM_NOT_YET_LINK" in mover.do(_move, "mine", what)
    mover.do(nodes.unlink, comm_id)
    owner.do(nodes.unlink, 1)
    _link("pair", {1: owner, 2: mover})
    assert mover.do(_move, "mine", what) == "done"


def test_what_is_left_after_the_connection_was_forced_is_forced_again(start_node: Start) -> None:
    owner, reader = _start(start_node, 1, 2, backend=FORCED)
    owner.do(_make, "theirs", "pool", 1, KEY)
    reader.do(_make, "mine", "pool", 2)
    comm_id = _link("pair", {1: owner, 2: reader})
    reader.do(_set, "FORCE_SECONDS", 0.1)
    reader.do(_hold, True)
    assert "LLM_TIMEOUT" in reader.do(_move, "mine", "pull")
    until(lambda: reader.do(_forced) == [[0]])
    nodes.said(reader, "WARNING", "did not settle", "the connection is given up")
    reader.do(_revive)  # as if that one had been inside its call meanwhile
    assert "LLM_TIMEOUT" in reader.do(_move, "mine", "pull")
    until(lambda: reader.do(_forced) == [[0, 0]])
    reader.do(nodes.unlink, comm_id)
    assert reader.do(_forced) == [[0, 0]], "nothing was in flight any more"


def _revive(here: nodes.Here) -> None:
    engine: Any = here.live._engine
    (domain,) = engine._all_domains()
    domain.attempt.gone.clear()
    domain.attempt.link._ended.clear()


def test_what_cannot_be_forced_is_waited_for_and_that_is_said_once(start_node: Start) -> None:
    owner, reader = _start(start_node, 1, 2)
    owner.do(_make, "theirs", "pool", 1, KEY)
    reader.do(_make, "mine", "pool", 2)
    comm_id = _link("pair", {1: owner, 2: reader})
    reader.do(_set, "FORCE_SECONDS", 0.05)
    reader.do(_hold, True)
    for _ in range(3):
        assert "LLM_TIMEOUT" in reader.do(_move, "mine", "pull")
    said = nodes.said(reader, "WARNING", "did not settle", "nothing but the peer can end it")
    assert "has not let go" in reader.do(nodes.link_error, comm_id)
    reader.do(_hold, False)
    until(lambda: reader.do(nodes.link_error, comm_id) is None)
    assert reader.do(_move, "mine", "pull") == "done", "the link can be used"
    assert [line for line in reader.do(nodes.log_of) if "nothing but the peer" in line] == [said]
    assert reader.do(_forced) == [[0]]


@pytest.mark.parametrize("backend", [LATE, FORCED])
@pytest.mark.parametrize("end", [nodes.unlink, nodes.finalize])
def test_a_link_is_forced_before_it_is_closed(
    start_node: Start, backend: str, end: Callable[..., None]
) -> None:
    owner, reader = _start(start_node, 1, 2, backend=backend)
    owner.do(_make, "theirs", "pool", 1, KEY)
    reader.do(_make, "mine", "pool", 2)
    reader.do(_make, "registered", "registered", 2)
    comm_id = _link("pair", {1: owner, 2: reader})
    reader.do(_hold, True)
    for label in ("mine", "registered"):
        assert "LLM_TIMEOUT" in reader.do(_move, label, "pull")
    reader.do(end, *([comm_id] if end is nodes.unlink else []))
    assert reader.do(_forced) == [[0]]
    left = [line for line in reader.do(nodes.log_of, "ERROR") if "has not let go" in line]
    assert len(left) == (2 if end is nodes.finalize and backend == LATE else 0)
    if end is nodes.unlink and backend == LATE:
        with pytest.raises(RemoteError, match="stays registered"):
            reader.do(_drop, "registered")
    reader.do(_hold, False)  # what was left writes memory that is there still
    time.sleep(0.05)
    assert reader.is_alive
    if end is nodes.unlink:
        until(lambda: bool(reader.do(_drops)))


def _drops(here: nodes.Here) -> bool:
    try:
        _drop(here, "registered")
    except LLMException:
        return False
    return True
