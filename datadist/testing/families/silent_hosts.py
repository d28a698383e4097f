"""Hosts that fall silent: no packet arrives, and nothing says so."""

from __future__ import annotations

import pytest

from datadist.base.texts import in_seconds
from datadist.testing import operations
from datadist.testing.families.kit import GRACE, Kit, need_write
from datadist.testing.far_hosts import FarHosts
from datadist.testing.rules import rule
from datadist.testing.testbed import MIB, Linked, Memory, Testbed
from datadist.transport import Access, TransferError

WAIT = 2.0
"""Seconds of a timeout, times the scale."""


class SilentHosts(Kit):
    """Only with ``far``, and only where its hosts are network namespaces."""

    @rule("Link.read", "Link.write", "TransferTimeout", "Transport.peer_lost", "Link.close")
    @pytest.mark.parametrize("direction", ["read", "write"])
    def test_a_host_that_falls_silent_is_given_up(self, testbed: Testbed, direction: str) -> None:
        """Transfers end by their deadlines; others are reached; what is given up can be linked again."""
        hosts = need_cables(testbed)
        write = direction == "write"
        if write:
            need_write(testbed)
        linked, memory = _three(testbed, Access.READ_WRITE if write else Access.READ)
        hosts.cut(1)
        try:
            _check_ends(linked, memory, write)
            linked.lose(0, 1)
            linked.lose(2, 1)
            outcome = linked.move(0, 2, memory[0], memory[2], [(0, 0, 1000)])
            outcome.must_succeed("from a host that is still there")
            linked.close(0)
            linked.close(2)
        finally:
            hosts.mend(1)
        linked.lose(1, 0)
        linked.lose(1, 2)
        linked.close_all()
        again, memory = _three(testbed, Access.READ)
        again.close_all()


def need_cables(testbed: Testbed) -> FarHosts:
    """The hosts, whose cables can be cut; skips where there are none."""
    hosts = testbed.settings.hosts
    if hosts is None:
        pytest.skip("far is False: all ranks are on this host")
    if hosts.kind != "namespaces":
        pytest.skip("far is 'directories': loopback has no cable to cut")
    return hosts


def _three(testbed: Testbed, access: Access) -> tuple[Linked, list[Memory]]:
    members = testbed.processes(3)
    memory = [testbed.allocate(members[rank], MIB) for rank in members]
    linked = testbed.link(members, {rank: [m] for rank, m in enumerate(memory)}, access)
    for other in (1, 2):
        outcome = linked.move(0, other, memory[0], memory[other], [(0, 0, 4096)])
        outcome.must_succeed(f"a first read from rank {other}")
    return linked, memory


def _check_ends(linked: Linked, memory: list[Memory], write: bool) -> None:
    order = linked.order(0, 1, memory[0], memory[1], [(0, 0, MIB)], write=write, timeout=WAIT)
    limit = (WAIT + GRACE) * linked.scale
    outcome = linked.members[0].do(operations.move, order, timeout=order.timeout + 60)
    what = f"a transfer with a host that is silent, within {in_seconds(WAIT * linked.scale)}"
    outcome.must_be(TransferError, what)
    outcome.must_end_within(limit, what)
