"""Transports between real servers: each moves all prompts, and tokens are those of one instance."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import random
import re
from pathlib import Path

import pytest
from harness.models import prompt
from harness.pair import Pair
from harness.resources import processes_of
from harness.servers import Place, Server

from tests import hosts
from tests.hosts import KEY, Host, network

MIB = 1 << 20
CACHE_BYTES = 1 << 30
"""Of one server, as the harness starts it."""
CLONE_NEWNET = 0x40000000
needs_nixl = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("nixl_cu12", "datadist_nixl")),
    reason="NIXL is not installed: pip install --no-deps nixl-cu12==1.5.1 ./plugins/nixl",
)


def _check(pair: Pair, transport: str) -> None:
    """Prompts of several lengths, some at once; each load is a line of the log with its transport."""
    generator = random.Random(31)
    prompts = [prompt(generator, length) for length in (3, 51, 205, 400, 700, 90)]
    got = pair.through_proxy(prompts, at_once=3)
    assert pair.transferred() > 0
    assert pair.computed() == 0
    assert pair.decode.metric("vllm:datadist_failed_loads_total") == 0
    loads = [line for line in pair.decode.log.read_text().splitlines() if " came from " in line]
    assert len(loads) == len(prompts)
    assert [line for line in loads if f" over {transport} in " not in line] == []
    pair.wait_until_free()
    assert got == pair.alone(prompts)


def _mapped(server: Server) -> set[str]:
    """The inodes of anonymous files, as large as a KV cache, that a process of a server maps."""
    found = set()
    for pid in processes_of(server):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            begin, end, inode = re.match(r"(\w+)-(\w+) \S+ \S+ \S+ (\d+)", line).groups()  # type: ignore[union-attr]
            if "/memfd:" in line and int(end, 16) - int(begin, 16) >= CACHE_BYTES:
                found.add(inode)
    return found


def test_shm_maps_the_caches_of_both(directory: Path) -> None:
    place = directory / "shm"
    place.mkdir()
    with Pair("gqa", place, extra={"backend": "shm"}) as pair:
        _check(pair, "shm")
        assert "KV cache in a pool" in pair.decode.log.read_text()
        mapped = _mapped(pair.prefill)  # the cache of each is memory that can be shared
        assert len(mapped) == 2
        assert mapped == _mapped(pair.decode)


@needs_nixl
def test_nixl_on_one_host(directory: Path) -> None:
    place = directory / "nixl"
    place.mkdir()
    with Pair("gqa", place, extra={"backend": "nixl"}) as pair:
        _check(pair, "nixl")


@needs_nixl
@hosts.needed
@pytest.mark.parametrize("backend", ["shm+nixl", "nixl"])
def test_two_hosts(backend: str, directory: Path) -> None:
    """Two network namespaces with runtime directories of their own; the proxy is on a third."""
    place = directory / f"hosts-{backend}"
    place.mkdir()
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        with network(3) as net:
            places = (_place(net.hosts[0], "run1", backend), _place(net.hosts[1], "run2", backend))
            hosts.enter(None, net.hosts[2].namespace)
            with Pair("gqa", place, env={"DATADIST_AUTH_KEY": KEY}, places=places) as pair:
                _check(pair, "nixl")
    finally:
        _return(home)


def _place(host: Host, runtime: str, backend: str) -> Place:
    return Place(
        host=host.ipv4,
        enter=("nsenter", f"--net={host.namespace}"),
        settings={"backend": backend, "listen_host": host.ipv4},
        runtime=runtime,
    )


def _return(namespace: int) -> None:
    """Back to the network namespace of a descriptor, which is closed."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        if libc.setns(namespace, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(namespace)
