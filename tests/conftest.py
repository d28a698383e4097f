"""Fixtures: nodes in a runtime directory of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests import hosts, in_process_engine, netcopy, nodes, ports
from tests.hosts import Network
from tests.nodes import Node

os.environ.setdefault("DATADIST_JOB", "")  # the same place with and without pytest-xdist


@pytest.fixture
def runtime_dir(tmp_path: Path) -> Path:
    """A private runtime directory."""
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def free_ports() -> Callable[[int], list[int]]:
    """Ports of loopback that nobody uses now, nor takes meanwhile."""
    return ports.free


@pytest.fixture
def start_node(runtime_dir: Path) -> Iterator[Callable[..., Node]]:
    """Start a node; with a cluster id and settings it is initialised too."""
    started = ExitStack()

    def start(
        cluster: int | None = None, environ: Mapping[str, str] | None = None, **settings: object
    ) -> Node:
        node = Node({"DATADIST_RUNTIME_DIR": str(runtime_dir), **(environ or {})})
        started.callback(node.close)
        if cluster is not None:
            pool = settings.pop("pool", 8 * nodes.MIB)
            node.do(_init, cluster, pool, settings)
        return node

    with started:
        yield start


def _init(here: nodes.Here, cluster: int, pool: int, settings: dict[str, object]) -> None:
    nodes.init(here, cluster, pool, **settings)


@pytest.fixture
def engine(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[in_process_engine.Engine]:
    """An engine of the test's process, which raw peers talk to."""
    monkeypatch.setenv("DATADIST_RUNTIME_DIR", str(runtime_dir))
    made = in_process_engine.Engine(runtime_dir)
    yield made
    made.close()


@pytest.fixture
def net() -> Iterator[Network]:
    """Three hosts on a switch."""
    with hosts.network(3) as network:
        yield network


@pytest.fixture
def start_on(net: Network, tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Start a node on a host; each host has a runtime directory of its own."""
    netcopy.publish(tmp_path)
    started = ExitStack()

    def start(number: int, cluster: int, *, key: str | None = hosts.KEY, **options: Any) -> Node:
        run = tmp_path / f"run{number}"
        run.mkdir(mode=0o700, exist_ok=True)
        environ = {
            "DATADIST_RUNTIME_DIR": str(run),
            "NETJOIN_DIRECTORY": str(tmp_path),
            **options.pop("environ", {}),
        }
        if key is not None:
            environ["DATADIST_AUTH_KEY"] = key
        node = hosts.start(net.hosts[number], environ, str(tmp_path))
        started.callback(node.close)
        node.do(_init_netcopy, cluster, options)
        return node

    with started:
        yield start


def _init_netcopy(here: nodes.Here, cluster: int, options: dict[str, Any]) -> None:
    hosts.init(here, cluster, **options)
