"""Events of links that a program has not taken yet (events.py)."""

from __future__ import annotations

import select
from types import SimpleNamespace

import pytest

from datadist import LinkEvent, LinkEventKind
from datadist.links import events
from datadist.links.events import LinkEvents


def _readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def test_events_come_in_order_and_the_descriptor_tells_of_them() -> None:
    queue = LinkEvents()
    fd = queue.fileno()
    assert not _readable(fd)
    domain = SimpleNamespace(others={3: 1, 2: 0}, name="x", comm_id=7)
    queue.note(LinkEventKind.OK, domain)
    queue.note(LinkEventKind.BROKEN, domain, "it died", 3)
    assert _readable(fd)
    assert queue.take() == [
        LinkEvent(LinkEventKind.OK, 7, "x", (2, 3), None),
        LinkEvent(LinkEventKind.BROKEN, 7, "x", (3,), "it died"),
    ]
    assert not _readable(fd)
    assert queue.take() == []
    queue.close()


@pytest.mark.parametrize("asked", [False, True])
def test_the_oldest_are_dropped_and_the_loss_is_told(asked: bool) -> None:
    queue = LinkEvents()
    if asked:
        assert queue.take() == []
    most = events.MAX_EVENTS if asked else events.MAX_UNASKED
    many = [LinkEvent(LinkEventKind.OK, number, "x", (), None) for number in range(most + 3)]
    for event in many:
        queue.put(event)
    first, *rest = queue.take()
    assert first.kind is LinkEventKind.DROPPED
    assert first.reason is not None
    assert first.reason.startswith("3 older events were dropped")
    assert rest == many[3:]
    assert queue.take() == []
