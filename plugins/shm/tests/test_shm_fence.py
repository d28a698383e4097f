"""The fence of an owner whose peer is lost, or whose own transfer hangs."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from datadist_shm import ShmTransport
from datadist_shm import link as shm_link
from datadist_shm.fence import PAGE
from datadist_shm.link import ShmLink
from datadist_shm.memory import Mapping

from datadist.transport import Access, Group, Peer, Placement, TransportOptions


class Owner:
    """An owner's link, and its fence page as the peer maps it."""

    def __init__(self, pidfd: int | None = None) -> None:
        self.transport = ShmTransport(TransportOptions())
        region = self.transport.allocate(PAGE, Placement.HOST)
        self.pidfd = os.pidfd_open(os.getpid()) if pidfd is None else pidfd
        peers = {0: Peer(0, "us"), 1: Peer(1, "them", os.getpid(), self.pidfd)}
        group = Group("fence", 0, peers, None, time.monotonic() + 60)
        link = self.transport.open(group, [region], Access.READ_WRITE)
        assert isinstance(link, ShmLink)
        self.link = link
        offer = self.link.offer(1)
        self._mapping = Mapping(offer.fds[-1], PAGE, writable=True)
        for fd in offer.fds:
            os.close(fd)
        self.words = (ctypes.c_int64 * 2).from_address(self._mapping.address)
        """Active, revoked."""


@pytest.fixture
def owner() -> Iterator[Owner]:
    made = Owner()
    with ExitStack() as stack:
        stack.callback(os.close, made.pidfd)
        stack.callback(made.transport.close)
        stack.callback(made.link.close)
        yield made
        made.words[0] = 0


def test_aborting_a_peer_revokes_its_access(owner: Owner) -> None:
    assert owner.words[1] == 0
    owner.link.abort(1)
    assert owner.words[1] == 1


def test_a_writer_inside_is_reported(owner: Owner) -> None:
    owner.words[0] = 1
    assert owner.link.close() == {1}
    assert owner.words[1] == 1


def test_a_writer_that_has_ended_is_gone_although_another_process_has_its_pid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shm_link, "FENCE_SECONDS", 60.0)
    with subprocess.Popen(["true"]) as process:
        pidfd = os.pidfd_open(process.pid)
    owner = Owner(pidfd)  # whose pid is that of this process, which lives
    owner.words[0] = 1
    began = time.monotonic()
    assert owner.link.close() == frozenset()
    assert time.monotonic() - began < 30, "nobody is waited for"
    owner.transport.close()
    os.close(pidfd)


def test_a_writer_inside_is_reported_also_when_our_own_transfer_hangs(owner: Owner) -> None:
    owner.words[0] = 1
    with owner.link._paths[1].lock:
        assert owner.link.close() == {1}
    assert owner.words[1] == 1
