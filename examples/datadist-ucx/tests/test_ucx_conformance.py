"""The transport against the conformance kit of datadist."""

from __future__ import annotations

from datadist.testing import TransportConformance


class TestUcxTransport(TransportConformance):
    """Askers that check nothing are those of the base class."""

    transport = "ucx"
    trusting_asker = "datadist.testing.messaging_asker:ask_for_anything"


class TestUcxBetweenHosts(TestUcxTransport):
    """The ranks are on hosts of their own."""

    far = True
    extra = {"device": "{device}"}  # noqa: RUF012 - replaced, never changed
