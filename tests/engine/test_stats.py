"""Counters per link, as numbers and as Prometheus metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from datadist import BlocksCacheKey, CacheKeyByIdAndIndex, LLMDataDist, LLMRole
from tests import core_ways, nodes
from tests.nodes import Node, RemoteError

Start = Callable[..., Node]
TENSORS, WIDTH = 4, 40
SLOT_BYTES = TENSORS * WIDTH * 4


def _pair(start: Start, **settings: Any) -> tuple[Node, Node, int]:
    owner, puller = start(1, **settings), start(2, **settings)
    owner.do(nodes.make, "c", "cache", [3, WIDTH], TENSORS)
    puller.do(nodes.make, "c", "cache", [3, WIDTH], TENSORS)
    _, comm_id = nodes.link_pair(owner, puller)
    return owner, puller, comm_id


def _stats(here: nodes.Here) -> dict[str, Any]:
    return here.live.stats()


def test_pulls_are_counted_where_they_begin(start_node: Start) -> None:
    owner, puller, comm_id = _pair(start_node)
    for _ in range(3):
        puller.do(nodes.pull_cache, CacheKeyByIdAndIndex(1, 1, 1), "c")
    stats = puller.do(_stats)
    assert stats["cluster_id"] == 2
    assert stats["backend"] == "shm"
    (link,) = stats["links"]
    about = {name: link[name] for name in ("comm_id", "name", "cluster_id", "rank", "status")}
    assert about == {
        "comm_id": comm_id, "name": "pair", "cluster_id": 1, "rank": 0, "status": "OK",
    }  # fmt: skip
    assert link["error"] is None
    seconds = link["pull"].pop("seconds")
    assert 0 < seconds < 15, "three pulls of at most 5 s each"
    assert link["pull"] == {"operations": 3, "bytes": 3 * SLOT_BYTES, "errors": 0}
    assert link["push"] == {"operations": 0, "bytes": 0, "errors": 0, "seconds": 0.0}
    assert owner.do(_stats)["links"][0]["pull"]["operations"] == 0
    puller.do(nodes.unlink, comm_id)
    after = puller.do(_stats)
    assert after["links"] == []
    assert after["total"]["pull"]["bytes"] == 3 * SLOT_BYTES


@pytest.mark.parametrize("what", ["slot", "blocks"])
def test_every_pull_counts_what_it_moved(start_node: Start, what: str) -> None:
    owner, puller, _ = _pair(start_node)
    _make_blocks(owner, puller)
    for count in (1, 2, 3):  # blocks: the first pull goes another way than later ones
        before = puller.do(_stats)["links"][0]["pull"]
        puller.do(_pull, what, count)
        after = puller.do(_stats)["links"][0]["pull"]
        moved = SLOT_BYTES * (1 if what == "slot" else count)
        assert after["bytes"] - before["bytes"] == moved
        assert after["operations"] - before["operations"] == 1
        assert after["errors"] == 0
        assert after["seconds"] > before["seconds"]


def _make_blocks(owner: Node, puller: Node) -> None:
    owner.do(nodes.make, "b", "blocks", [3, WIDTH], TENSORS, BlocksCacheKey(1))
    puller.do(nodes.make, "b", "blocks", [3, WIDTH], TENSORS)


def _pull(here: nodes.Here, what: str, count: int = 1) -> None:
    blocks = list(range(count))
    if what == "slot":
        nodes.pull_cache(here, CacheKeyByIdAndIndex(1, 1, 1), "c")
    else:
        nodes.pull_blocks(here, BlocksCacheKey(1), "b", blocks, blocks)


def test_pushes_and_what_the_pools_hold(start_node: Start) -> None:
    owner, pusher, _ = _pair(start_node, enable_remote_cache_accessible=True)
    owner.do(nodes.make, "b", "blocks", [2, WIDTH], TENSORS, BlocksCacheKey(1, 7))
    pusher.do(nodes.make, "b", "blocks", [2, WIDTH], TENSORS)
    pusher.do(nodes.push_cache, CacheKeyByIdAndIndex(1, 1, 1), "c")
    stats = pusher.do(_stats)
    assert stats["links"][0]["push"]["bytes"] == SLOT_BYTES
    assert stats["total"]["push"]["operations"] == 1
    pool = stats["pools"]["DEVICE"]
    assert pool["page_bytes"] == 4096
    assert pool["pages_used"] == 2 * TENSORS
    assert pool["pages_used"] + pool["pages_free"] == 8 * nodes.MIB // 4096
    assert pool["allocations_returning"] == 0


def test_a_lost_peer_is_named(start_node: Start) -> None:
    owner, puller, _ = _pair(start_node)
    owner.kill()
    assert "cluster 1 is gone" in puller.do(_wait_until_broken)
    with pytest.raises(RemoteError):
        puller.do(nodes.pull_cache, CacheKeyByIdAndIndex(1, 1, 1), "c")


def _wait_until_broken(here: nodes.Here) -> str:
    for _ in range(1000):
        error = here.live.stats()["links"][0]["error"]
        if error is not None:
            return str(error)
        time.sleep(0.01)
    return "still whole"


def _time_out(here: nodes.Here, what: str) -> dict[str, Any]:
    from datadist_shm.link import ShmLink

    from datadist.transport import TransferTimeout

    def read(*_args: object) -> None:
        raise TransferTimeout("made by the test", link_usable=True)

    core_ways.take(here)
    original, ShmLink.read = ShmLink.read, read  # type: ignore[method-assign,assignment]
    try:
        _pull(here, what)
    except Exception:
        return here.live.stats()
    finally:
        ShmLink.read = original  # type: ignore[method-assign]
    raise AssertionError("the pull should have failed")


@pytest.mark.parametrize("what", ["slot", "blocks"])
@pytest.mark.parametrize("earlier", [0, 2])
def test_failed_transfers_count_as_errors_without_bytes(
    start_node: Start, what: str, earlier: int
) -> None:
    owner, puller, _ = _pair(start_node)
    _make_blocks(owner, puller)
    for _ in range(earlier):
        puller.do(_pull, what)
    before = puller.do(_stats)["total"]["pull"]
    stats = puller.do(_time_out, what)
    for where in (stats["links"][0], stats["total"]):
        assert where["pull"]["errors"] == 1
        assert where["pull"]["operations"] == before["operations"] == earlier
        assert where["pull"]["bytes"] == before["bytes"]


def test_before_init() -> None:
    with pytest.raises(RuntimeError, match="not initialized"):
        LLMDataDist(LLMRole.PROMPT, 1).stats()


def _metrics(here: nodes.Here) -> dict[str, float]:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.parser import text_string_to_metric_families

    from datadist.metrics import StatsCollector

    registry = CollectorRegistry()
    registry.register(StatsCollector(here.live))
    text = generate_latest(registry).decode()
    return {
        f"{s.name}{sorted(s.labels.items())}": s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_prometheus_metrics(start_node: Start) -> None:
    pytest.importorskip("prometheus_client", reason="needs the extra metrics")
    _owner, puller, _ = _pair(start_node)
    puller.do(nodes.pull_cache, CacheKeyByIdAndIndex(1, 1, 1), "c")
    samples = puller.do(_metrics)
    own = [("backend", "shm"), ("cluster", "2")]
    pull = sorted([*own, ("direction", "pull")])
    assert samples[f"datadist_transfer_bytes_total{pull}"] == SLOT_BYTES
    link = sorted([*pull, ("link", "pair"), ("peer", "1")])
    assert samples[f"datadist_link_operations_total{link}"] == 1
    assert samples[f"datadist_links{sorted([*own, ('state', 'OK')])}"] == 1
    used = samples[f"datadist_pool_used_bytes{sorted([*own, ('placement', 'DEVICE')])}"]
    assert used == TENSORS * 4096
    puller.do(nodes.finalize)
    assert puller.do(_metrics) == {}
