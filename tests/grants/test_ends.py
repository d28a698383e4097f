"""How grants end: consumed, released, revoked, lapsed, replaced, with the cache, with the engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from datadist import CacheKey
from tests import nodes
from tests.grants import world as grants
from tests.grants.world import GONE, GRANTED, LONG, Start, check, failed, linked
from tests.nodes import RemoteError

MODES = [
    pytest.param("pool", {}, id="pool"),
    pytest.param("numpy", {}, id="registered"),
    pytest.param("pool", {"enable_remote_cache_accessible": True}, id="one-sided-pool"),
    pytest.param("numpy", {"enable_remote_cache_accessible": True}, id="one-sided-registered"),
]


@pytest.mark.parametrize(("memory", "settings"), MODES)
def test_the_pull_of_all_consumes(start_node: Start, memory: str, settings: dict[str, Any]) -> None:
    owner, reader = linked(start_node, memory=memory, **settings)
    owner.do(grants.grant)
    reader.do(grants.pull)
    check(reader)
    assert owner.do(grants.wait) == "CONSUMED"
    assert owner.do(grants.ended, 1) == [(7, "CONSUMED")]
    owner.do(grants.reuse)
    assert failed(reader) == GONE


@pytest.mark.parametrize(("memory", "settings"), MODES)
def test_a_revoked_grant_is_not_read(
    start_node: Start, memory: str, settings: dict[str, Any]
) -> None:
    owner, reader = linked(start_node, memory=memory, **settings)
    token = owner.do(grants.grant)
    reader.do(grants.pull, [10], [1])  # the reader knows the grant from now on
    assert owner.do(grants.revoke) == "REVOKED"
    owner.do(grants.reuse)
    assert failed(reader) == GONE
    assert failed(reader, token=token) == GONE
    assert failed(reader, [10], [1]) == GONE
    assert owner.do(grants.revoke) == "REVOKED"
    assert owner.do(grants.ended, 1) == [(7, "REVOKED")]


def test_positions_are_those_of_the_grant(start_node: Start) -> None:
    owner, reader = linked(start_node)
    owner.do(grants.grant)
    reader.do(grants.pull, [8, 4], [3, 0])
    check(reader, [30, 5], [8, 4])
    assert owner.do(grants.state) == "GRANTED"
    reader.do(grants.pull, np.array([1, 2]), np.array([0, 1], np.uint8))
    check(reader, [30, 5, 5, 2], [8, 4, 1, 2])
    with pytest.raises(RemoteError) as raised:  # a block of the owner's cache, as a beginner has it
        reader.do(grants.pull, [0], [30])
    assert raised.value.status == "LLM_PARAM_INVALID"
    said = (
        "src_blocks[0] is 30: src_blocks are positions in the list of the grant, which has 4 blocks"
    )
    assert said in raised.value.text


def test_a_part_finishes_only_where_it_says_so(start_node: Start) -> None:
    owner, reader = linked(start_node)
    owner.do(grants.grant)
    for positions in ([0], [1, 2, 3], [2, 0, 1]):
        reader.do(grants.pull, positions, positions)
    half: dict[str, Any] = {"src_layer_range": range(1), "dst_layer_range": range(1)}
    reader.do(grants.pull, **half)
    reader.do(grants.settle)
    assert owner.do(grants.state) == "GRANTED"
    reader.do(grants.pull, [0], [3], release=True)
    assert owner.do(grants.wait) == "CONSUMED"


def test_all_blocks_in_another_order_are_all(start_node: Start) -> None:
    owner, reader = linked(start_node)
    owner.do(grants.grant)
    reader.do(grants.pull, [0, 1, 2, 3], [3, 2, 1, 0])
    check(reader, GRANTED[::-1])
    assert owner.do(grants.wait) == "CONSUMED"


@pytest.mark.parametrize("known", [False, True])
def test_a_reader_releases_without_reading(start_node: Start, known: bool) -> None:
    owner, reader = linked(start_node)
    token = owner.do(grants.grant)
    if known:
        reader.do(grants.pull, [0], [0])
    reader.do(grants.release)
    assert owner.do(grants.wait) == "CONSUMED"
    reader.do(grants.release)
    reader.do(grants.release, token=token)
    owner.do(grants.grant, req=8)
    reader.do(grants.release, 8, token=owner.do(grants.grant, req=8))
    assert owner.do(grants.wait, 8) == "CONSUMED"


def test_a_release_by_key_is_of_the_grant_that_the_key_names_by_then(start_node: Start) -> None:
    owner, reader = linked(start_node)
    old = owner.do(grants.grant)
    reader.do(grants.pull, [0], [0])  # the reader knows the grant from now on
    owner.do(grants.grant)
    reader.do(grants.release)
    assert owner.do(grants.wait) == "CONSUMED"
    owner.do(grants.grant)
    reader.do(grants.release, token=old)  # a token is of one grant
    reader.do(grants.settle)
    assert owner.do(grants.state) == "GRANTED"


def test_several_readers_each_count_once(start_node: Start) -> None:
    owner, one, two = linked(start_node, 2)
    token = owner.do(grants.grant, readers=2)
    for _ in range(3):
        one.do(grants.pull, token=token)
        one.do(grants.release)
        one.do(grants.release, token=token)
    one.do(grants.settle)
    assert owner.do(grants.state) == "GRANTED"
    two.do(grants.pull)
    check(two)
    assert owner.do(grants.wait) == "CONSUMED"
    assert failed(one) == failed(two, token=token) == GONE


def test_a_lease_lapses_and_can_be_renewed(start_node: Start) -> None:
    owner, reader = linked(start_node)
    token = owner.do(grants.grant, lease_millis=LONG)
    owner.do(grants.renew, millis=30)
    assert owner.do(grants.wait) == "LAPSED"
    owner.do(grants.reuse)
    assert failed(reader, token=token) == failed(reader) == GONE
    with pytest.raises(RemoteError, match="LAPSED") as caught:
        owner.do(grants.renew)
    assert caught.value.status == GONE


def test_leases_end_in_the_order_of_their_deadlines(start_node: Start) -> None:
    owner = start_node(1)
    grants.prepare(owner)
    for req, lease in [(1, 3900), (2, 3500), (3, 3700), (4, LONG)]:
        owner.do(grants.grant, req=req, lease_millis=lease)
    owner.do(grants.renew, 4, 3800)  # sooner
    owner.do(grants.renew, 2, 4100)  # later
    order = owner.do(grants.order)
    assert owner.do(grants.ended, 4) == [(req, "LAPSED") for req in order]


def test_granting_a_key_again_ends_the_earlier_grant(start_node: Start) -> None:
    owner, reader = linked(start_node)
    old = owner.do(grants.grant)
    reader.do(grants.pull, [0], [0])
    new = owner.do(grants.grant, [20, 21, 22])
    assert owner.do(grants.ended, 1) == [(7, "REVOKED")]
    owner.do(grants.reuse)
    assert failed(reader, token=old) == GONE
    reader.do(nodes.clear, "dst")
    reader.do(grants.pull, [0], [0])  # what the reader knows is old: it asks again
    check(reader, [20], [0])
    reader.do(grants.pull, [1, 2, 3], token=new)
    check(reader, [20, 20, 21, 22])
    assert owner.do(grants.wait) == "CONSUMED"


@pytest.mark.parametrize("memory", ["pool", "numpy"])
def test_the_end_of_a_cache_ends_its_grants(start_node: Start, memory: str) -> None:
    owner, reader = linked(start_node, memory=memory)
    tokens = [owner.do(grants.grant, req=req) for req in (7, 8)]
    reader.do(grants.pull, [0], [0])
    owner.do(nodes.unregister if memory == "numpy" else nodes.deallocate, "src")
    assert owner.do(grants.ended, 2) == [(7, "REVOKED"), (8, "REVOKED")]
    assert failed(reader) == GONE
    assert failed(reader, req=8, token=tokens[1]) == GONE


def test_finalize_ends_all(start_node: Start) -> None:
    owner, reader = linked(start_node)
    token = owner.do(grants.grant)
    owner.do(nodes.finalize)
    assert owner.do(grants.state) == "REVOKED"
    assert owner.do(grants.revoke) == "REVOKED"
    assert failed(reader, token=token) == "LLM_NOT_YET_LINK"
    with pytest.raises(RemoteError) as caught:
        owner.do(grants.renew)
    assert caught.value.status == "LLM_ENGINE_FINALIZED"


def test_a_key_names_a_grant_or_a_cache(start_node: Start) -> None:
    owner = start_node(1)
    grants.prepare(owner)
    owner.do(grants.grant)
    make = nodes.make, "slot", "cache", [1, 64], 2
    for memory in ("pool", "numpy"):
        with pytest.raises(RemoteError, match=r"req_id 7, model_id 0.* names a grant") as caught:
            owner.do(*make, [CacheKey(1, 7)], memory)
        assert caught.value.status == "LLM_PARAM_INVALID"
    owner.do(*make, [CacheKey(1, 8)])
    with pytest.raises(RemoteError, match=r"req_id 8, model_id 0.* is bound to cache") as caught:
        owner.do(grants.grant, req=8)
    assert caught.value.status == "LLM_PARAM_INVALID"
    owner.do(grants.revoke)
    owner.do(nodes.make, "other", "cache", [1, 64], 2, [CacheKey(1, 7)])
