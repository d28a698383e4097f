"""The shm transport against the conformance kit."""

from __future__ import annotations

from datadist.testing import TransportConformance


class TestShmTransport(TransportConformance):
    """No settings are needed."""

    transport = "shm"
