"""Checksums per transfer: corruption of every kind that a transport could cause is found."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from datadist import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
)
from tests import nodes
from tests.nodes import MIB, Node, RemoteError, pattern

Start = Callable[..., Node]
WIDTH, TENSORS = 40, 4


def _init(here: nodes.Here, cluster: int, one_sided: bool = False, timeout: int = 60_000) -> None:
    config = LLMConfig()
    config.enable_cache_manager = True
    config.transfer_backend = "shm"
    config.sync_kv_timeout = timeout
    config.enable_remote_cache_accessible = one_sided
    config.mem_pool_cfg = f'{{"memory_size": {4 * MIB}, "page_shift": 12}}'
    here.engine = LLMDataDist(LLMRole.MIX, cluster)
    here.engine.init({**config.generate_options(), "datadist.checksum": "1"})


def _pair(
    start: Start, memory: str = "pool", one_sided: bool = False, timeout: int = 60_000
) -> tuple[Node, Node]:
    owner, mover = start(), start()
    owner.do(_init, 1, one_sided)
    mover.do(_init, 2, one_sided, timeout)
    keys = [CacheKey(1, 5), CacheKey(1, 6)] if memory == "pool" else None
    owner.do(nodes.make, "c", "cache", [2, WIDTH], TENSORS, keys, memory)
    mover.do(nodes.make, "c", "cache", [2, WIDTH], TENSORS, None, memory)
    owner.do(nodes.fill, "c", 1)
    nodes.link_pair(owner, mover)
    return owner, mover


def _corrupt(here: nodes.Here, how: str) -> None:
    """From now on the transport harms what it moves."""
    from datadist_shm.link import ShmLink

    for name in ("read", "write"):
        good = getattr(ShmLink, name)

        def bad(
            self: Any,
            rank: int,
            local: Any,
            remote: Any,
            length: Any,
            timeout: float,
            _good: Any = good,
        ) -> None:
            if how == "leaves out the last byte":
                length = np.array(length, np.int64)
                length[-1] -= 1
            elif how == "swaps two pieces":
                local = np.array(local, np.int64)
                local[[0, 1]] = local[[1, 0]]
            elif how == "moves nothing":
                return
            _good(self, rank, local, remote, length, timeout)

        setattr(ShmLink, name, bad)


@pytest.mark.parametrize("memory", ["pool", "numpy"])
def test_good_transfers_pass(start_node: Start, memory: str) -> None:
    _owner, puller = _pair(start_node, memory)
    puller.do(nodes.pull_cache, CacheKeyByIdAndIndex(1, 1, 1), "c", 0)
    for index, array in enumerate(puller.do(nodes.read, "c")):
        np.testing.assert_array_equal(array[0], pattern(1, index, (2, WIDTH))[1])


def test_a_cache_that_only_its_key_keeps(start_node: Start) -> None:
    owner, puller = _pair(start_node)
    owner.do(nodes.deallocate, "c")
    puller.do(nodes.pull_cache, CacheKey(1, 5), "c")
    with pytest.raises(RemoteError) as error:
        puller.do(nodes.pull_cache, CacheKey(1, 5), "c")
    assert error.value.status == "LLM_KV_CACHE_NOT_EXIST"


@pytest.mark.parametrize("how", ["leaves out the last byte", "swaps two pieces", "moves nothing"])
@pytest.mark.parametrize("push", [False, True])
def test_corruption_is_found(start_node: Start, how: str, push: bool) -> None:
    _owner, mover = _pair(start_node, one_sided=push)
    mover.do(nodes.fill, "c", 2)
    mover.do(_corrupt, how)
    with pytest.raises(RemoteError, match="bytes differ") as error:
        mover.do(nodes.push_cache if push else nodes.pull_cache, CacheKeyByIdAndIndex(1, 1, 0), "c")
    assert error.value.status == "LLM_FAILED"
    assert mover.do(nodes.log_of, "ERROR checksums")


def test_a_pull_that_was_corrupted_does_not_consume_the_key(start_node: Start) -> None:
    _owner, puller = _pair(start_node)
    puller.do(_corrupt, "moves nothing")
    for _ in range(2):
        with pytest.raises(RemoteError, match="bytes differ"):
            puller.do(nodes.pull_cache, CacheKey(1, 5), "c")


def test_an_owner_that_is_stopped_cannot_verify(start_node: Start) -> None:
    owner, puller = _pair(start_node)
    owner.pause()
    with pytest.raises(RemoteError, match="not verified") as error:
        puller.do(nodes.pull_cache, CacheKeyByIdAndIndex(1, 1, 0), "c", timeout_in_millis=3000)
    assert error.value.status == "LLM_TIMEOUT"
    owner.resume()
    puller.do(nodes.pull_cache, CacheKeyByIdAndIndex(1, 1, 0), "c")


def _kill_once_asked(here: nodes.Here, pid: int) -> None:
    """The owner ends while this engine, which has asked it, computes its own checksum."""
    verification = here.live._live(LLMStatusCode.LLM_FAILED).verification
    checksum = verification._checksum

    def killing(*args: Any) -> int:
        os.kill(pid, signal.SIGKILL)
        return checksum(*args)

    verification._checksum = killing  # type: ignore[method-assign,assignment]


def test_an_owner_that_dies_meanwhile_is_not_waited_for(start_node: Start) -> None:
    owner, puller = _pair(start_node, timeout=300_000)
    owner.pause()
    puller.do(_kill_once_asked, owner.pid)
    with pytest.raises(RemoteError, match="is gone: the transfer is not verified") as error:
        puller.do(nodes.pull_cache, CacheKeyByIdAndIndex(1, 1, 0), "c")
    assert error.value.status == "LLM_NOT_YET_LINK"


MANY = 100_001
"""One segment more than what is asked for in one message."""


def _pull_scattered(here: nodes.Here) -> None:
    """In an order that makes a segment of each block."""
    nodes.pull_blocks(here, BlocksCacheKey(1), "b", np.arange(MANY), np.arange(MANY)[::-1])


def _count_requests(here: nodes.Here) -> None:
    from datadist.transfers.verify import Verification

    on_verify, sizes = Verification.on_verify, here.any.setdefault("sizes", [])

    def counted(self: Any, view: Any, message: Any) -> None:
        sizes.append(len(message.length) // 8)
        on_verify(self, view, message)

    Verification.on_verify = counted  # type: ignore[method-assign]


def _requests(here: nodes.Here) -> list[int]:
    return list(here.any["sizes"])


def test_every_segment_of_many_is_compared(start_node: Start) -> None:
    owner, puller = start_node(), start_node()
    for cluster, node in enumerate((owner, puller), 1):
        node.do(_count_requests)
        node.do(_init, cluster, timeout=600_000)
        node.do(nodes.make, "b", "blocks", [MANY, 1], 1, BlocksCacheKey(cluster))
    owner.do(nodes.fill, "b", 1)
    nodes.link_pair(owner, puller)
    puller.do(_pull_scattered, timeout=600)
    (moved,) = puller.do(nodes.read, "b")
    np.testing.assert_array_equal(moved[::-1], pattern(1, 0, (MANY, 1)))
    assert owner.do(_requests) == [MANY - 1, 1]
    puller.do(nodes.clear, "b")
    puller.do(_corrupt, "leaves out the last byte")
    with pytest.raises(RemoteError, match="the 4 bytes differ"):
        puller.do(_pull_scattered, timeout=600)


def _in_small_pieces(here: nodes.Here) -> None:
    from datadist.transfers import verify

    verify.PIECE = 7


def test_pieces_of_a_checksum_do_not_matter(start_node: Start) -> None:
    owner, puller = _pair(start_node)
    owner.do(_in_small_pieces)
    key = CacheKeyByIdAndIndex(1, 1, 1)
    puller.do(nodes.pull_cache, key, "c", 0)
    puller.do(_in_small_pieces)  # at both ends from now on
    puller.do(nodes.pull_cache, key, "c", 0)
    puller.do(nodes.clear, "c")
    puller.do(_corrupt, "leaves out the last byte")
    with pytest.raises(RemoteError, match="bytes differ"):
        puller.do(nodes.pull_cache, key, "c", 0)


def _ask(here: nodes.Here, address: int, size: int) -> Any:
    """Ask the peer for the checksum of any memory."""
    from datadist.transfers.plan import Segments
    from datadist.transfers.resolve import Route

    engine = here.live._engine
    assert engine is not None
    view = next(iter(engine.views.values()))
    own = here.arrays["c"][0].ctypes.data
    local, remote, length = (np.array([n], np.int64) for n in (own, address, size))
    route = Route(None, None, 0, view)  # type: ignore[arg-type]
    engine.verification.compare(route, Segments(local, remote, length, size), time.monotonic() + 60)


@pytest.mark.parametrize("address", [8, -8, 1 << 62, (1 << 63) - 1])
def test_memory_that_is_no_cache_is_not_read(start_node: Start, address: int) -> None:
    owner, puller = _pair(start_node)
    with pytest.raises(RemoteError, match="not inside one tensor") as error:
        puller.do(_ask, address, 8)
    assert error.value.status == "LLM_PARAM_INVALID"
    assert owner.do(nodes.read, "c")


def test_the_option_is_checked() -> None:
    from datadist import LLMException

    engine = LLMDataDist(LLMRole.MIX, 1)
    with pytest.raises(LLMException, match=r"datadist\.checksum"):
        engine.init({"llm.EnableCacheManager": "1", "datadist.checksum": "yes"})
