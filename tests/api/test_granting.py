"""Arguments of the calls about grants, in their order, and the object that the owner has."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest

from datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    Grant,
    LLMException,
    Placement,
)
from datadist.api import grant as grant_module
from datadist.grants.granted import MAX_BLOCKS
from datadist.keys import INVALID_ID
from tests import nodes
from tests.grants import world as grants
from tests.nodes import Here, Node

Start = Callable[..., Node]
KEY = CacheKey(1, 7)
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"cache": 3}, "TypeError", "cache is a int"),
    ({"cache": None}, "TypeError", "cache is a NoneType"),
    ({"key": BlocksCacheKey(1)}, "TypeError", "key is a BlocksCacheKey"),
    ({"key": None}, "TypeError", "key is a NoneType"),
    ({"blocks": "12"}, "TypeError", "blocks is a str"),
    ({"blocks": [1.5]}, "TypeError", r"blocks\[0\] is a float"),
    ({"blocks": [True]}, "TypeError", r"blocks\[0\]"),
    ({"blocks": [-1]}, "TypeError", r"blocks\[0\] is -1"),
    ({"readers": -1}, "ValueError", "readers is -1"),
    ({"readers": True}, "TypeError", "readers is a bool"),
    ({"readers": 0}, "LLM_PARAM_INVALID", "readers is 0"),
    ({"lease_millis": 0}, "LLM_PARAM_INVALID", "lease_millis is 0"),
    ({"lease_millis": 1 << 32}, "ValueError", "lease_millis is 4294967296"),
    ({"lease_millis": 1.0}, "TypeError", "lease_millis is a float"),
    ({"blocks": []}, "LLM_PARAM_INVALID", "blocks has 0 entries"),
    ({"blocks": [0] * (MAX_BLOCKS + 1)}, "LLM_PARAM_INVALID", "blocks has 131073 entries"),
    ({"blocks": [3, 32]}, "LLM_PARAM_INVALID", r"blocks\[1\] is 32: the cache has 32 blocks"),
    ({"key": CacheKey(1, INVALID_ID)}, "LLM_PARAM_INVALID", "exactly one of req_id and prefix_id"),
    ({"key": CacheKey(1, 1, 0, 2)}, "LLM_PARAM_INVALID", "exactly one of req_id and prefix_id"),
    ({"cache": "slots"}, "LLM_PARAM_INVALID", "only blocks can be granted"),
    ({"cache": "freed"}, "LLM_KV_CACHE_NOT_EXIST", "does not exist in this engine"),
    ({"cache": "cpu"}, "LLM_KV_CACHE_NOT_EXIST", "does not exist in this engine"),
    ({"reader": 1}, "TypeError", "did you mean 'readers'"),
]


def _prepare(here: Here) -> None:
    desc = CacheDesc(2, [4, 8], DataType.DT_INT32, Placement.HOST)
    memory = [np.zeros((4, 8), np.int32) for _ in range(2)]
    here.any["memory"] = memory
    here.caches["cpu"] = Cache.create_cpu_cache(desc, [int(m.ctypes.data) for m in memory])
    nodes.make(here, "slots", "cache", [4, 8], 2)
    nodes.make(here, "freed", "blocks", [4, 8], 2)
    here.live.cache_manager.deallocate_blocks_cache(here.caches["freed"])


def _try(here: Here, changes: dict[str, Any]) -> tuple[str, str]:
    """What granting raises: the code or the type, and the text."""
    given: dict[str, Any] = {
        "cache": here.caches["src"], "key": KEY, "blocks": [1, 2], **changes
    }  # fmt: skip
    if isinstance(given["cache"], str):
        given["cache"] = here.caches[given["cache"]]
    manager = here.live.cache_manager
    try:
        manager.grant_blocks(given.pop("cache"), given.pop("key"), given.pop("blocks"), **given)
    except LLMException as error:
        return error.status_code.name, str(error)
    except (TypeError, ValueError) as error:
        return type(error).__name__, str(error)
    return "", ""


def test_wrong_arguments_grant_nothing(start_node: Start) -> None:
    node = start_node(1)
    grants.prepare(node)
    node.do(_prepare)
    for changes, kind, text in WRONG:
        got, said = node.do(_try, changes)
        assert got == kind, (changes, said)
        assert re.search(text, said), said
    assert node.do(_live) == 0
    for key in (CacheKey(1, INVALID_ID, 0, 5), CacheKey(9, 1), CacheKey(1, 7, 3)):
        assert node.do(_try, {"key": key, "blocks": np.array([31, 0], np.uint16)}) == ("", "")
    assert node.do(_live) == 3


def _live(here: Here) -> int:
    engine = here.live._engine
    assert engine is not None
    return len(engine.grants)


def test_a_cache_that_peers_do_not_reach_is_not_granted(start_node: Start) -> None:
    node = start_node(1, pool=0, enable_remote_cache_accessible=True)
    grants.prepare(node, memory="numpy", remote_accessible=False)
    assert node.do(_try, {})[0] == "LLM_PARAM_INVALID"


READING: list[tuple[dict[str, Any], str, str]] = [
    ({"token": "x"}, "TypeError", "token is a str"),
    ({"release": 1}, "TypeError", "release is a int"),
    ({"token": b"x"}, "LLM_PARAM_INVALID", "these 1 bytes are no token of a grant"),
    ({"key": BlocksCacheKey(1), "release": True}, "LLM_PARAM_INVALID", "only a CacheKey names"),
    ({"key": CacheKeyByIdAndIndex(1, 1), "token": b""}, "LLM_PARAM_INVALID", "only a CacheKey"),
    ({"key": CacheKey(1, 8), "token": "of 7"}, "LLM_PARAM_INVALID", "req_id 7.*names.*req_id 8"),
    ({"key": CacheKey(3, 7), "token": "of 7"}, "LLM_PARAM_INVALID", "names cluster 3"),
    ({"key": CacheKey(1, INVALID_ID), "release": True}, "LLM_PARAM_INVALID", "exactly one of"),
    ({"dst": []}, "LLM_PARAM_INVALID", "dst_blocks is empty"),
    ({"dst": [1, 1, 2, 3]}, "LLM_PARAM_INVALID", r"dst_blocks\[1\] is 1, and so is"),
    ({"dst": [1, 2, 3]}, "LLM_PARAM_INVALID", "dst_blocks has 3 entries, and 4 of the 4 granted"),
    ({"src": [0, 1], "dst": [1]}, "LLM_PARAM_INVALID", "dst_blocks has 1 entries, and 2 of the 4"),
    ({"src": [4], "dst": [1]}, "LLM_PARAM_INVALID", r"src_blocks\[0\] is 4"),
    ({"src": [-1], "dst": [1]}, "TypeError", r"src_blocks\[0\] is -1"),
    ({"key": CacheKey(2, 7), "token": "own"}, "LLM_PARAM_INVALID", "cluster 2, which is this"),
    ({"key": CacheKey(1, 9)}, "LLM_KV_CACHE_NOT_EXIST", "no cache for req_id 9"),
    (
        {"key": CacheKey(1, 9), "src": [0, 1, 2, 3]},
        "LLM_KV_CACHE_NOT_EXIST",
        "no grant of that key",
    ),
    ({"key": CacheKey(5, 9), "src": [0]}, "LLM_PARAM_INVALID", "src_blocks must be empty"),
    ({"key": CacheKey(5, 9), "release": True}, "LLM_NOT_YET_LINK", "cluster 5 is not linked"),
]


def _read(here: Here, given: dict[str, Any], tokens: dict[str, bytes]) -> tuple[str, str]:
    given = {"key": KEY, "src": (), "dst": [0, 1, 2, 3], **given}
    key, src, dst = (given.pop(name) for name in ("key", "src", "dst"))
    if given.get("token") in tokens:
        given["token"] = tokens[given["token"]]
    try:
        here.live.cache_manager.pull_blocks(key, here.caches["dst"], src, dst, **given)
    except LLMException as error:
        return error.status_code.name, str(error)
    except (TypeError, ValueError) as error:
        return type(error).__name__, str(error)
    return "", ""


def test_wrong_pulls_of_grants_move_nothing(start_node: Start) -> None:
    owner, reader = grants.linked(start_node)
    tokens = {"of 7": owner.do(grants.grant)}
    reader.do(nodes.make, "src", "blocks", grants.SHAPE, grants.TENSORS)
    tokens["own"] = reader.do(_grant_own)
    for given, kind, text in READING:
        got, said = reader.do(_read, given, tokens)
        assert got == kind, (given, said)
        assert re.search(text, said), said
    grants.check(reader, [], [])
    assert owner.do(grants.state) == "GRANTED"
    assert reader.do(_read, {"token": "of 7"}, tokens) == ("", "")


def _grant_own(here: Here) -> bytes:
    manager = here.live.cache_manager
    return manager.grant_blocks(here.caches["src"], CacheKey(2, 7), [1]).token


def _objects(here: Here) -> None:
    manager, cache = here.live.cache_manager, here.caches["src"]
    grant = manager.grant_blocks(cache, KEY, np.array([3, 1, 2]), lease_millis=60_000)
    assert isinstance(grant, Grant)
    assert (grant.key, grant.cache, grant.blocks) == (KEY, cache, [3, 1, 2])
    assert repr(grant) == f"Grant({KEY!r}, 3 blocks, GRANTED)"
    assert isinstance(grant.token, bytes)
    assert grant.wait(1).name == "GRANTED"
    for wrong in (-1, 1.5, True):
        with pytest.raises((TypeError, ValueError)):
            grant.wait(wrong)  # type: ignore[arg-type]
        with pytest.raises((TypeError, ValueError)):
            grant.renew(wrong)  # type: ignore[arg-type]
    with pytest.raises(LLMException, match="lease_millis is 0"):
        grant.renew(0)
    grant.renew()
    assert manager.ended_grants() == []
    assert grant.revoke().name == grant.wait().name == "REVOKED"
    assert manager.ended_grants() == [grant]
    assert manager.ended_grants() == []
    with pytest.raises(AttributeError):
        grant.leases = 3  # type: ignore[attr-defined]


def test_the_object_of_the_owner(start_node: Start) -> None:
    node = start_node(1)
    grants.prepare(node)
    node.do(_objects)


def _in_child(here: Here) -> list[str]:
    """What a forked child gets of the grants of its parent."""
    grant = grants.grant_of(here)
    manager = here.live.cache_manager
    here_end, there = os.pipe()
    child = os.fork()
    if child == 0:
        codes = []
        for call in (
            grant.revoke,
            grant.wait,
            grant.renew,
            lambda: grant.token,
            manager.ended_grants,
        ):
            try:
                call()
                codes.append("nothing")
            except LLMException as error:
                codes.append(error.status_code.name)
        os.write(there, ",".join(codes).encode())
        os._exit(0)
    os.close(there)
    os.waitpid(child, 0)
    with os.fdopen(here_end) as file:
        return file.read().split(",")


def test_a_forked_child_ends_no_grant(start_node: Start) -> None:
    node = start_node(1)
    grants.prepare(node)
    node.do(grants.grant)
    assert node.do(_in_child) == ["LLM_ENGINE_FINALIZED"] * 5
    assert node.do(grants.state) == "GRANTED"
    assert node.do(grants.revoke) == "REVOKED"


def _pull_positions(here: Here) -> str:
    with pytest.raises(LLMException) as caught:
        here.live.cache_manager.pull_blocks(KEY, here.caches["dst"], [0], [0])
    return str(caught.value)


def test_positions_of_a_grant_need_a_link(start_node: Start) -> None:
    reader = start_node(2)
    reader.do(nodes.make, "dst", "blocks", grants.SHAPE, 2)
    assert "the key names no grant of a linked cluster" in reader.do(_pull_positions)


def _revoke_beside_a_stuck_finalize(here: Here) -> tuple[str, str]:
    engine = here.live._engine
    assert engine is not None
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        go_on.wait(60)

    state = engine.owned.state
    calls = (lambda: state.run(hold)), here.live.finalize
    threads = [threading.Thread(target=each) for each in calls]
    threads[0].start()
    held.wait(60)
    threads[1].start()
    while not engine.over:
        time.sleep(0.001)
    try:
        with mock.patch.object(grant_module, "END_SECONDS", 0.01), pytest.raises(LLMException) as e:
            grants.revoke(here)
    finally:
        go_on.set()
    for thread in threads:
        thread.join(60)
    return f"{e.value.status_code.name}: {e.value}", grants.revoke(here)


def test_a_grant_that_finalize_does_not_come_to_is_not_said_to_have_ended(
    start_node: Start,
) -> None:
    owner = start_node(1)
    grants.prepare(owner)
    owner.do(grants.grant)
    text, later = owner.do(_revoke_beside_a_stuck_finalize)
    assert text.startswith("LLM_FAILED: finalize did not end the grant of CacheKey(")
    assert later == "REVOKED"
