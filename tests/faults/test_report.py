"""docs/faults.md shows the matrix that is tested."""

from __future__ import annotations

from tests.faults.matrix import FAULTS, IMPOSSIBLE, MATRIX, MOMENTS
from tests.faults.report import DOCUMENT, explanations, rows


def test_the_document_has_every_row_and_no_other() -> None:
    lines = DOCUMENT.read_text().splitlines()
    shown = [line for line in lines if line.startswith(tuple(f"| {fault} |" for fault in FAULTS))]
    assert len(shown) == len(MATRIX)
    for line, row in zip(shown, rows(MATRIX), strict=True):
        assert line.startswith(row), "run python -m tests.faults.report"
    for line in explanations():
        assert line in lines, "run python -m tests.faults.report"


def test_cells_name_known_faults_and_moments_once() -> None:
    assert {cell.fault for cell in MATRIX} == set(FAULTS)
    assert {cell.moment for cell in MATRIX} == set(MOMENTS)
    assert len({cell.name for cell in MATRIX}) == len(MATRIX)


def test_every_cell_is_tested_or_explained() -> None:
    every = {(fault, moment) for fault in FAULTS for moment in MOMENTS}
    assert every == {(cell.fault, cell.moment) for cell in MATRIX} | set(IMPOSSIBLE)
