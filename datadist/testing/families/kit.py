"""Shared by all families: the settings of a subclass, the processes, and skip conditions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import ClassVar

import pytest

from datadist.testing.bench import MIB, Bench, Linked, Memory, Settings
from datadist.testing.processes import Process
from datadist.transport import Access, Placement, TransportOptions

KINDS = ("host", "device", "foreign host", "foreign device")
"""Memory of the transport by placement, and memory of the user that it registers."""


class Kit:
    """Settings; see ``TransportConformance``."""

    transport: ClassVar[str]
    timeout_scale: ClassVar[float] = 1.0
    extra: ClassVar[dict[str, str]] = {}
    foreign_memory: ClassVar[str | None] = None
    _bench: ClassVar[Bench | None] = None

    @classmethod
    def transport_options(cls, rank: int) -> TransportOptions:
        """Options of the transport in the process of a rank."""
        return TransportOptions(device_id=rank, extra=dict(cls.extra))

    @classmethod
    def rank_table(cls, size: int) -> str:
        """Text of the rank table of a link of ``size`` ranks."""
        devices = [{"device_id": str(rank), "rank_id": str(rank)} for rank in range(size)]
        server = {"server_id": "127.0.0.1", "device": devices}
        return json.dumps(
            {"version": "1.0", "status": "completed", "server_count": "1", "server_list": [server]}
        )

    @classmethod
    def peer_address(cls, rank: int) -> str:
        """Network address of a rank, where ranks meet over the network."""
        return "127.0.0.1"

    @classmethod
    def setup_class(cls) -> None:
        """Start the processes for all tests of the class."""
        cls._bench = Bench(
            Settings(
                transport=cls.transport,
                scale=cls.timeout_scale,
                options=cls.transport_options,
                table=cls.rank_table,
                address=cls.peer_address,
                maker=cls.foreign_memory,
            )
        )

    @classmethod
    def teardown_class(cls) -> None:
        """End its processes."""
        if cls._bench is not None:
            cls._bench.close()

    @pytest.fixture
    def bench(self) -> Iterator[Bench]:
        """The processes and links, cleaned up after each test."""
        assert self._bench is not None
        yield self._bench
        self._bench.clean()


def memory_of(bench: Bench, process: Process, kind: str, size: int = MIB) -> Memory:
    """Memory of a kind of :data:`KINDS`, where the transport declares it."""
    declared = bench.capabilities
    placement = Placement.DEVICE if kind.endswith("device") else Placement.HOST
    if placement not in declared.placements:
        pytest.skip(f"capabilities.placements is without {placement}")
    foreign = kind.startswith("foreign")
    if foreign:
        need_foreign(bench, placement)
    return bench.allocate(process, size, placement, foreign)


def need_foreign(bench: Bench, placement: Placement) -> None:
    """Skip where memory of the user can not be registered, or not be made by the kit."""
    if not bench.capabilities.foreign_memory:
        pytest.skip("capabilities.foreign_memory is False")
    if placement not in bench.capabilities.host_addressable and not bench.settings.maker:
        pytest.skip(
            f"capabilities.host_addressable is without {placement}, and foreign_memory names no "
            "function that makes such memory"
        )


def need_write(bench: Bench) -> None:
    """Skip where peers cannot write."""
    if not bench.capabilities.one_sided_write:
        pytest.skip("capabilities.one_sided_write is False")


def need_passive(bench: Bench, passive: bool) -> None:
    """Skip unless the owner's part in a transfer is as stated."""
    if bench.capabilities.passive_target is not passive:
        pytest.skip(f"capabilities.passive_target is {not passive}")


def pair(
    bench: Bench, access: Access = Access.READ, size: int = MIB, write: bool = False
) -> tuple[Linked, Memory, Memory]:
    """A link of two ranks, and the memory of each. ``write`` needs and grants write access."""
    if write:
        need_write(bench)
        access = Access.READ_WRITE
    members = bench.processes(2)
    mine, theirs = (bench.allocate(members[rank], size) for rank in (0, 1))
    return bench.link(members, {0: [mine], 1: [theirs]}, access), mine, theirs
