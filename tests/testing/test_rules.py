"""Each test of the conformance kit says what it expected, and which rule of the interface that is."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import datadist.testing
from datadist import transport
from datadist.testing import TransportConformance
from datadist.testing.rules import rule

KIT = Path(datadist.testing.__file__).parent


def _tests() -> Iterator[tuple[str, Any]]:
    for family in TransportConformance.__mro__:
        for name, value in vars(family).items():
            if name.startswith("test_"):
                yield f"{family.__name__}.{name}", value


def _has(name: str) -> bool:
    found: Any = transport
    for part in name.split("."):
        fields = dataclasses.fields(found) if dataclasses.is_dataclass(found) else ()
        if part in {field.name for field in fields}:
            return True
        if part in getattr(found, "__annotations__", {}):
            return True
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def test_every_test_names_rules_that_the_interface_has() -> None:
    tests = dict(_tests())
    assert len(tests) > 80
    for name, test in tests.items():
        rules = getattr(test, "rules", ())
        assert rules, f"{name} names no rule"
        assert all(_has(one) for one in rules), f"{name} names {rules}"
        assert test.__doc__, f"{name} does not say what it asks for"


@pytest.mark.parametrize("path", sorted(KIT.rglob("*.py")), ids=lambda path: path.stem)
def test_every_assertion_has_a_text(path: Path) -> None:
    bare = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert) and (node.msg is None or _says_nothing(node.msg))
    ]
    assert not bare


def _says_nothing(message: ast.expr) -> bool:
    """Whether it is only a value, such as ``str(outcome)``."""
    return not any(isinstance(node, ast.Constant) for node in ast.walk(message))


def test_a_failure_ends_with_the_rule() -> None:
    @rule("Link.read", "PeerLost")
    def test_peers_are_lost() -> None:
        """Within
        a second.
        """
        raise AssertionError("it took two")

    with pytest.raises(AssertionError) as caught:
        test_peers_are_lost()
    assert str(caught.value) == (
        "it took two\nrule of Link.read, PeerLost in datadist.transport: peers are lost. Within a "
        "second."
    )
