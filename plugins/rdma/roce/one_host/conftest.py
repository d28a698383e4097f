"""Nodes on the rdma transport, for tests that were written for any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from roce.nodes import start_here

from tests import nodes
from tests.conftest import free_ports
from tests.nodes import Node

__all__ = ["free_ports", "start_node"]


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Start a node; with a cluster id and settings it is initialised too."""
    started = ExitStack()
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)

    def start(cluster: int | None = None, **settings: Any) -> Node:
        node = start_here({"DATADIST_RUNTIME_DIR": str(folder), "DATADIST_BACKEND": "rdma"})
        started.callback(node.close)
        if cluster is not None:
            pool = settings.pop("pool", 8 * nodes.MIB)
            settings.setdefault("transfer_backend", "rdma")
            node.do(nodes.init, cluster, pool, **settings)
        return node

    with started:
        yield start
