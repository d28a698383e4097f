"""The conformance kit on the hccl transport, over the simulator."""

from __future__ import annotations

import shutil
import tempfile
from typing import ClassVar

import hccl_sim
import pytest

from datadist.testing import TransportConformance
from datadist.transport import TransportOptions


class TestHccl(TransportConformance):
    """Every rank on a server of its own, so that RDMA reaches memory of the host too."""

    transport = "hccl"
    foreign_memory = "hccl_sim:make_memory"
    _patch: ClassVar[pytest.MonkeyPatch]
    _meeting: ClassVar[str]

    @classmethod
    def setup_class(cls) -> None:
        """Processes of the bench inherit the simulator."""
        cls._meeting = tempfile.mkdtemp(prefix="hccl-sim-", dir="/tmp")
        cls._patch = pytest.MonkeyPatch()
        for name, value in hccl_sim.environment(cls._meeting).items():
            cls._patch.setenv(name, value)
        super().setup_class()

    @classmethod
    def teardown_class(cls) -> None:
        """End the bench first."""
        super().teardown_class()
        cls._patch.undo()
        shutil.rmtree(cls._meeting)

    @classmethod
    def transport_options(cls, rank: int) -> TransportOptions:
        """The first device of each server."""
        return TransportOptions(device_id=0)

    @classmethod
    def rank_table(cls, size: int) -> str:
        """A server per rank."""
        return hccl_sim.table(size)
