"""What the fault matrix is run on: a transport each, and how two members of it come to meet."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from datadist.transports.loader import list_states
from tests import netcopy, nodes, ports

PAIR = {1: 0, 2: 1}
CLUSTERS = tuple(PAIR)


@dataclass(frozen=True)
class Setting:
    """One column of the matrix, ready for the processes of one test."""

    transport: str
    table: str = field(default_factory=lambda: nodes.table_for(PAIR))
    environs: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    """Variables of the processes, by cluster."""
    plugins: str | None = None
    """Directory with the metadata of the test's own transports."""
    port: int = 0
    """Where rank 0 is met over TCP; 0 where members meet by a Unix socket."""
    options: Mapping[str, object] = field(default_factory=dict)


def missing(backend: str) -> str | None:
    """Why the matrix cannot be run on a backend here, or None."""
    if backend == "tcp":
        return None
    if backend == "hccl":
        return None if shutil.which("cc") else "the simulator needs a C compiler (cc)"
    row = next((row for row in list_states() if row.backend.name == backend), None)
    if row is None:
        return "not installed"
    return None if row.usable else row.reason


def setting(backend: str, place: Path) -> Setting:
    """A column's setting with everything that it keeps in files in ``place``, a short path."""
    if backend == "hccl":
        return _simulated(place)
    return _network(place) if backend == "tcp" else Setting(backend)


def _simulated(place: Path) -> Setting:
    import hccl_sim

    environ = hccl_sim.environment(str(place))
    return Setting(
        "hccl",
        table=hccl_sim.table(),
        environs=dict.fromkeys(CLUSTERS, environ),
        options={"device_id": 0},
    )


def _network(place: Path) -> Setting:
    """Two hosts, as it seems to the engines: loopback addresses, and no runtime directory in common."""
    from tests import hosts

    netcopy.publish(place)
    environs = {}
    for cluster in CLUSTERS:
        run = place / f"run{cluster}"
        run.mkdir(mode=0o700)
        environs[cluster] = {"DATADIST_RUNTIME_DIR": str(run), "DATADIST_AUTH_KEY": hosts.KEY}
    port = ports.free(1)[0]
    return Setting(
        "netcopy",
        table=hosts.table(["127.0.0.1", "127.0.0.2"], host_port=str(port)),
        environs=environs,
        plugins=str(place),
        port=port,
    )
