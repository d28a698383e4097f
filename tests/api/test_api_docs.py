"""The table of names in docs/api.md against the code: all of them, once, and no others."""

from __future__ import annotations

import importlib
import inspect
import re
from collections import Counter
from enum import Enum
from pathlib import Path

import pytest

import datadist
from datadist.api.arrays import CacheTensor
from datadist.api.cache_manager import CacheManager
from datadist.drop_in.llm_datadist import v2_list

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
REACHED = {"CacheManager": CacheManager, "CacheTensor": CacheTensor}
"""Classes that are not exported."""
STATUS = ("same", "differs", "extra", "absent")
ROW = re.compile(r"^\| (`.+?`) \| (\w+) \| (.*?) ?\|$", re.MULTILINE)


def _rows() -> list[tuple[str, str, str]]:
    """Name, status and notes; a row may name several."""
    text = PAGE.read_text()
    return [
        (name, status, notes)
        for names, status, notes in ROW.findall(text)
        for name in re.findall(r"`([^`]+)`", names)
    ]


def _members(kind: type) -> list[str]:
    """What a user can call or read, not inherited from Python itself."""
    if issubclass(kind, Enum):
        return []
    ours = (base for base in kind.__mro__ if base.__module__.startswith("datadist"))
    return sorted({name for base in ours for name in vars(base) if not name.startswith("_")})


def _expected() -> list[str]:
    public = {name: getattr(datadist, name) for name in datadist.__all__} | REACHED
    names = list(public)
    for kind in {id(value): value for value in public.values() if inspect.isclass(value)}.values():
        names += [f"{kind.__name__}.{member}" for member in _members(kind)]
    return names


def test_every_name_appears_once_and_nothing_else() -> None:
    documented = [
        name
        for name, status, _ in _rows()
        if status != "absent" and not name.startswith("llm_datadist")
    ]
    assert [name for name, count in Counter(documented).items() if count > 1] == []
    assert sorted(documented) == sorted(_expected())


def test_rows_have_a_status_and_differences_a_reason() -> None:
    rows = _rows()
    assert len(rows) > 100
    for name, status, notes in rows:
        assert status in STATUS, name
        assert notes or status == "same" or name.startswith("CacheTensor."), name
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert sum(bool(ROW.match(line)) for line in lines) == len(lines)


def test_absent_names_are_absent() -> None:
    absent = [name for name, status, _ in _rows() if status == "absent"]
    names = [name for name in absent if not name.startswith("llm_datadist")]
    assert names == ["Tensor", "TensorDesc", "KvCacheManager", "PushType"]
    types = importlib.import_module("datadist.drop_in.llm_datadist.v2.llm_types")
    assert not [name for name in names if hasattr(datadist, name) or hasattr(types, name)]
    modules = [name for name in absent if name not in names]
    assert len(modules) == 4
    for name in modules:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"datadist.drop_in.{name}")


def test_exported_names_are_those_of_the_drop_in_and_the_extras() -> None:
    extra = {name for name, status, _ in _rows() if status == "extra" and "." not in name}
    assert set(datadist.__all__) == set(v2_list) | (extra - set(REACHED))


def test_modules_of_the_drop_in_exist() -> None:
    modules = [
        name
        for name, status, _ in _rows()
        if name.startswith("llm_datadist") and status != "absent"
    ]
    assert len(modules) == 7
    for name in modules:
        module = importlib.import_module(f"datadist.drop_in.{name}")
        for exported in module.__all__:
            assert hasattr(module, exported), (name, exported)


def test_references_to_deviations_lead_to_one() -> None:
    text = PAGE.read_text()
    numbers = [int(n) for n in re.findall(r"^(\d+)\. ", text, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    used = {int(n) for _, _, notes in _rows() for n in re.findall(r"\((\d+)\)", notes)}
    assert used == set(numbers)


@pytest.mark.parametrize("page", ["README.md", "docs/constraints.md"])
def test_the_page_is_linked(page: str) -> None:
    assert "api.md" in (PAGE.parents[1] / page).read_text()
