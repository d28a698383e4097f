"""Functions for nodes: the library, where the tests of core have none that fits."""

from __future__ import annotations

from typing import Any

from datadist import LLMClusterInfo, LLMException
from tests import nodes
from tests.nodes import Here


def link_clusters(here: Here, cluster: int, host: str, port: int) -> str:
    """Link with the engine that listens at an address; the status."""
    info = LLMClusterInfo()
    info.remote_cluster_id = cluster
    info.append_remote_ip_info(host, port)
    result, _ = here.live.link_clusters([info], 20_000)
    return result.name


def pull_until_it_fails(here: Here, key: Any, label: str) -> tuple[str, str]:
    """Status and text of the failure."""
    while True:
        try:
            nodes.pull_cache(here, key, label)
        except LLMException as error:
            return error.status_code.name, str(error)
