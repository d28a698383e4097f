"""The thread that maps a peer's pages ahead: what it does, and whom it lets go first."""

from __future__ import annotations

import errno
import os
import time
from array import array

from datadist_shm import ShmTransport
from datadist_shm.memory import PeerFile, PeerMapping, PoolRegion

from datadist.transport import Access, Group, Peer, Placement, TransportOptions
from tests import processors, seccomp
from tests.privileges import in_child
from tests.resident import resident
from tests.waiting import until

SIZE = 128 << 20
LEAST = SIZE - 4 * 65536
"""The kernel passes over neighbours of a page that are locked."""
STRETCH, PAUSES = 4 << 20, 0.063
"""Bytes that are mapped at a time, and seconds before each where others need the processors."""


def _pool() -> PoolRegion:
    region = ShmTransport(TransportOptions()).allocate(SIZE, Placement.HOST)
    assert isinstance(region, PoolRegion)
    region.wait_filled(60)
    return region


@processors.needed
def test_pages_that_exist_are_mapped_slowly_while_others_need_the_processors() -> None:
    pool = _pool()
    with processors.busy():
        began = time.monotonic()
        mapping = PeerMapping(
            pool.fd, SIZE, writable=False, huge=False, file=PeerFile((0, 0), False), search=True
        )
        time.sleep(0.5)
        mapped = resident(mapping.address)
        assert mapped <= STRETCH * (1 + (time.monotonic() - began) / PAUSES)
    until(lambda: resident(mapping.address) > LEAST)
    pool.close()


@seccomp.needed
def test_the_kernel_is_not_asked_for_each_page_of_a_pool_that_has_all() -> None:
    """They stay: its owner has given up the right to punch holes."""

    def look() -> object:
        mine, theirs = _pool(), _pool()
        peers = {0: Peer(0, "owner", os.getpid()), 1: Peer(1, "reader", os.getpid())}
        offering, link = (
            ShmTransport(TransportOptions(extra={"populate": "0"})).open(
                Group("pair", rank, peers, None, 1e12), [region], Access.READ
            )
            for rank, region in enumerate((theirs, mine))
        )
        link.attach(0, offering.offer(1))
        seccomp.install(["mincore"], errno.ENOMEM)  # which is no refusal: it knows of no page
        local, remote, length = (array("q", [n]) for n in (mine.address, theirs.address, SIZE))
        link.read(0, local, remote, length, 60)
        (mapping,) = link._paths[0].keepers
        return resident(mapping.address) > LEAST

    assert in_child(look) == "True"
