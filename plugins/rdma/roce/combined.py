"""Four clusters over shm+rdma in several machines."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from roce.nodes import HERE, AnyNode, RemoteNode, start_here

from tests import nodes
from tests.links.four_clusters import Four

ENVIRON = {
    "DATADIST_AUTH_KEY": "0123456789abcdef0123456789abcdef",
    "DATADIST_RENDEZVOUS": f"{HERE}:7600",
    "DATADIST_PEER_TIMEOUT": "30",
}


def linked(places: Mapping[int, str], folder: Path, started: ExitStack) -> Four:
    """Clusters in the machines that ``places`` names by their addresses."""
    members: dict[int, AnyNode] = {}
    for cluster, place in places.items():
        if place == HERE:
            node: AnyNode = start_here({**ENVIRON, "DATADIST_RUNTIME_DIR": str(folder)})
        else:
            node = RemoteNode(ENVIRON, place)
        started.callback(node.close)
        node.do(nodes.init, cluster, 2 * nodes.MIB, transfer_backend="shm+rdma")
        members[cluster] = node
    four = Four(members, places, "rdma")
    four.link("four")
    return four
