"""Shared by all families: the settings of a subclass, the processes, and skip conditions."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import pytest

from datadist.base.texts import in_seconds
from datadist.testing import operations
from datadist.testing.far_hosts import AUTOMATIC, FarHosts, Host
from datadist.testing.outcome import Outcome
from datadist.testing.processes import Process
from datadist.testing.testbed import MIB, Linked, Memory, Segments, Settings, Testbed
from datadist.transport import Access, Placement, TransferTimeout, TransportOptions

KINDS = ("host", "device", "foreign host", "foreign device")
"""Memory of the transport by placement, and memory of the user that it registers."""

GRACE = 1.0
"""Seconds that a call may end late, times the scale; a tolerance for busy machines."""
TOO_LONG = 2
"""How often that time fits into a transfer whose deadline is tested."""

NEEDS_ASSERT = (
    "the conformance kit checks with assert, which `python -O` and PYTHONOPTIMIZE turn off: run it "
    "without them"
)


CANNOT_BE_FAR = "capabilities.same_host_only is True: its ranks cannot be on different hosts"


class Kit:
    """Settings; see ``TransportConformance``."""

    transport: ClassVar[str]
    timeout_scale: ClassVar[float] = 1.0
    extra: ClassVar[dict[str, str]] = {}
    foreign_memory: ClassVar[str | None] = None
    trusting_asker: ClassVar[str | None] = None
    far: ClassVar[bool | str] = False
    far_hosts: ClassVar[int] = 4
    _hosts: ClassVar[FarHosts | None] = None
    _testbed: ClassVar[Testbed | None] = None

    @classmethod
    def transport_options(cls, rank: int) -> TransportOptions:
        """Options of the transport in the process of a rank."""
        host = cls.host(rank)
        if host is None:
            return TransportOptions(device_id=rank, extra=dict(cls.extra))
        return TransportOptions(
            device_id=rank,
            listen_address=host.address,
            auth_key=host.auth_key.encode(),
            extra={name: host.fill(value) for name, value in cls.extra.items()},
        )

    @classmethod
    def rank_table(cls, size: int) -> str:
        """Text of the rank table of a link of ``size`` ranks."""
        places = [cls.peer_address(rank) for rank in range(size)]
        devices = [{"device_id": str(rank), "rank_id": str(rank)} for rank in range(size)]
        servers = [
            {
                "server_id": place,
                "device": [d for d, p in zip(devices, places, strict=True) if p == place],
            }
            for place in dict.fromkeys(places)
        ]
        return json.dumps({
            "version": "1.0", "status": "completed", "server_count": str(len(servers)),
            "server_list": servers,
        })  # fmt: skip

    @classmethod
    def peer_address(cls, rank: int) -> str:
        """Network address of a rank, where ranks meet over the network."""
        host = cls.host(rank)
        return "127.0.0.1" if host is None else host.address

    @classmethod
    def host(cls, rank: int) -> Host | None:
        """The host of a rank where ``far`` is set and the tests have begun, else None."""
        return None if cls._hosts is None else cls._hosts.host(rank)

    @classmethod
    def setup_class(cls) -> None:
        """Start the processes for all tests of the class. Raises ``RuntimeError`` under `python -O`."""
        if not __debug__:
            raise RuntimeError(NEEDS_ASSERT)
        if cls.far:
            cls.set_up_far()
        else:
            cls._testbed = cls._new_testbed()

    @classmethod
    def set_up_far(cls) -> tuple[FarHosts, Testbed]:
        """Make the hosts and processes, if they are not made yet.

        Raises :class:`~datadist.testing.far_hosts.FarHostsError`.
        """
        if cls._hosts is None:
            cls._hosts = FarHosts(cls.far_hosts, AUTOMATIC if cls.far is True else str(cls.far))
        if cls._testbed is None:
            cls._testbed = cls._new_testbed()
        return cls._hosts, cls._testbed

    @classmethod
    def _new_testbed(cls) -> Testbed:
        return Testbed(
            Settings(
                transport=cls.transport,
                scale=cls.timeout_scale,
                options=cls.transport_options,
                table=cls.rank_table,
                address=cls.peer_address,
                maker=cls.foreign_memory,
                trusting_asker=cls.trusting_asker,
                hosts=cls._hosts,
            )
        )

    @classmethod
    def teardown_class(cls) -> None:
        """End its processes."""
        try:
            if cls._testbed is not None:
                cls._testbed.close()
        finally:
            if cls._hosts is not None:
                cls._hosts.close()
            cls._testbed = cls._hosts = None

    @pytest.fixture
    def testbed(self) -> Iterator[Testbed]:
        """The processes and links, cleaned up after each test."""
        assert self._testbed is not None, "setup_class of the kit was not called"
        if self.far and self._testbed.capabilities.same_host_only:
            pytest.skip(CANNOT_BE_FAR)
        yield self._testbed
        self._testbed.clean()


def memory_of(testbed: Testbed, process: Process, kind: str, size: int = MIB) -> Memory:
    """Memory of a kind of :data:`KINDS`, where the transport declares it."""
    declared = testbed.capabilities
    placement = Placement.DEVICE if kind.endswith("device") else Placement.HOST
    if placement not in declared.placements:
        pytest.skip(f"capabilities.placements is without {placement}")
    foreign = kind.startswith("foreign")
    if foreign:
        need_foreign(testbed, placement)
    return testbed.allocate(process, size, placement, foreign)


def need_foreign(testbed: Testbed, placement: Placement) -> None:
    """Skip where memory of the user can not be registered, or not be made by the kit."""
    if not testbed.capabilities.foreign_memory:
        pytest.skip("capabilities.foreign_memory is False")
    if placement not in testbed.capabilities.host_addressable and not testbed.settings.maker:
        pytest.skip(
            f"capabilities.host_addressable is without {placement}, and foreign_memory names no "
            "function that makes such memory"
        )


def need_write(testbed: Testbed) -> None:
    """Skip where peers cannot write."""
    if not testbed.ask_link().one_sided_write:
        pytest.skip("capabilities.one_sided_write is False")


def need_passive(testbed: Testbed, passive: bool) -> None:
    """Skip unless the owner's part in a transfer is as stated."""
    if testbed.ask_link().passive_target is not passive:
        pytest.skip(f"capabilities.passive_target is {not passive}")


def pair(
    testbed: Testbed, access: Access = Access.READ, size: int = MIB, write: bool = False
) -> tuple[Linked, Memory, Memory]:
    """A link of two ranks, and the memory of each. ``write`` needs and grants write access."""
    if write:
        need_write(testbed)
        access = Access.READ_WRITE
    members = testbed.processes(2)
    mine, theirs = (testbed.allocate(members[rank], size) for rank in (0, 1))
    return testbed.link(members, {0: [mine], 1: [theirs]}, access), mine, theirs


@contextmanager
def timed_out(
    testbed: Testbed, linked: Linked, mine: Memory, theirs: Memory, *, write: bool, wait: float,
    stopped: bool,
) -> Iterator[Outcome]:  # fmt: skip
    """A transfer of all of both memories between ranks 0 and 1 that had to end by its deadline.

    It waits for a peer that is ``stopped``, until the context ends, or it copies the same bytes so
    often that it takes several times as long as it may.
    """
    limit = wait * testbed.scale
    what = f"a transfer that cannot end in {in_seconds(limit)}"
    segments: Segments = [(0, 0, mine.size)]
    if stopped:
        linked.members[1].pause()
    else:
        segments = [*segments] * _repeats(linked, mine, theirs, write, TOO_LONG * (wait + GRACE))
    try:
        outcome = _attempt(linked, mine, theirs, segments, write, wait)
        while (
            outcome.ok and outcome.seconds < limit and not stopped
        ):  # the machine is less busy now
            segments = [*segments] * 3
            outcome = _attempt(linked, mine, theirs, segments, write, wait)
        outcome.must_be(TransferTimeout, what)
        outcome.must_end_within(limit + GRACE * testbed.scale, what)
        yield outcome
    finally:
        if stopped:
            linked.members[1].resume()


def _attempt(
    linked: Linked, mine: Memory, theirs: Memory, segments: Segments, write: bool, wait: float
) -> Outcome:
    order = linked.order(0, 1, mine, theirs, segments, write=write, timeout=wait)
    outcome: Outcome = linked.members[0].do(operations.move, order, timeout=order.timeout + 60)
    return outcome


def _repeats(linked: Linked, mine: Memory, theirs: Memory, write: bool, seconds: float) -> int:
    """How often a segment takes ``seconds``, times the scale, even when the machine is idle."""
    some = [(0, 0, mine.size)] * 8
    tries = [linked.move(0, 1, mine, theirs, some, write=write, timeout=60) for _ in range(2)]
    for outcome in tries:
        outcome.must_succeed("a transfer without a short timeout")
    return 8 * math.ceil(seconds * linked.scale / min(o.seconds for o in tries))
