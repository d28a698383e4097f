"""Every cell of the fault matrix, with real processes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from datadist.engine.loader import survey
from tests import nodes
from tests.faults import stage
from tests.faults.matrix import BACKENDS, LINK_SECONDS, MATRIX, SYNC_SECONDS, Cell
from tests.nodes import MIB, Node, pattern

Start = Callable[..., Node]
Outcome = tuple[str, float, str]
PAIR = {1: 0, 2: 1}
DURING = ("mid-pull", "mid-push", "mid-async")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", MATRIX, ids=lambda cell: cell.name)
def test_matrix(start_node: Start, cell: Cell, backend: str) -> None:
    _skip_unless_usable(backend)
    _, seconds = run_cell(start_node, cell, backend)
    _record(cell, backend, seconds)


def run_cell(start_node: Start, cell: Cell, backend: str) -> tuple[str, float]:
    """Let the fault happen and go on as the table says; the status, and seconds to its detection."""
    peer, we = _start(start_node, (1, 2), cell, backend)
    if cell.moment in ("before link", "preparing"):
        comm_id = we.do(nodes.link, "pair", PAIR)
        if cell.moment == "preparing":
            peer.do(stage.hold_attach)
            peer.do(nodes.link, "pair", PAIR)
            peer.do(stage.await_attaching)
        struck = _strike(peer, cell)
        status, ended, text = we.do(stage.wait_settled, comm_id)
    else:
        comm_id = _link(peer, we)
        status, ended, text, struck = _linked(peer, we, cell, comm_id)
    assert status in cell.status.split(" or "), text
    assert cell.says in text
    assert ended - struck < cell.seconds
    _go_on(start_node, peer, we, cell, comm_id, backend)
    return status, ended - struck


def _skip_unless_usable(backend: str) -> None:
    row = next((row for row in survey() if row.backend.name == backend), None)
    if row is None or not row.usable:
        pytest.skip(f"{backend}: {row.reason if row else 'not installed'}")


def _start(start: Start, clusters: Sequence[int], cell: Cell, backend: str) -> list[Node]:
    """Processes that start at the same time, each with an engine and a cache."""
    started = [start() for _ in clusters]
    for node, cluster in zip(started, clusters, strict=True):
        node.begin(
            stage.start_engine,
            cluster,
            16 * MIB,
            transfer_backend=backend,
            link_total_time=LINK_SECONDS,
            sync_kv_timeout=SYNC_SECONDS * 1000,
            enable_remote_cache_accessible=cell.moment in ("mid-push", "mid-async"),
        )
    for node in started:
        node.result()
    return started


def _link(peer: Node, we: Node, name: str = "pair") -> int:
    peer.begin(nodes.link_and_wait, name, PAIR)
    comm_id: int = we.do(nodes.link_and_wait, name, PAIR)
    peer.result()
    return comm_id


def _linked(peer: Node, we: Node, cell: Cell, comm_id: int) -> tuple[str, float, str, float]:
    if cell.moment in DURING:
        we.do(stage.slow_down)
        we.do(stage.begin, cell.moment)
        struck = _strike(peer, cell)
        return (*we.do(stage.outcome), struck)
    struck = _strike(peer, cell)
    if cell.moment == "idle":
        wait = stage.pull_now if cell.status == "OK" else stage.wait_until_broken
        return (*we.do(wait, *([] if cell.status == "OK" else [comm_id])), struck)
    what = "unlink" if cell.moment == "unlinking" else "finalize"
    struck = time.monotonic()
    return (*we.do(stage.timed, what, comm_id), struck)


def _strike(peer: Node, cell: Cell) -> float:
    """Do it; the time just before."""
    struck = time.monotonic()
    if cell.fault == "killed":
        peer.kill()
    elif cell.fault == "stopped":
        peer.pause()
    elif cell.fault == "finalizes" and cell.moment == "preparing":
        peer.do(stage.finalize_after_release)
    else:
        faults: dict[str, Callable[..., object]] = {
            "exits": stage.exit_now,
            "finalizes": nodes.finalize,
            "cut": stage.cut,
            "half-open": stage.half_open,
            "garbage": stage.garbage,
        }
        if cell.fault == "unlinks":
            peer.begin(nodes.unlink, 1)
        else:
            peer.begin(faults[cell.fault])
    return struck


def _go_on(start: Start, peer: Node, we: Node, cell: Cell, comm_id: int, backend: str) -> None:
    """What the table says works after the fault does."""
    if cell.fault == "stopped":
        peer.resume()
    if cell.after == "finalize":
        if cell.moment != "finalizing":
            we.do(nodes.finalize)
        return
    if cell.after == "relink":
        if cell.moment != "unlinking":
            we.do(nodes.unlink, comm_id)
        if cell.fault in ("killed", "exits", "finalizes"):
            (peer,) = _start(start, [1], cell, backend)
        elif cell.fault in ("cut", "garbage", "unlinks"):
            peer.result()
        if cell.moment == "preparing" and cell.fault == "stopped":
            peer.do(stage.let_attach)
        _link(peer, we, "again")
    peer.do(nodes.fill, "c", 1)
    _pull_and_verify(we)


def _pull_and_verify(we: Node) -> None:
    assert we.do(stage.pull_now)[0] == "OK"
    for index, array in enumerate(we.do(nodes.read, "c")):
        np.testing.assert_array_equal(array, pattern(1, index, array.shape))


def _record(cell: Cell, backend: str, seconds: float) -> None:
    """With DATADIST_FAULTS_RECORD, note the detection time there (see tests.faults.report)."""
    place = os.environ.get("DATADIST_FAULTS_RECORD")
    if place:
        line = {"name": cell.name, "backend": backend, "seconds": round(seconds, 4)}
        with Path(place).open("a") as file:
            file.write(json.dumps(line) + "\n")
