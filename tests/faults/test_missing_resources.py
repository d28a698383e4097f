"""One resource is missing at one step of `init`, `link` or a transfer by layers."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from datadist import (
    LayerSynchronizer,
    LLMException,
    LLMStatusCode,
    RegisterMemStatus,
    TransferConfig,
)
from tests import groups, nodes, shortage
from tests.nodes import MIB, Node, RemoteError

Start = Callable[..., Node]
PAIR = {1: 0, 2: 1}
LINGER_SECONDS = 0.3
MOST = 30
"""Calls of one function that are tried."""
CODES = {"LLM_FAILED", "LLM_OUT_OF_MEMORY", "LLM_LINK_FAILED"}


def _init_and_end(here: nodes.Here) -> None:
    nodes.init(here, 1, listen_ip_info="127.0.0.1:0")
    here.live.finalize()


def _try_init(here: nodes.Here, name: str) -> list[str]:
    """Every outcome of `init`, with one call of the function missing each time."""
    _init_and_end(here)
    gc.collect()
    before, found = shortage.held(), []
    for at in range(MOST):
        with shortage.missing(name, at) as one:
            try:
                _init_and_end(here)
                found.append("OK")
            except LLMException as error:
                found.append(f"{error.status_code.name} {error}")
        assert shortage.settled(before) == before, (name, at, found[-1])
        if not one.came:
            return found
        _init_and_end(here)
    return found


@pytest.mark.parametrize("name", shortage.TAKERS)
def test_init_without_one_resource_raises_in_words_and_leaves_nothing(
    start_node: Start, name: str
) -> None:
    found = start_node().do(_try_init, name, timeout=300)
    assert found[-1] == "OK" or len(found) == MOST
    for outcome in found:
        assert outcome == "OK" or outcome.split()[0] in CODES, outcome
    if name == "thread":
        assert all("ulimit -u" in each for each in found if each != "OK"), found


ON_LINKING = [
    "thread", "open", "file", "dup", "socket", "accept", "eventfd", "pidfd", "epoll", "memfd",
    "ftruncate", "fcntl", "map", "map_peer", "populate", "memory",
]  # fmt: skip


def _init(here: nodes.Here, one_sided: bool) -> None:
    nodes.init(here, 2, MIB, enable_remote_cache_accessible=one_sided)


def _try_link(here: nodes.Here, name: str, at: int) -> tuple[bool, str, str]:
    """Whether the call came, and how the link stands: settled, or waiting for the peer for long."""
    with shortage.missing(name, at) as one:
        try:
            comm_id = here.live.link("tried", PAIR, nodes.table_for(PAIR))
        except LLMException as error:
            return one.came, error.status_code.name, str(error)
        _wait(here, comm_id, lambda: one.came)
        found = here.live.query_register_mem_status(comm_id).name, here.live.link_error(comm_id)
    here.live.unlink(comm_id)
    return one.came, found[0], found[1] or ""


def _wait(here: nodes.Here, comm_id: int, came: Callable[[], bool]) -> None:
    """Until the link is settled; what is missing may keep it waiting until its time is over."""
    patience = None
    while here.live.query_register_mem_status(comm_id) is RegisterMemStatus.PREPARING:
        if came() and patience is None:
            patience = time.monotonic() + LINGER_SECONDS
        if patience is not None and time.monotonic() > patience:
            return
        time.sleep(0.002)


def _end(here: nodes.Here) -> None:
    """Finalize, after which nothing is left."""
    here.live.finalize()
    gc.collect()
    before = here.any.setdefault("before", shortage.held())
    assert shortage.settled(before) == before


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("name", ON_LINKING)
def test_a_link_without_one_resource_works_or_fails_in_words_and_leaves_nothing(
    start_node: Start, name: str, one_sided: bool
) -> None:
    peer = start_node(1, pool=MIB, enable_remote_cache_accessible=one_sided)
    we = start_node()
    for at in (MOST, *range(MOST)):  # the first one loads what the first link loads
        we.do(_init, one_sided)
        theirs = peer.do(nodes.link, "tried", PAIR)
        came, status, text = we.do(_try_link, name, at)
        peer.do(nodes.unlink, theirs)
        assert status in {"OK", "PREPARING"} or (text and status in {"FAILED", *CODES}), (
            at,
            status,
        )
        again, _ = nodes.link_pair(peer, we, "again")
        we.do(_end)
        peer.do(nodes.unlink, again)
        if not came and at != MOST:
            break


# -- limits of the system ----------------------------------------------------------------------


@pytest.fixture
def few_threads() -> Iterator[Path]:
    """A group of processes that may not have many threads."""
    with groups.group("pids", {"pids.max": 1000}) as path:
        yield path


def _allow(path: Path, more: int) -> None:
    used = int((path / "pids.current").read_text())
    (path / "pids.max").write_text(str(used + more))


def _held(_here: nodes.Here) -> dict[str, int]:
    gc.collect()
    return shortage.held()


def _is_held(_here: nodes.Here, before: dict[str, int]) -> bool:
    gc.collect()
    return shortage.settled(before) == before


def test_init_with_few_threads(few_threads: Path, start_node: Start) -> None:
    node = start_node()
    node.do(_init_and_end)
    groups.enter(few_threads, node.pid)
    before = node.do(_held)
    for room in range(MOST):
        _allow(few_threads, room)
        try:
            node.do(_init_and_end)
        except RemoteError as error:
            assert error.status == "LLM_FAILED", error.text  # noqa: PT017
            assert "ulimit -u" in error.text  # noqa: PT017
            assert f"{few_threads} may have" in error.text  # noqa: PT017
        else:
            break
        assert node.do(_is_held, before), room
    assert 0 < room < MOST - 1


def test_a_transfer_by_layers_with_few_threads(few_threads: Path, start_node: Start) -> None:
    unfilled = {"DATADIST_SHM_POPULATE": "0"}  # no thread that makes pages ends in between
    owner, we = start_node(1), start_node(2, unfilled)
    for node in (owner, we):
        node.do(nodes.make, "c", "cache", [1, 1024])
    nodes.link_pair(owner, we)
    groups.enter(few_threads, we.pid)
    before, addresses = we.do(_held), owner.do(_addresses)
    for room in range(MOST):
        _allow(few_threads, room)
        try:
            we.do(_send_layers, addresses)
        except RemoteError as error:
            assert (error.kind, error.status) == ("LLMException", "LLM_FAILED")  # noqa: PT017
            assert "ulimit -u" in error.text  # noqa: PT017
        else:
            break
        assert we.do(_is_held, before), room
    assert 0 < room < MOST - 1


def _addresses(here: nodes.Here) -> list[int]:
    return list(here.caches["c"].tensor_addrs)


class _Final(LayerSynchronizer):
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True


def _send_layers(here: nodes.Here, addresses: list[int]) -> None:
    target = TransferConfig(1, addresses, range(2), 0)
    task = here.live.cache_manager.transfer_cache_async(here.caches["c"], _Final(), [target])
    assert task.synchronize(60_000) is LLMStatusCode.LLM_SUCCESS


def test_init_with_little_address_space(start_node: Start) -> None:
    node = start_node()
    node.do(_init_and_end)
    found = node.do(_try_address_space)
    assert found[-1] == "OK"
    assert len(found) > 1
    for outcome in found[:-1]:
        assert outcome.split()[0] in CODES, outcome


def _try_address_space(here: nodes.Here) -> list[str]:
    """Outcomes of `init` with more and more room, until it starts."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    found: list[str] = []
    gc.collect()
    before = shortage.held()
    while found[-1:] != ["OK"]:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        room = len(found) * 7 * MIB // 2
        resource.setrlimit(resource.RLIMIT_AS, (size + room, hard))
        try:
            nodes.init(here, 1)
            found.append("OK")
        except LLMException as error:
            found.append(f"{error.status_code.name} {error}")
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        if found[-1] == "OK":
            here.live.finalize()
        gc.collect()
        assert shortage.settled(before) == before, found
    return found
