"""Fixtures that end several things end all of them, also when ending one raises."""

from __future__ import annotations

import ast
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import in_process_engine

ROOT = Path(__file__).parent.parent
FOLDERS = ("datadist", "examples", "plugins", "tests")


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """Statements that follow each other: of a body, and of `finally` after it."""
    for each in ast.walk(node):
        body = getattr(each, "body", None)
        if isinstance(body, list):
            yield body + (each.finalbody if isinstance(each, ast.Try) else [])


def _ends(fixture: ast.FunctionDef) -> list[ast.stmt]:
    """What a fixture does after its test."""
    for block in _blocks(fixture):
        for place, statement in enumerate(block):
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Yield):
                return block[place + 1 :]
    return []


def _several(source: str) -> list[str]:
    """Fixtures that end several things one after another: what follows one that raises stays open."""
    return [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        and any("fixture" in ast.unparse(each) for each in node.decorator_list)
        and (
            len(ends := _ends(node)) > 1
            or any(isinstance(each, ast.For | ast.While) for each in ends)
        )
    ]


def test_no_fixture_ends_several_things_without_a_stack() -> None:
    paths = [
        path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if not {".venv", "build"} & set(path.parts)
    ]
    assert Path(__file__).with_name("conftest.py") in paths
    found = {}
    for path in paths:
        source = path.read_text()
        if "pytest.fixture" in source and (names := _several(source)):
            found[str(path.relative_to(ROOT))] = names
    assert found == {}


@pytest.mark.parametrize(
    "ends",
    [
        "    yield\n    for node in nodes:\n        node.close()",
        "    yield\n    one.close()\n    two.close()",
        "    try:\n        yield\n    finally:\n        one.close()\n        two.close()",
        "    with directory:\n        yield\n        one.close()\n        two.close()",
    ],
)
def test_every_way_to_end_several_is_seen(ends: str) -> None:
    assert _several(f"@pytest.fixture\ndef things():\n{ends}\n") == ["things"]
    assert _several(f"def things():\n{ends}\n") == []


@pytest.mark.parametrize(
    "ends", ["yield", "yield\n    one.close()", "with ExitStack() as s:\n        yield"]
)
def test_who_ends_one_thing_needs_no_stack(ends: str) -> None:
    assert _several(f"@pytest.fixture(scope='module')\ndef things():\n    {ends}\n") == []


def test_an_engine_is_finalized_although_a_stranger_cannot_be_closed(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATADIST_RUNTIME_DIR", str(runtime_dir))
    engine = in_process_engine.Engine(runtime_dir)
    strangers = [engine.raw_peer(number) for number in (1, 2)]
    ended = []

    def close(number: int, really: Callable[[], None]) -> None:
        really()
        ended.append(number)
        raise OSError("on purpose")

    for number, raw_peer in enumerate(strangers):
        monkeypatch.setattr(raw_peer, "close", partial(close, number, raw_peer.close))
    with pytest.raises(OSError, match="on purpose"):
        engine.close()
    assert sorted(ended) == [0, 1]
    with pytest.raises(RuntimeError, match="not initialized"):
        engine.api.stats()


@given(st.just(0.3))
@settings(max_examples=1)
def test_an_example_may_take_any_time(seconds: float) -> None:
    time.sleep(seconds)
