"""What a transport raises, as a program sees it (LLM-DataDist API, mapping of transport failures)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datadist_shm import ShmTransport

from datadist import (
    Cache,
    CacheDesc,
    CacheKeyByIdAndIndex,
    DataType,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
)
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
    return nodes.link_pair(owner, caller)[1]


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
    ok, broken = caller.do(_events)
    assert (ok[0], broken[0], broken[1]) == ("OK", "BROKEN", (2,))
    assert "injected" in broken[2]


def _events(here: Here) -> list[Any]:
    events = here.live.link_events()
    return [(event.kind.name, event.cluster_ids, event.reason) for event in events]


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


def _register(engine: LLMDataDist) -> Cache:
    array = np.zeros(4096, np.int8)
    desc = CacheDesc(1, [1, 4096], DataType.DT_INT8, Placement.HOST)
    return engine.cache_manager.register_cache(desc, [array.ctypes.data])


def _copy_slot(engine: LLMDataDist) -> None:
    cache = engine.cache_manager.allocate_cache(CacheDesc(2, [2, 10], DataType.DT_INT32))
    engine.cache_manager.copy_cache(cache, cache, 0, 1)


def _check_table(engine: LLMDataDist) -> None:
    engine.link("pair", {1: 0, 2: 1}, nodes.table_for({1: 0, 2: 1}))


CALLS: list[tuple[str, Callable[[LLMDataDist], object], LLMStatusCode]] = [
    ("register", _register, LLMStatusCode.LLM_FAILED),
    ("copy", _copy_slot, LLMStatusCode.LLM_FAILED),
    ("check_table", _check_table, LLMStatusCode.LLM_LINK_FAILED),
]


@pytest.fixture
def engine(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLMDataDist]:
    monkeypatch.setenv("DATADIST_RUNTIME_DIR", str(runtime_dir))
    with LLMDataDist(LLMRole.MIX, 1) as made:
        yield made


def _init(engine: LLMDataDist) -> None:
    config = LLMConfig()
    config.enable_cache_manager = True
    config.transfer_backend = "shm"
    config.mem_pool_cfg = json.dumps({"memory_size": 1 << 20})
    engine.init(config.generate_options())


def _let_raise(
    monkeypatch: pytest.MonkeyPatch, method: str, error: type[Exception] | None = None
) -> None:
    def fail(*_: Any) -> None:
        raise (error or Unheard)("injected")

    monkeypatch.setattr(ShmTransport, method, fail)


@pytest.mark.parametrize("error", [TransportError, Unheard])
@pytest.mark.parametrize(("method", "call", "status"), CALLS, ids=[method for method, *_ in CALLS])
def test_whatever_a_transport_raises_is_an_error_of_the_api(
    engine: LLMDataDist, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    method: str, call: Callable[[LLMDataDist], object], status: LLMStatusCode,
    error: type[Exception],
) -> None:  # fmt: skip
    _init(engine)
    _let_raise(monkeypatch, method, error)
    with pytest.raises(LLMException, match="injected") as caught:
        call(engine)
    assert caught.value.status_code is status
    defects = [r for r in caplog.records if "defect of transport datadist_shm" in r.getMessage()]
    assert len(defects) == (error is Unheard)


def test_facts_about_the_device_are_logged_and_are_no_reason_to_fail(
    engine: LLMDataDist, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "datadist"):
        _init(engine)
        engine.finalize()
        _let_raise(monkeypatch, "describe")
        _init(engine)
    lines = [r.getMessage() for r in caplog.records if r.name == "datadist.engine"]
    assert any("backend shm (datadist-shm" in line and "threads" in line for line in lines), lines
    assert any(line.endswith(": Unheard: injected") for line in lines), lines


def test_a_pool_that_a_defect_prevents_is_failed(
    engine: LLMDataDist, monkeypatch: pytest.MonkeyPatch
) -> None:
    _let_raise(monkeypatch, "allocate")
    with pytest.raises(LLMException, match=r"DEVICE pool .*Unheard: injected") as caught:
        _init(engine)
    assert caught.value.status_code is LLMStatusCode.LLM_FAILED


def test_memory_that_is_not_released_is_failed_and_finalize_goes_on(
    engine: LLMDataDist, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _init(engine)
    cache = _register(engine)
    _let_raise(monkeypatch, "release")
    with pytest.raises(LLMException, match=r"cannot release .*Unheard: injected") as caught:
        engine.cache_manager.unregister_cache(cache.cache_id)
    assert caught.value.status_code is LLMStatusCode.LLM_FAILED
    engine.finalize()
    assert any("cannot release the" in r.getMessage()
               for r in caplog.records)  # fmt: skip


def test_a_link_whose_close_is_defective_is_unlinked_all_the_same(start_node: Start) -> None:
    caller = _linked(start_node)
    caller.do(_raise, "close", partial(Unheard, "injected"))
    with pytest.raises(RemoteError, match="closing it failed: Unheard: injected") as caught:
        caller.do(nodes.unlink, 1)
    assert caught.value.status == "LLM_UNLINK_FAILED"
    caller.do(_raise, "close", None)
