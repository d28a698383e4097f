"""The class that `datadist conformance` runs; the command gives it its settings."""

from datadist.testing import TransportConformance


class TestTransport(TransportConformance):
    """See `datadist.cli.conformance`."""
