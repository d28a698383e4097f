"""What becomes of links, for a program that takes it in one call (`link_events`)."""

from __future__ import annotations

import itertools
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any

from datadist.base.event_queue import EventQueue
from datadist.base.keywords import named_keywords
from datadist.base.names import NamedMembers

__all__ = ["MAX_EVENTS", "LinkEvent", "LinkEventKind", "LinkEvents"]

MAX_EVENTS = 4096
"""Events that wait for a program; the oldest ones go when there are more."""
MAX_UNASKED = 64
"""Events that wait for a program that has not asked for any yet, and may never do."""


class LinkEventKind(Enum, metaclass=NamedMembers):
    """What happened to a link."""

    OK = "ok"
    """It can be used."""
    FAILED = "failed"
    """It was not formed."""
    BROKEN = "broken"
    """A member was lost, or the transport can no longer reach it."""
    GONE = "gone"
    """A member has unlinked, or ended in an orderly way."""
    DROPPED = "dropped"
    """No event of a link: the program has not taken events in time, and the oldest ones are lost."""


@named_keywords
@dataclass(frozen=True)
class LinkEvent:
    """One event of one link."""

    kind: LinkEventKind
    comm_id: int | None
    """None for a link of `link_clusters`."""
    name: str
    cluster_ids: tuple[int, ...]
    """The other members, of BROKEN and GONE the one that it is about; ascending."""
    reason: str | None
    """Why; None of OK."""


class LinkEvents(EventQueue[LinkEvent]):
    """The events of one engine; any thread puts and takes, and nothing is locked."""

    __slots__ = ("_dropped", "_most")

    def __init__(self) -> None:
        super().__init__()
        self._most = MAX_UNASKED
        self._dropped = itertools.count()
        """Counts the events that were dropped since the last :meth:`take`."""

    def note(
        self,
        kind: LinkEventKind,
        domain: Any,
        reason: str | None = None,
        cluster: int | None = None,
    ) -> None:
        """Put an event of a domain; ``cluster`` is the member that it is about, if it is one."""
        clusters = sorted(domain.others) if cluster is None else [cluster]
        comm_id = getattr(domain, "comm_id", None)
        self.put(LinkEvent(kind, comm_id, domain.name, tuple(clusters), reason))

    def put(self, event: LinkEvent) -> None:
        """Add an event; the oldest one goes where there are too many."""
        while len(self._events) >= self._most:
            with suppress(IndexError):  # another thread took it
                self._events.popleft()
                next(self._dropped)
        super().put(event)

    def take(self) -> list[LinkEvent]:
        """All events, oldest first; before them one that tells how many were dropped, if any were."""
        self._most = MAX_EVENTS
        dropped, self._dropped = self._dropped, itertools.count()
        lost = next(dropped)
        taken = super().take()
        if lost:
            text = f"{lost} older events were dropped: link_events was not called in time"
            taken.insert(0, LinkEvent(LinkEventKind.DROPPED, None, "", (), text))
        return taken

    def fileno(self) -> int:
        """As that of the base class; the program has asked for events with that."""
        self._most = MAX_EVENTS
        return super().fileno()
