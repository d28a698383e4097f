"""What a transport raises, as a program sees it (LLM-DataDist API, mapping of transport failures)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from datadist import CacheDesc, CacheKeyByIdAndIndex, DataType
from datadist.transport import (
    AddressError,
    PeerLost,
    RegistrationError,
    TransferError,
    TransferTimeout,
    TransportError,
    Unsupported,
)
from tests import nodes
from tests.nodes import Here, Node, RemoteError

Start = Callable[..., Node]


class Unheard(Exception):
    """Not an error of the interface."""


Make = Callable[[], Exception]
"""Makes an error in the node, because not all of them can be pickled."""

PASSING: list[tuple[Make, str]] = [
    (partial(AddressError, "injected"), "LLM_PARAM_INVALID"),
    (partial(Unsupported, "injected"), "LLM_FEATURE_NOT_ENABLED"),
    (partial(TransportError, "injected"), "LLM_FAILED"),
    (partial(RegistrationError, "injected"), "LLM_FAILED"),
    (partial(Unheard, "injected"), "LLM_FAILED"),
    (partial(TransferTimeout, "injected", link_usable=True), "LLM_TIMEOUT"),
    (partial(TransferError, "injected", link_usable=True), "LLM_FAILED"),
]
BREAKING: list[tuple[Make, str]] = [
    (partial(TransferTimeout, "injected"), "LLM_TIMEOUT"),
    (partial(TransferError, "injected"), "LLM_FAILED"),
    (partial(PeerLost, "injected", 1), "LLM_FAILED"),
]


def _raise(here: Here, where: str, error: Make | None) -> None:
    """Let a method of the transport's links raise; None puts it right again."""
    from datadist_shm.link import ShmLink

    original = here.any.setdefault(where, getattr(ShmLink, where))

    def fail(*_: Any, **__: Any) -> None:
        assert error is not None
        raise error()

    setattr(ShmLink, where, original if error is None else fail)


def _linked(start: Start) -> Node:
    """Cluster 1, linked with cluster 2, where a cache of id 1 is at either end."""
    caller, owner = (start(n, enable_remote_cache_accessible=True) for n in (1, 2))
    for node in (caller, owner):
        node.do(nodes.make, "cache", "cache", [2, 10])
    _link(caller, owner)
    return caller


def _link(caller: Node, owner: Node) -> int:
    owner.begin(nodes.link_and_wait, "pair", {1: 0, 2: 1})
    comm_id = caller.do(nodes.link_and_wait, "pair", {1: 0, 2: 1})
    owner.result()
    return int(comm_id)


KEY = CacheKeyByIdAndIndex(2, 1)


@pytest.mark.parametrize("write", [False, True])
def test_failing_transfers_have_the_documented_status(start_node: Start, write: bool) -> None:
    caller = _linked(start_node)
    where, transfer = ("write", nodes.push_cache) if write else ("read", nodes.pull_cache)
    for error, status in PASSING:
        caller.do(_raise, where, error)
        with pytest.raises(RemoteError, match="injected") as caught:
            caller.do(transfer, KEY, "cache")
        assert caught.value.status == status, error
        caller.do(_raise, where, None)
        caller.do(transfer, KEY, "cache")
    log = caller.do(nodes.log_of, "ERROR")
    assert [line for line in log if "defect of transport datadist_shm.link.ShmLink" in line]


@pytest.mark.parametrize(("error", "status"), BREAKING)
def test_a_link_that_is_not_usable_any_more_says_so(
    start_node: Start, error: Make, status: str
) -> None:
    caller = _linked(start_node)
    caller.do(_raise, "read", error)
    with pytest.raises(RemoteError, match="injected; unlink and link again") as caught:
        caller.do(nodes.pull_cache, KEY, "cache")
    assert caught.value.status == status
    caller.do(_raise, "read", None)
    with pytest.raises(RemoteError, match="injected") as caught:
        caller.do(nodes.pull_cache, KEY, "cache")
    assert caught.value.status == "LLM_NOT_YET_LINK"


def test_a_link_that_does_not_close_is_unlinked_all_the_same(start_node: Start) -> None:
    caller = _linked(start_node)
    caller.do(_raise, "close", partial(TransportError, "injected"))
    with pytest.raises(RemoteError, match="is unlinked, but closing it failed: injected") as caught:
        caller.do(nodes.unlink, 1)
    assert caught.value.status == "LLM_UNLINK_FAILED"
    caller.do(_raise, "close", None)
    with pytest.raises(RemoteError) as caught:
        caller.do(nodes.unlink, 1)
    assert caught.value.status == "LLM_NOT_YET_LINK"


def _copy(here: Here) -> None:
    from datadist_shm import ShmTransport

    def fail(*_: Any) -> None:
        raise TransportError("injected")

    ShmTransport.copy = fail  # type: ignore[assignment, method-assign]
    manager = here.live.cache_manager
    cache = manager.allocate_cache(CacheDesc(2, [2, 10], DataType.DT_INT32))
    manager.copy_cache(cache, cache, 0, 1)


def test_failing_copies_are_failed(start_node: Start) -> None:
    node = start_node(1)
    with pytest.raises(RemoteError, match="injected") as caught:
        node.do(_copy)
    assert caught.value.status == "LLM_FAILED"
