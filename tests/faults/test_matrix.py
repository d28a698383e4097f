"""Every cell of the fault matrix, with real processes."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests import netcopy, nodes
from tests.faults import scenarios
from tests.faults.backends import PAIR, Setting, missing, setting
from tests.faults.matrix import (
    BACKENDS,
    CONTROL,
    LINK_SECONDS,
    MATRIX,
    SYNC_SECONDS,
    Cell,
    runs_on,
)
from tests.nodes import MIB, Node

Start = Callable[..., Node]
Outcome = tuple[str, float, str]
DURING = ("mid-pull", "mid-push", "mid-async")
CROWDED = 4.0
"""Seconds beyond the bound that a crowded machine may take; the time limits of the members are longer."""
CASES = [(cell, backend) for cell in MATRIX for backend in BACKENDS if runs_on(cell, backend)]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short path, as addresses of sockets need."""
    with tempfile.TemporaryDirectory(prefix="faults-") as path:
        yield Path(path)


@pytest.mark.parametrize(
    ("cell", "backend"), CASES, ids=[f"{cell.name}-{backend}" for cell, backend in CASES]
)
def test_matrix(start_node: Start, place: Path, cell: Cell, backend: str) -> None:
    reason = missing(backend)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    _, seconds = run_cell(start_node, cell, setting(backend, place))
    _record(cell, backend, seconds)


def run_cell(start_node: Start, cell: Cell, on: Setting) -> tuple[str, float]:
    """Let the fault happen and go on as the table says; the status, and seconds to its detection."""
    peer, we = _start(start_node, (1, 2), cell, on)
    if cell.moment in ("before link", "preparing"):
        comm_id = we.do(nodes.link, "pair", PAIR, on.table)
        if cell.moment == "preparing":
            peer.do(scenarios.hold_attach)
            peer.do(nodes.link, "pair", PAIR, on.table)
            peer.do(scenarios.await_attaching)
        struck = _inject_fault(peer, cell, on)
        if cell.fault in CONTROL:
            _carry_on(peer, cell, on)
        status, ended, text = we.do(scenarios.wait_settled, comm_id)
    else:
        comm_id = _link(peer, we, on)
        status, ended, text, struck = _linked(peer, we, cell, on, comm_id)
    assert status in cell.status.split(" or "), text
    assert any(said in text for said in cell.says.split(" or ")), text
    assert ended - struck < cell.seconds + CROWDED
    if cell.moment in DURING:
        _compare(peer, we, cell, status)
    _go_on(start_node, peer, we, cell, comm_id, on)
    return status, ended - struck


def _start(start: Start, clusters: Sequence[int], cell: Cell, on: Setting) -> list[Node]:
    """Processes that start at the same time, each with an engine and a cache."""
    environs = [on.environs.get(cluster) for cluster in clusters]
    started = [start(**({"environ": environ} if environ else {})) for environ in environs]
    for node, cluster in zip(started, clusters, strict=True):
        if on.plugins is not None:
            node.do(netcopy.install, on.plugins)
        node.begin(
            scenarios.start_engine,
            cluster,
            16 * MIB,
            transfer_backend=on.transport,
            link_total_time=LINK_SECONDS if cell.status == "FAILED" else int(nodes.SECONDS),
            sync_kv_timeout=SYNC_SECONDS * 1000,
            enable_remote_cache_accessible=cell.moment in ("mid-push", "mid-async"),
            **on.options,
        )
    for node in started:
        node.result()
    return started


def _link(peer: Node, we: Node, on: Setting, name: str = "pair") -> int:
    peer.begin(scenarios.link_and_wait, name, PAIR, on.table)
    comm_id: int = we.do(scenarios.link_and_wait, name, PAIR, on.table)
    peer.result()
    return comm_id


def _carry_on(peer: Node, cell: Cell, on: Setting) -> None:
    """What the peer does after its connection was harmed while it linked, or before."""
    if cell.moment == "preparing":
        if cell.fault in ("cut", "garbage"):
            peer.do(scenarios.await_loss)
        peer.do(scenarios.let_attach)
    else:
        peer.do(nodes.link, "pair", PAIR, on.table)


def _linked(
    peer: Node, we: Node, cell: Cell, on: Setting, comm_id: int
) -> tuple[str, float, str, float]:
    if cell.moment in DURING:
        we.do(scenarios.slow_down)
        we.do(scenarios.begin, cell.moment)
        struck = _inject_fault(peer, cell, on)
        we.do(scenarios.go_on, None if cell.status == "OK" else comm_id)
        return (*we.do(scenarios.outcome), struck)
    struck = _inject_fault(peer, cell, on)
    if cell.moment == "idle":
        wait = scenarios.pull_now if cell.status == "OK" else scenarios.wait_until_broken
        return (*we.do(wait, *([] if cell.status == "OK" else [comm_id])), struck)
    what = "unlink" if cell.moment == "unlinking" else "finalize"
    struck = time.monotonic()
    return (*we.do(scenarios.timed, what, comm_id), struck)


def _inject_fault(peer: Node, cell: Cell, on: Setting) -> float:
    """Do it; the time just before."""
    struck = time.monotonic()
    if cell.fault == "killed":
        peer.kill()
    elif cell.fault == "stopped":
        peer.pause()
    elif cell.fault in CONTROL:
        _damage_connection(peer, cell, on)
    else:
        if cell.moment == "preparing":
            peer.do(scenarios.let_attach_once_it_ends)
        if cell.fault == "unlinks":
            peer.begin(nodes.unlink, 1)
        else:
            peer.begin(scenarios.exit_now if cell.fault == "exits" else nodes.finalize)
    return struck


def _damage_connection(peer: Node, cell: Cell, on: Setting) -> None:
    if cell.fault == "slow":
        peer.do(scenarios.slow)
    elif cell.moment == "before link" and on.port:  # there is no connection yet but to a stranger
        peer.do(scenarios.answer_badly, cell.fault, on.port)
    else:
        peer.do(
            {"cut": scenarios.cut, "half-open": scenarios.half_open, "garbage": scenarios.garbage}[
                cell.fault
            ]
        )


def _compare(peer: Node, we: Node, cell: Cell, status: str) -> None:
    """Look at every byte of both ends, as far as they live, before anything else moves."""
    if cell.fault == "stopped":
        peer.resume()
    elif cell.fault in ("unlinks", "finalizes"):
        peer.result()
    lost = cell.fault in ("killed", "exits", "finalizes")
    scenarios.check_moved(we, None if lost else peer, cell.moment, status == "OK")


def _go_on(start: Start, peer: Node, we: Node, cell: Cell, comm_id: int, on: Setting) -> None:
    """What the table says works after the fault does."""
    if cell.fault == "stopped" and cell.moment not in DURING:
        peer.resume()
    if cell.after == "finalize":
        if cell.moment != "finalizing":
            we.do(nodes.finalize)
        return
    we.do(scenarios.give_time)
    if cell.after == "relink":
        if cell.moment != "unlinking":
            we.do(nodes.unlink, comm_id)
        if cell.fault in ("killed", "exits", "finalizes"):
            (peer,) = _start(start, [1], cell, on)
            peer.do(scenarios.give_time)
        elif cell.fault == "unlinks" and cell.moment not in DURING:
            peer.result()
        if cell.moment == "preparing" and cell.fault == "stopped":
            peer.do(scenarios.let_attach)
        _link(peer, we, on, "again")
    peer.do(scenarios.fill, 1)
    we.do(scenarios.fill, 2)
    assert we.do(scenarios.pull_now)[0] == "OK"
    scenarios.check_moved(we, peer, "mid-pull", whole=True)


def _record(cell: Cell, backend: str, seconds: float) -> None:
    """With DATADIST_FAULTS_RECORD, note the detection time there (see tests.faults.report)."""
    place = os.environ.get("DATADIST_FAULTS_RECORD")
    if place:
        line = {"name": cell.name, "backend": backend, "seconds": round(seconds, 4)}
        with Path(place).open("a") as file:
            file.write(json.dumps(line) + "\n")
