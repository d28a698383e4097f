"""One connection between two engines (session.py)."""

from __future__ import annotations

import os
import socket

import pytest

from datadist.control.messages import MAX_FDS, MAX_FRAME, OfferMessage, encode
from datadist.control.reactor import Reactor
from datadist.control.session import Session
from datadist.transport import Offer


def _offer(size: int, regions: int, fds: int = 0) -> OfferMessage:
    return OfferMessage.model_construct(
        domain="0" * 32, data=bytes(size), fds=fds, regions=list(range(regions))
    )


def test_descriptors_of_a_message_that_is_too_large_are_closed() -> None:
    ours, theirs = socket.socketpair()
    reactor = Reactor("test")
    session = Session(reactor, ours)
    fd = os.memfd_create("offered")
    try:
        with pytest.raises(ValueError, match=f"offer message .* exceeds {MAX_FRAME}"):
            session.send(_offer(MAX_FRAME, 1, 1), [fd])
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    finally:
        reactor.call(lambda: session.close("end"), 5)
        reactor.stop()
        theirs.close()


def test_the_largest_offer_fits_a_frame() -> None:
    assert len(encode(_offer(Offer.MAX_DATA, 130_000))) < MAX_FRAME
    assert Offer.MAX_FDS == MAX_FDS
