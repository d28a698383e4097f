"""Peers whose connection ended while their process lives, where peers may write.

A connection can end while the peer lives: the peer did not read, or sent an invalid message. Its
process may be stopped in the middle of a write. So the memory that it can write is not reused until
its process has ended, or until closing the link shows that it is not writing. Where the kernel gives no
descriptor of the process, only the latter can show it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass

from datadist.base.pidfds import has_ended
from datadist.caches.owned import OwnDirectory
from datadist.caches.peers import PeerView
from datadist.control.reactor import READ, Reactor
from datadist.control.session import Descriptor
from datadist.links.building import Builder
from datadist.links.domain import Attempt

log = logging.getLogger("datadist.link")

LOOK_SECONDS = 0.01
"""From one look to the next whether this process has written all that a peer had sent."""


@dataclass
class _LostPeer:
    view: PeerView
    process: Descriptor | None
    inside: bool = False
    """Whether it was inside when a link to it was closed."""


class LostPeers:
    """Decides when a lost peer cannot touch our memory any more. Runs on the reactor."""

    def __init__(
        self, reactor: Reactor, builder: Builder, owned: OwnDirectory, one_sided: bool
    ) -> None:
        self._reactor = reactor
        self._builder = builder
        self._owned = owned
        self._one_sided = one_sided
        self._lost_peers: dict[str, list[_LostPeer]] = {}
        """By incarnation: one for each of its sessions that was lost."""
        builder.on_closed = self._on_closed

    def on_lost(
        self, view: PeerView, process: Descriptor | None, unseen: bool, abort: Callable[[], None]
    ) -> None:
        """A session ended; ``process`` is its peer's, where it is on this host.

        ``unseen``: it is on this host, and the kernel gives no descriptor of it. ``abort`` ends what its
        links do, which must be before memory is used again.
        """
        incarnation = view.incarnation
        if unseen:
            inside = incarnation in self._builder.writers
            may_write = self._one_sided and (inside or self._builder.reaches(incarnation))
        else:
            inside = False
            may_write = self._may_write(view) and process is not None and not has_ended(process.fd)
        try:
            abort()
        finally:
            if may_write:
                self._watch(_LostPeer(view, process, inside))
            else:
                self._on_gone(view)

    def _watch(self, lost_peer: _LostPeer) -> None:
        view, process = lost_peer.view, lost_peer.process
        self._owned.publication.on_connection_lost(view)
        self._lost_peers.setdefault(view.incarnation, []).append(lost_peer)
        if process is not None:
            self._reactor.watch(process.fd, READ, lambda _: self._clear(view.incarnation))

    def _on_gone(self, view: PeerView) -> None:
        """The peer touches nothing any more; this process itself may still write what it had sent."""
        if self._one_sided and self._builder.is_writing(view.incarnation):
            self._owned.publication.on_connection_lost(view)
            self._reactor.later(LOOK_SECONDS, lambda: self._on_gone(view))
        else:
            self._owned.publication.on_gone(view)

    def _may_write(self, view: PeerView) -> bool:
        unanswered = view.seq_acked < view.seq_sent
        return self._one_sided and (unanswered or self._builder.reaches(view.incarnation))

    def _on_closed(self, attempt: Attempt, possible_writers: frozenset[int]) -> None:
        """A link was closed, on any thread; ``possible_writers`` ranks were inside our memory."""
        self._reactor.post(lambda: self._check_writers(attempt, possible_writers))

    def _check_writers(self, attempt: Attempt, possible_writers: frozenset[int]) -> None:
        for rank, member in attempt.members.items():
            incarnation = member.incarnation
            lost_peers = self._lost_peers.get(incarnation, [])
            for lost_peer in lost_peers:
                lost_peer.inside = lost_peer.inside or rank in possible_writers
            inside = any(lost_peer.inside for lost_peer in lost_peers)
            if lost_peers and not inside and not self._builder.reaches(incarnation):
                self._clear(incarnation)

    def _clear(self, incarnation: str) -> None:
        for lost_peer in self._lost_peers.pop(incarnation, []):
            self._unwatch(lost_peer)
            self._on_gone(lost_peer.view)

    def _unwatch(self, lost_peer: _LostPeer) -> None:
        if lost_peer.process is not None:
            self._reactor.unwatch(lost_peer.process.fd)

    def close(self) -> None:
        """Watch them no more, as the engine ends."""
        for lost_peer in itertools.chain(*self._lost_peers.values()):
            self._unwatch(lost_peer)
        self._lost_peers.clear()
