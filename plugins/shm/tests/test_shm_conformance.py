"""The shm transport against the conformance kit."""

from __future__ import annotations

import os

from datadist.testing import TransportConformance


class TestShmTransport(TransportConformance):
    """No settings are needed, but more time where the native code runs under a sanitizer."""

    transport = "shm"
    timeout_scale = float(os.environ.get("DATADIST_TIMEOUT_SCALE", "1"))
