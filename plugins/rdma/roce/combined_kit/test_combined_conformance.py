"""shm and rdma together against the conformance kit: ranks that are near, and ranks that are far."""

from __future__ import annotations

from datadist.testing import TransportConformance


class TestNear(TransportConformance):
    """All ranks meet over the Unix socket, so shm links them; rdma registers the memory too."""

    transport = "shm+rdma"
    timeout_scale = 5.0


class TestFar(TransportConformance):
    """The first two ranks meet over the network, by rdma; each other rank is near to one of them."""

    transport = "shm+rdma"
    timeout_scale = 5.0
    far = "directories"
    far_hosts = 2
