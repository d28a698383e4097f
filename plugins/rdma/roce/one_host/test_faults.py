"""The fault matrix of the library over RDMA: what becomes of transfers that are under way."""

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
CELLS = [
    replace(cell, seconds=cell.seconds * SCALE)
    for cell in MATRIX
    if cell.moment in ("mid-pull", "mid-push")
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_fault_during_a_transfer(
    start_node: Callable[..., Node], cell: Cell, record_property: Callable[[str, object], None]
) -> None:
    status, seconds = run_cell(start_node, cell, Setting("rdma"))
    record_property(f"{cell.fault} {cell.moment}", f"{status} after {seconds * 1e3:.0f} ms")
