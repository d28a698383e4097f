"""What goes on side by side: an operation is held inside the transport, and others end meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LayerSynchronizer,
    Placement,
    TransferWithCacheKeyConfig,
)
from datadist.links.permits import Permits
from tests import held, nodes
from tests.nodes import Node, pattern

Start = Callable[..., Node]
Ports = Callable[[int], list[int]]
SHAPE, TENSORS = (4, 64), 4
TOGETHER = {1: 0, 3: 1}


class Ready(LayerSynchronizer):
    """Every layer is final."""

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True


def _make(here: nodes.Here, cluster: int) -> None:
    """Caches 1 ("slots") and 2 ("blocks"), filled."""
    nodes.make(here, "slots", "cache", list(SHAPE), TENSORS)
    nodes.make(here, "blocks", "blocks", list(SHAPE), TENSORS, BlocksCacheKey(cluster, 0))
    for label in ("slots", "blocks"):
        nodes.fill(here, label, cluster)
    nodes.make(here, "other", "blocks", list(SHAPE), TENSORS, BlocksCacheKey(cluster, 1))


def _start(start: Start, *clusters: int, push: bool = True) -> list[Node]:
    made = [start(c, enable_remote_cache_accessible=push, sync_kv_timeout=60_000) for c in clusters]
    for node, cluster in zip(made, clusters, strict=True):
        node.do(_make, cluster)
    return made


def _link(we: Node, peer: Node, cluster: int, name: str = "with") -> None:
    mapping = {1: 0, cluster: 1}
    peer.begin(nodes.link_and_wait, f"{name} {cluster}", mapping)
    we.do(nodes.link_and_wait, f"{name} {cluster}", mapping)
    peer.result()


def _pull(here: nodes.Here, cluster: int, block: int) -> None:
    nodes.pull_blocks(here, BlocksCacheKey(cluster, 0), "other", [block], [block])


def _pull_slot(here: nodes.Here, cluster: int) -> None:
    nodes.pull_cache(here, CacheKeyByIdAndIndex(cluster, 1, 1), "slots", 3)


def _push(here: nodes.Here, cluster: int) -> None:
    nodes.push_blocks(here, BlocksCacheKey(cluster, 1), "blocks", [1], [1])


def _copy(here: nodes.Here) -> None:
    here.live.cache_manager.copy_blocks(here.caches["blocks"], {0: [3]})


def _swap(here: nodes.Here) -> None:
    arrays = here.any["swapped"] = [np.zeros(SHAPE, np.int32) for _ in range(TENSORS)]
    desc = CacheDesc(TENSORS, SHAPE, DataType.DT_INT32, Placement.HOST)
    cpu = Cache.create_cpu_cache(desc, [array.ctypes.data for array in arrays])
    here.live.cache_manager.swap_blocks(here.caches["blocks"], cpu, {0: 3})


def _copy_slot(here: nodes.Here) -> None:
    here.live.cache_manager.copy_cache(here.caches["slots"], here.caches["slots"], 2, 0)


def _send_layers(here: nodes.Here, cluster: int) -> None:
    key = CacheKeyByIdAndIndex(cluster, 1, 2)
    config = TransferWithCacheKeyConfig(key, range(2), range(2))
    task = here.live.cache_manager.transfer_cache_async(here.caches["slots"], Ready(), [config])
    code = task.synchronize(60_000)
    assert code.name == "LLM_SUCCESS", code


def _manage_caches(here: nodes.Here) -> None:
    """Whatever makes, names and frees caches."""
    manager = here.live.cache_manager
    desc = CacheDesc(1, [2, 8], DataType.DT_INT32)
    keyed = manager.allocate_cache(desc, [CacheKey(1, 70), CacheKey(1, 71)])
    manager.remove_cache_key(CacheKey(1, 70))
    manager.deallocate_cache(keyed)
    manager.deallocate_blocks_cache(manager.allocate_blocks_cache(desc))
    array = here.any["registered"] = np.zeros((2, 8), np.int32)
    manager.unregister_cache(manager.register_cache(desc, [array.ctypes.data]).cache_id)


def _ask(here: nodes.Here) -> None:
    assert here.live.stats()["backend"] == "shm"
    assert here.live.query_register_mem_status(1).name == "OK"
    assert here.live.link_error(1) is None


def _link_and_unlink(here: nodes.Here) -> None:
    here.live.unlink(nodes.link_and_wait(here, "meanwhile", TOGETHER))


BESIDE: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
    "a first pull from another peer": (_pull_slot, (3,)),
    "a pull of blocks from another peer": (_pull, (3, 1)),
    "a short pull from another peer": (_pull, (3, 1)),
    "a push to another peer": (_push, (3,)),
    "a layer-wise transfer to another peer": (_send_layers, (3,)),
    "a copy of blocks": (_copy, ()),
    "a copy of a slot": (_copy_slot, ()),
    "a swap of blocks": (_swap, ()),
    "making and freeing caches": (_manage_caches, ()),
    "questions": (_ask, ()),
    "link and unlink": (_link_and_unlink, ()),
}
HELD: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
    "pull": (_pull, (2, 2)),
    "push": (_push, (2,)),
    "layer-wise transfer": (_send_layers, (2,)),
    "copy": (_copy, ()),
}


@pytest.mark.parametrize("what", HELD)
def test_one_operation_in_the_transport_holds_up_no_other(start_node: Start, what: str) -> None:
    we, second, third = _start(start_node, 1, 2, 3)
    _link(we, second, 2)
    _link(we, third, 3)
    if what == "copy":
        we.do(_hold_the_first_copy)
    else:
        we.do(held.hold_moves, 2)
    function, args = HELD[what]
    we.do(held.begin, what, function, *args)
    assert we.do(held.inside, 1)
    for name, (beside, arguments) in BESIDE.items():
        if beside is _link_and_unlink:
            third.begin(_link_and_unlink)
        we.do(held.begin, name, beside, *arguments)
        assert we.do(held.outcome, name) == "OK", f"{name} beside a {what}"
        assert we.do(held.running, what)
    third.result()
    we.do(held.let_go)
    assert we.do(held.outcome, what) == "OK"
    if what == "pull":
        for tensor, array in enumerate(we.do(nodes.read, "other")):
            np.testing.assert_array_equal(array[2], pattern(2, tensor, SHAPE)[2])


def _hold_the_first_copy(here: nodes.Here) -> None:
    """Those that follow it are not held."""
    engine = here.live._engine
    assert engine is not None
    transport: Any = engine.transport
    free = transport.copy
    held.hold_copies(here)
    held_copy = transport.copy

    def copy(*args: Any) -> None:
        transport.copy = free
        held_copy(*args)

    transport.copy = copy


def test_two_peers_are_read_from_at_the_same_time(start_node: Start) -> None:
    we, second, third = _start(start_node, 1, 2, 3)
    for cluster, node in ((2, second), (3, third)):
        _link(we, node, cluster)
        we.do(_pull, cluster, 0)  # known from now on: the short way
    we.do(held.hold_moves, 2, 3)
    for name, function, args in (
        ("short from 2", _pull, (2, 1)), ("short from 3", _pull, (3, 2)),
    ):  # fmt: skip
        we.do(held.begin, name, function, *args)
    assert we.do(held.inside, 2)
    we.do(held.let_go)
    assert [we.do(held.outcome, f"short from {c}") for c in (2, 3)] == ["OK", "OK"]
    for tensor, array in enumerate(we.do(nodes.read, "other")):
        np.testing.assert_array_equal(array[1], pattern(2, tensor, SHAPE)[1])
        np.testing.assert_array_equal(array[2], pattern(3, tensor, SHAPE)[2])


def test_reads_and_writes_with_two_peers_and_copies_are_in_the_transport_at_the_same_time(
    start_node: Start,
) -> None:
    we, second, third = _start(start_node, 1, 2, 3)
    _link(we, second, 2)
    _link(we, third, 3)
    we.do(held.hold_moves, 2, 3)
    we.do(held.hold_copies)
    calls: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
        "pull": (_pull_slot, (2,)), "push": (_push, (3,)), "copy": (_copy, ()), "swap": (_swap, ()),
    }  # fmt: skip
    for name, (function, args) in calls.items():
        we.do(held.begin, name, function, *args)
    assert we.do(held.inside, len(calls))
    we.do(held.let_go)
    assert {we.do(held.outcome, name) for name in calls} == {"OK"}


def _one_at_a_time(here: nodes.Here) -> None:
    """As over a transport that permits one transfer at a time; on the link with cluster 2."""
    held.attempt_with(here, 2).permits = {1: Permits(1)}
    held.watch_permits(here, 2)


@pytest.mark.parametrize("function", [_pull, _pull_slot], ids=["blocks", "slot"])
def test_two_threads_that_pull_over_one_link_take_turns_where_the_transport_is_not_parallel(
    start_node: Start, function: Callable[..., None]
) -> None:
    we, second = _start(start_node, 1, 2)
    _link(we, second, 2)
    we.do(_one_at_a_time)
    we.do(held.hold_moves, 2)
    args = [(2, 1), (2, 2)] if function is _pull else [(2,), (2,)]
    we.do(held.begin, "first", function, *args[0])
    assert we.do(held.inside, 1)
    we.do(held.begin, "second", function, *args[1])
    assert we.do(held.waiting, 1)
    assert we.do(held.most_inside) == 1
    for name, (beside, arguments) in BESIDE.items():  # who waits for its turn holds up nobody
        if "peer" not in name and beside is not _link_and_unlink:
            we.do(held.begin, name, beside, *arguments)
            assert we.do(held.outcome, name) == "OK", name
    we.do(held.let_go)
    assert [we.do(held.outcome, name) for name in ("first", "second")] == ["OK", "OK"]
    assert we.do(held.most_inside) == 1
    label, rows = ("other", (1, 2)) if function is _pull else ("slots", (3,))
    for tensor, array in enumerate(we.do(nodes.read, label)):
        for row in rows:
            source = row if function is _pull else 1
            np.testing.assert_array_equal(array[row], pattern(2, tensor, SHAPE)[source])


def _at_a_time(here: nodes.Here) -> int:
    return held.permits_with(here, 2).count


@pytest.mark.parametrize("known", [False, True], ids=["first", "known"])
@pytest.mark.parametrize("what", ["blocks", "slot", "push"])
def test_small_transfers_over_one_link_end_beside_one_that_goes_on(
    start_node: Start, what: str, known: bool
) -> None:
    """As many as the transport permits; one more waits for its turn."""
    we, second = _start(start_node, 1, 2)
    _link(we, second, 2)
    many = we.do(_at_a_time)
    assert many > 1
    calls: dict[str, tuple[Callable[..., None], tuple[int, ...]]] = {
        "blocks": (_pull, (2, 3)), "slot": (_pull_slot, (2,)), "push": (_push, (2,)),
    }  # fmt: skip
    small, args = calls[what]
    if known:
        we.do(small, *args)
    we.do(held.hold_moves, 2)
    for number in range(many - 1):
        we.do(held.begin, f"held {number}", _pull, 2, number % 2)
    assert we.do(held.inside, many - 1)
    we.do(held.hold_no_more)
    for number in range(3):
        we.do(held.begin, f"small {number}", small, *args)
        assert we.do(held.outcome, f"small {number}") == "OK"
    assert all(we.do(held.running, f"held {number}") for number in range(many - 1))
    we.do(held.let_go)
    assert {we.do(held.outcome, f"held {number}") for number in range(many - 1)} == {"OK"}
    label = {"blocks": "other", "slot": "slots", "push": "other"}[what]
    row, source, seed = {"blocks": (3, 3, 2), "slot": (3, 1, 2), "push": (1, 1, 1)}[what]
    for tensor, array in enumerate((second if what == "push" else we).do(nodes.read, label)):
        np.testing.assert_array_equal(array[row], pattern(seed, tensor, SHAPE)[source])


def test_no_more_are_in_the_transport_than_it_permits(start_node: Start) -> None:
    we, second = _start(start_node, 1, 2)
    _link(we, second, 2)
    many = we.do(_at_a_time)
    we.do(held.hold_moves, 2)
    for number in range(many + 4):
        we.do(held.begin, str(number), _push if number % 2 else _pull_slot, 2)
    assert we.do(held.inside, many)
    we.do(held.watch_permits, 2)
    assert we.do(held.waiting, 4)
    we.do(held.let_go)
    assert {we.do(held.outcome, str(number)) for number in range(many + 4)} == {"OK"}
    assert we.do(held.most_inside) == many


@pytest.mark.parametrize("end", ["unlink", "finalize"])
def test_unlink_waits_for_all_that_goes_on_and_finalize_for_none(
    start_node: Start, end: str
) -> None:
    we, second = _start(start_node, 1, 2)
    _link(we, second, 2)
    we.do(held.hold_moves, 2)
    for number in range(3):
        we.do(held.begin, f"pull {number}", _pull, 2, number)
    assert we.do(held.inside, 3)
    if end == "unlink":
        we.do(held.watch_permits, 2)
        we.do(held.begin, "unlink", nodes.unlink, 1)
        assert we.do(held.waiting, 1)
        assert we.do(held.running, "unlink")
        we.do(held.let_go)
        assert {we.do(held.outcome, f"pull {number}") for number in range(3)} == {"OK"}
        assert we.do(held.outcome, "unlink") == "OK"
        return
    we.do(held.begin, "finalize", nodes.finalize)
    assert we.do(held.aborted, 2)
    we.do(held.let_go)
    assert we.do(held.outcome, "finalize") == "OK"
    for number in range(3):
        assert "LLMException" in we.do(held.outcome, f"pull {number}")


def test_unlink_aborts_all_that_goes_on_after_its_grace(start_node: Start) -> None:
    we, second = (start_node(c, sync_kv_timeout=2000) for c in (1, 2))
    for node, cluster in ((we, 1), (second, 2)):
        node.do(_make, cluster)
    _link(we, second, 2)
    we.do(held.hold_moves, 2)
    for number in range(3):
        we.do(held.begin, f"pull {number}", _pull, 2, number)
    assert we.do(held.inside, 3)
    we.do(held.begin, "unlink", nodes.unlink, 1)
    assert we.do(held.aborted, 2)
    we.do(held.let_go)
    assert we.do(held.outcome, "unlink") == "OK"
    for number in range(3):
        assert "LLMException" in we.do(held.outcome, f"pull {number}")


def test_two_threads_pull_from_one_peer_over_two_links_at_the_same_time(start_node: Start) -> None:
    we, second = _start(start_node, 1, 2)
    _link(we, second, 2, "old")
    we.do(held.hold_moves, 2)
    we.do(held.begin, "old", _pull, 2, 1)
    assert we.do(held.inside, 1)
    _link(we, second, 2, "new")
    we.do(held.hold_moves, 2)
    we.do(held.begin, "new", _pull, 2, 2)
    assert we.do(held.inside, 2)
    we.do(held.let_go)
    assert [we.do(held.outcome, name) for name in ("old", "new")] == ["OK", "OK"]


def test_an_owner_does_what_it_likes_while_it_is_pulled_from(start_node: Start) -> None:
    we, second, third = _start(start_node, 1, 2, 3, push=False)
    _link(we, second, 2)
    _link(we, third, 3)
    second.do(held.hold_moves, 1)
    second.do(held.begin, "pull", _pull_slot, 1)
    assert second.do(held.inside, 1)
    for name, (beside, arguments) in BESIDE.items():
        if beside in (_push, _send_layers):
            continue
        if beside is _link_and_unlink:
            third.begin(_link_and_unlink)
        we.do(held.begin, name, beside, *arguments)
        assert we.do(held.outcome, name) == "OK", name
    third.result()
    assert second.do(held.running, "pull")
    second.do(held.let_go)
    assert second.do(held.outcome, "pull") == "OK"


def test_clusters_are_linked_all_at_once(start_node: Start, free_ports: Ports) -> None:
    """One that does not answer holds up none of the others, before or behind it in the list."""
    ports = free_ports(3)
    servers = [
        start_node(10 + i, listen_ip_info=f"127.0.0.1:{port}", local_comm_res="", pool=1 << 20)
        for i, port in enumerate(ports)
    ]
    client = start_node(1, local_comm_res="")
    servers[1].pause()
    wanted = [(10 + i, port) for i, port in enumerate(ports)]
    client.do(held.begin, "link", _link_all, wanted)
    for cluster in (10, 12):
        assert client.do(_becomes_linked, cluster)
    assert client.do(held.running, "link")
    servers[1].resume()
    assert client.do(held.outcome, "link") == "OK"


def _link_all(here: nodes.Here, wanted: list[tuple[int, int]]) -> None:
    result, results = nodes.link_clusters(here, wanted, 60_000)
    assert result == "LLM_SUCCESS", results


def _becomes_linked(here: nodes.Here, cluster: int) -> bool:
    deadline = time.monotonic() + held.SECONDS
    engine = here.live._engine
    assert engine is not None
    while time.monotonic() < deadline:
        linked = [d for d in engine._all_domains() if cluster in d.others]
        if any(domain.status.name == "OK" for domain in linked):
            return True
        time.sleep(0.001)
    return False
