"""Nodes: what they need not import each for themselves is there, also where modules were moved."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec

import pytest
from roce.nodes import PRELOADED as IN_GUESTS

from tests import nodes
from tests.nodes import PRELOADED, Node


@pytest.mark.fast
@pytest.mark.parametrize("name", [*PRELOADED, *IN_GUESTS])
def test_what_is_preloaded_exists(name: str) -> None:
    assert find_spec(name) is not None, "nodes start without it, and say nothing"


def _missing(_here: nodes.Here) -> list[str]:
    return [name for name in PRELOADED if name not in sys.modules]


def test_nodes_begin_with_all_that_is_preloaded(start_node: Callable[..., Node]) -> None:
    assert start_node().do(_missing) == []
