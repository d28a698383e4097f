"""Sides whose session has ended while the peer may still take bytes of our writes.

The peer may be stopped, or its engine may have messages that came before the end of the connection. The
memory of such writes is settled when the peer has ended its side (it says so, or begins a new session
with us), or when it is gone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial

from datadist.base.pidfds import has_ended
from datadist.messaging.loop import Loop
from datadist.messaging.session import Session
from datadist.messaging.side import Side
from datadist.transport import Peer

__all__ = ["Unconfirmed"]

log = logging.getLogger("datadist.messaging")


class Unconfirmed:
    """By the peer's incarnation. On the engine's thread."""

    def __init__(self, loop: Loop, on_confirmed: Callable[[Side], None]) -> None:
        self._loop = loop
        self._on_confirmed = on_confirmed
        self._sides: dict[str, dict[Side, Session]] = {}
        self._pidfds: dict[str, int] = {}

    def __contains__(self, side: Side) -> bool:
        return side in self._sides.get(side.incarnation or "", ())

    def waits_for(self, incarnation: str) -> bool:
        """Whether something of this peer is not confirmed."""
        return incarnation in self._sides

    def add(self, session: Session, pidfd: int | None) -> None:
        """The session has ended; owns the descriptor of the peer's process, which nobody watches."""
        name = session.incarnation
        self._sides.setdefault(name, {}).update(dict.fromkeys(session.unconfirmed, session))
        if pidfd is None:
            return
        if name in self._pidfds:
            os.close(pidfd)
            return
        try:
            self._loop.watch(pidfd, partial(self.confirm_all, name))
        except OSError as error:
            log.warning("the end of a peer will be known from core only: %s", error)
            os.close(pidfd)
        else:
            self._pidfds[name] = pidfd

    def confirm(self, side: Side) -> None:
        """The peer has ended its side."""
        name = side.incarnation or ""
        sides = self._sides.get(name, {})
        if sides.pop(side, None) is None:
            return
        side.fenced = True
        if not sides:
            self._forget(name)
        self._on_confirmed(side)

    def confirm_all(self, incarnation: str) -> None:
        """The peer's process has ended."""
        for side in list(self._sides.get(incarnation, ())):
            self.confirm(side)

    def greeted(self, incarnation: str, begun: int) -> None:
        """A session of the peer greets us: what belonged to earlier ones has ended there."""
        for side in list(self._sides.get(incarnation, ())):
            if side.peer_begun < begun:
                self.confirm(side)

    def lost(self, peer: Peer) -> None:
        """Core has lost the peer. Where its process can be watched, that one's end is waited for."""
        pidfd = self._pidfds.get(peer.incarnation)
        if pidfd is None or has_ended(pidfd):
            for side, session in list(self._sides.get(peer.incarnation, {}).items()):
                if session.connection is peer.connection:
                    self.confirm(side)

    def close(self) -> None:
        """Give the descriptors back; nothing is confirmed any more."""
        for incarnation in list(self._sides):
            self._forget(incarnation)

    def _forget(self, incarnation: str) -> None:
        self._sides.pop(incarnation, None)
        pidfd = self._pidfds.pop(incarnation, None)
        if pidfd is not None:
            self._loop.unwatch(pidfd)
            os.close(pidfd)
