"""The tables that `benchmarks/compare.py --write` puts between the markers of the page."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """benchmarks/tables.py, which is in no package."""
    spec = importlib.util.spec_from_file_location(
        "compare_tables", ROOT / "benchmarks" / "tables.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _result(contender: str, workload: str, *warm: float, **more: Any) -> dict[str, Any]:
    found = {"contender": contender, "workload": workload, "bytes": 10**9, "warm": list(warm)}
    return {**found, "connect": [0.002], **more}


RESULTS = [
    _result("datadist pool", "contiguous", 0.1, 0.05, 0.2),
    _result("nixl tuned", "contiguous", 0.2),
    _result("nixl tuned", "paged-gqa", failed="not installed"),
    _result("datadist pool", "paged-gqa", 0.5),
    _result("datadist pool", "latency", 4e-6, 5e-6, 6e-6),
    _result("datadist pool", "push", 7e-6),
    _result("datadist pool", "link", 1e-6),
]


def test_each_kind_of_result_has_a_table(tables: ModuleType) -> None:
    lines = tables.markdown(RESULTS, "somewhere:").splitlines()
    assert lines[0] == "somewhere:"
    for line in (
        "| GB/s | contiguous | paged-gqa |",
        "| datadist pool | 10.00 | 2.00 |",
        "| nixl tuned | 5.00 | - |",
        "| **datadist pool / nixl tuned** | 2.00 | - |",
        "| One block of 4 KiB, pulled | median | fastest |",
        "| datadist pool | 5.0 us | 4.0 us |",
        "| One block of 4 KiB, pushed | median | fastest |",
        "| datadist pool | 7.0 us | 7.0 us |",
        "| datadist pool | 2.0 ms |",
    ):
        assert line in lines


def test_what_was_not_measured_has_no_table(tables: ModuleType) -> None:
    text = tables.markdown(RESULTS[:1], "here:")
    assert "4 KiB" not in text
    assert "Connect" not in text
    assert tables.markdown([], "here:") == "here:"


def test_only_what_is_between_the_markers_changes(tables: ModuleType) -> None:
    page = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n"
    assert tables.replaced(page, "new") == f"before\n{tables.BEGIN}\nnew\n{tables.END}\nafter\n"
    for broken in ("", tables.BEGIN, f"{tables.END}{tables.BEGIN}", page + page):
        with pytest.raises(ValueError, match="must have one line"):
            tables.replaced(broken, "new")


def test_the_page_has_the_markers(tables: ModuleType) -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert tables.replaced(page, "new") != page
