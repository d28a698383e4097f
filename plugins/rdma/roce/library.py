"""Functions for nodes: the library, where the tests of core have none that fits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from datadist import LLMException
from tests import nodes
from tests.nodes import Here

COUNTERS = Path("/sys/class/infiniband/rxe0/ports/1/hw_counters")


def link_cluster(here: Here, cluster: int, host: str, port: int) -> str:
    """Link with the engine that listens at an address; the status."""
    info = nodes.cluster_info(cluster, port, address=host)
    result, _ = here.live.link_clusters([info], 20_000)
    return result.name


def pull_until_it_fails(here: Here, key: Any, label: str) -> tuple[str, str]:
    """Status and text of the failure."""
    while True:
        try:
            nodes.pull_cache(here, key, label)
        except LLMException as error:
            return error.status_code.name, str(error)


def verify(here: Here, rank: int, *arguments: str) -> tuple[list[str], str]:
    """Run ``verify`` as one of two ranks: its lines, and what it said of errors."""
    command = [sys.executable, "-m", "datadist_rdma.verify", "--rank", str(rank), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return run.stdout.splitlines(), run.stderr


def packets(_here: Here) -> int:
    """How many RoCE packets this machine has sent, those to itself included."""
    return int((COUNTERS / "sent_pkts").read_text())
