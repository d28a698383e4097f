"""The nixl transport against the conformance kit."""

from __future__ import annotations

import os

import nixl_skips
from datadist_nixl.library import HOST
from datadist_nixl.link import NixlLink
from datadist_nixl.memory import Ranges

from datadist.testing import TransportConformance


def ask_for_anything(link: NixlLink, rank: int) -> None:
    """Ask this rank for any range, and write where it has granted READ only."""
    side = link._sides[rank]
    side.theirs = Ranges([(0, (1 << 63) - 1, HOST)])
    side.may_write = True


@nixl_skips.needed
class TestNixlTransport(TransportConformance):
    """UCX on `lo`."""

    transport = "nixl"
    trusting_asker = "test_nixl_conformance:ask_for_anything"
    timeout_scale = float(os.environ.get("DATADIST_TIMEOUT_SCALE", "1"))
