"""The rdma transport against the conformance kit."""

from __future__ import annotations

from datadist.testing import TransportConformance


class TestRdmaTransport(TransportConformance):
    """No settings are needed on a host with one adapter; emulated machines are slow."""

    transport = "rdma"
    timeout_scale = 5.0
