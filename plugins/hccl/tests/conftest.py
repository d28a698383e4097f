"""Fixtures: ranks of the hccl transport in processes of their own, on the simulator."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import hccl_sim
import pytest
from hccl_sim.ranks import Ranks

from tests.nodes import Node


@pytest.fixture
def sim_directory() -> Iterator[str]:
    """A directory for the sockets of the simulator; its path must be short."""
    path = tempfile.mkdtemp(prefix="hccl-sim-", dir="/tmp")
    yield path
    shutil.rmtree(path)


@pytest.fixture
def start_node(sim_directory: str) -> Iterator[Callable[..., Node]]:
    """Start a process on the simulator; keywords are the simulator's settings."""
    started = ExitStack()

    def start(environ: dict[str, str] | None = None, **settings: object) -> Node:
        own = {"DATADIST_RUNTIME_DIR": f"{sim_directory}/run"}
        node = Node(hccl_sim.environment(sim_directory, **settings) | own | (environ or {}))
        started.callback(node.close)
        return node

    with started:
        yield start


@pytest.fixture
def start_ranks(start_node: Callable[..., Node]) -> Callable[..., Ranks]:
    """Start ranks that have a transport each; see :class:`hccl_sim.ranks.Ranks`."""

    def start(
        count: int = 2,
        servers: int | None = None,
        environ: dict[str, str] | None = None,
        **settings: object,
    ) -> Ranks:
        return Ranks([start_node(environ, **settings) for _ in range(count)], servers)

    return start
