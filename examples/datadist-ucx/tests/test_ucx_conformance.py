"""The transport against the conformance kit of datadist."""

from __future__ import annotations

from datadist.testing import TransportConformance


class TestUcxTransport(TransportConformance):
    """No settings are needed."""

    transport = "ucx"
