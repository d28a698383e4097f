"""Hosts for tests: network namespaces on one virtual switch, gone with the processes that hold them."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest

from datadist import BlocksCacheKey
from tests import nodes
from tests.nodes import AnyNode, Node, RemoteError
from tests.waiting import comes_true

CLONE_NEWNET = 0x40000000
KEY = "a key that only this test knows"


def missing() -> str | None:
    """Why no hosts can be made here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (Debian: iproute2, util-linux)"
    try:
        subprocess.run(["unshare", "--net", "true"], check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        return f"network namespaces cannot be made: {error}"
    return None


_reason = missing()
needed = pytest.mark.skipif(_reason is not None, reason=_reason or "")
"""Mark of tests that need hosts."""


class Host:
    """A network namespace with one interface, ``eth0``."""

    def __init__(self, number: int) -> None:
        self.ipv4 = f"10.77.0.{number}"
        self.ipv6 = f"fd77::{number}"
        self._anchor = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo up; exec sleep 3600"], stdout=subprocess.PIPE
        )
        assert self._anchor.stdout is not None
        assert self._anchor.stdout.readline() == b"up\n"
        self.run("ip", "link", "set", "lo", "up")

    @property
    def namespace(self) -> str:
        """Path of the network namespace."""
        return f"/proc/{self._anchor.pid}/ns/net"

    def run(self, *command: str) -> str:
        """Run a command on this host and return its output."""
        enter = ["nsenter", f"--net={self.namespace}", *command]
        done = subprocess.run(enter, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def plug(self, switch: Host, number: int) -> None:
        """Connect ``eth0`` to a bridge that another host carries."""
        port = f"port{number}"
        pid = str(switch._anchor.pid)
        self.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", pid)
        switch.run("ip", "link", "set", port, "master", "switch", "up")
        self.run("ip", "address", "add", f"{self.ipv4}/24", "dev", "eth0")
        self.run("ip", "address", "add", f"{self.ipv6}/64", "dev", "eth0", "nodad")
        self.run("ip", "link", "set", "eth0", "up")

    def unplug(self, switch: Host, number: int) -> None:
        """Cut the wire: packets vanish silently, as when the host's power fails."""
        switch.run("ip", "link", "set", f"port{number}", "nomaster")

    def replug(self, switch: Host, number: int) -> None:
        """Undo :meth:`unplug`."""
        switch.run("ip", "link", "set", f"port{number}", "master", "switch")

    def close(self) -> None:
        """End the namespace."""
        self._anchor.kill()
        self._anchor.wait()
        if self._anchor.stdout is not None:
            self._anchor.stdout.close()


class Network:
    """Hosts 0, 1, ... on one switch."""

    def __init__(self, count: int) -> None:
        self.switch = Host(254)
        self.hosts: list[Host] = []
        self.switch.run("ip", "link", "add", "switch", "type", "bridge")
        self.switch.run("ip", "link", "set", "switch", "up")
        for number in range(count):
            host = Host(number + 1)
            self.hosts.append(host)
            host.plug(self.switch, number)

    def cut(self, number: int) -> None:
        """Cut the wire of a host."""
        self.hosts[number].unplug(self.switch, number)

    def mend(self, number: int) -> None:
        """Mend the wire of a host."""
        self.hosts[number].replug(self.switch, number)

    def close(self) -> None:
        """End all of them."""
        with ExitStack() as stack:
            for host in (self.switch, *self.hosts):
                stack.callback(host.close)


@contextmanager
def network(count: int) -> Iterator[Network]:
    """A network for the time of a test."""
    net = Network(count)
    try:
        yield net
    finally:
        net.close()


def enter(_here: object, namespace: str) -> None:
    """Move this process into a host; before it starts threads that use the network."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(namespace, os.O_RDONLY)
    try:
        if libc.setns(fd, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(fd)


def start(host: Host, environ: Mapping[str, str], plugins: str) -> Node:
    """A process on a host, with the test's transports installed."""
    from tests import netcopy

    node = Node(environ)
    node.do(enter, host.namespace)
    node.do(netcopy.install, plugins)
    return node


def init(here: nodes.Here, cluster: int, **settings: Any) -> None:
    """Initialise an engine on the test's transport."""
    nodes.init(here, cluster, **{"transfer_backend": "netcopy", **settings})


def table(addresses: list[str], **of_rank_0: Any) -> str:
    """A rank table with one server per rank."""
    servers: list[dict[str, Any]] = [
        {"server_id": address, "device": [{"device_id": "0", "rank_id": str(rank)}]}
        for rank, address in enumerate(addresses)
    ]
    for name, value in of_rank_0.items():
        (servers[0] if name == "host_ip" else servers[0]["device"][0])[name] = value
    count = str(len(servers))
    return json.dumps(
        {"version": "1.0", "status": "completed", "server_count": count, "server_list": servers}
    )


def check_pull(owner: AnyNode, cluster: int, puller: AnyNode) -> None:
    """Pull blocks of every tensor and compare all bytes, also those that must not change."""
    key, label = BlocksCacheKey(cluster, 0), f"from {cluster}"
    for node, keys in ((owner, key), (puller, None)):
        if not node.do(nodes.has, label):
            node.do(nodes.make, label, "blocks", [8, 64], 4, keys)
        node.do(nodes.clear, label)
    owner.do(nodes.fill, label, cluster)
    puller.do(nodes.pull_blocks, key, label, [1, 2, 5], [0, 3, 4])
    theirs, ours = owner.do(nodes.read, label), puller.do(nodes.read, label)
    for there, here in zip(theirs, ours, strict=True):
        expected = np.zeros_like(here)
        expected[[0, 3, 4]] = there[[1, 2, 5]]
        np.testing.assert_array_equal(here, expected)


def nobody_listens(host: Host) -> bool:
    """Whether no process of a host listens, in time: what did may be closed a moment later."""
    return comes_true(lambda: not host.run("ss", "-Hltn"))


def connections_come_to(host: Host, count: int) -> bool:
    """Whether a host has so many connections, in time: others may be closed a moment later."""
    return comes_true(lambda: len(host.run("ss", "-Htn").splitlines()) == count)


def wait_all(members: Sequence[AnyNode], ids: list[int]) -> None:
    """Until the link of every member is OK."""
    for node, comm_id in zip(members, ids, strict=True):
        node.do(nodes.wait, comm_id)


def why(node: Node, comm_id: int = 1) -> str:
    """Why a link of a node does not come up."""
    with pytest.raises(RemoteError) as caught:
        node.do(nodes.wait, comm_id)
    return caught.value.text
