"""The fault matrix of the library over RDMA, where the transport has a part in the outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.faults.backends import Setting
from tests.faults.matrix import MATRIX, Cell
from tests.faults.test_matrix import run_cell
from tests.nodes import Node

SCALE = 4
"""Emulated machines on a busy host are slow."""
MOMENTS = ("idle", "mid-pull", "mid-push", "mid-async")
OF_THE_PROCESS = ("killed", "stopped", "exits", "finalizes", "unlinks")
"""Faults that reach the queue pairs, too, and not only the control connection."""


def _belongs(cell: Cell) -> bool:
    if cell.moment in ("preparing", "unlinking", "finalizing"):
        return cell.fault in OF_THE_PROCESS
    return cell.moment in MOMENTS and (cell.fault != "slow" or cell.moment == "mid-pull")


CELLS = [replace(cell, seconds=cell.seconds * SCALE) for cell in MATRIX if _belongs(cell)]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_fault(
    start_node: Callable[..., Node], cell: Cell, record_property: Callable[[str, object], None]
) -> None:
    status, seconds = run_cell(start_node, cell, Setting("rdma"))
    record_property(f"{cell.fault} {cell.moment}", f"{status} after {seconds * 1e3:.0f} ms")
