"""For the conformance kit: askers over :class:`datadist.messaging.MessagingTransport` that check nothing.

Authors of engines name it in their test suite::

    class TestAcme(TransportConformance):
        transport = "acme"
        trusting_asker = "datadist.testing.messaging_asker:ask_for_anything"
"""

from __future__ import annotations

from dataclasses import replace

from datadist.messaging.link import MessagingLink
from datadist.messaging.pieces import Spans

__all__ = ["ask_for_anything"]

EVERYTHING = (0, (1 << 63) - 1)


def ask_for_anything(link: MessagingLink, rank: int) -> None:
    """Ask this rank for any range, and write where it has granted READ only."""
    side = link._sides[rank]
    assert side.offer is not None, "the rank was not attached"
    side.theirs = Spans([EVERYTHING])
    side.offer = replace(side.offer, writable=True)
