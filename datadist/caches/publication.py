"""What peers are told of our caches, in order, and what they have yet to acknowledge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from datadist.base.exclusive import Exclusive
from datadist.caches.peers import PeerView
from datadist.caches.revocations import Revocations
from datadist.control.messages import NO_ANSWER, Directory, Entry, Message, Synced

__all__ = ["Publication"]

ENTRY_BYTES, BASE_BYTES, KEY_BYTES = 256, 48, 160
"""Most bytes in a message of an entry, of a tensor with its region in it, and of a key in it."""
PART_BYTES = 1 << 14
"""Bytes after which the next entry comes in another message of the directory."""


class Publication:
    """Sends the directory of an engine and its changes to the peers that subscribed. Any thread.

    ``state`` is that of the directory, whose changes call :meth:`publish`; ``settle`` completes what an
    exception interrupted there, and ``entries`` says what is in it.
    """

    def __init__(
        self,
        state: Exclusive,
        settle: Callable[[], None],
        entries: Callable[[], list[Entry]],
        revocations: Revocations,
    ) -> None:
        self._state = state
        self._settle = settle
        self._entries = entries
        self._revocations = revocations
        self._pending: set[PeerView] = set()
        """Peers that are subscribed, or have something unacknowledged."""

    def clear(self) -> None:
        """Forget everybody (finalize)."""
        self._pending.clear()

    def subscribe(self, view: PeerView) -> None:
        """Send everything to a peer, and changes from then on."""
        self._state.post(lambda: self._subscribe(view))

    def _subscribe(self, view: PeerView) -> None:
        if view.subscribed:
            return
        self._settle()
        self._pending.add(view)
        parts = list(_parts(self._entries()))
        for number, part in enumerate(parts, 1):
            first, last = number == 1, number == len(parts)
            view.send(Directory(seq=NO_ANSWER, reset=first, last=last, upsert=part))
        view.subscribed = True

    def answer_sync(self, view: PeerView, sync_id: int) -> None:
        """Tell a peer that it has heard everything that was published before."""
        self._state.post(lambda: view.send(Synced(id=sync_id)))

    def unsubscribe_unless(self, view: PeerView, linked: bool) -> None:
        """Stop sending changes to a peer that no link needs them for."""
        if not linked:
            self._state.post(lambda: setattr(view, "subscribed", False))

    def send_revocation(self, view: PeerView, make: Callable[[int], Message]) -> None:
        """Send a message that the peer acknowledges once none of its pulls is in its way."""

        def send() -> None:
            view.seq_sent += 1
            self._pending.add(view)
            view.send(make(view.seq_sent))

        self._state.run(send)

    def on_connection_lost(self, view: PeerView) -> None:
        """A peer's session is over, but it may still write: until :meth:`on_gone` nothing returns."""

        def keep() -> None:
            view.subscribed = False
            view.seq_sent += 1  # which it cannot acknowledge
            self._pending.add(view)

        self._state.post(keep)

    def on_gone(self, view: PeerView) -> None:
        """A peer's session is over, and nothing of it touches our memory."""

        def forget() -> None:
            view.subscribed = False
            view.gone = True
            self._pending.discard(view)
            self._revocations.on_gone(view)

        self._state.post(forget)

    def publish(
        self, upsert: list[Entry], remove: list[int], unbind: Sequence[tuple[int, int]] = ()
    ) -> dict[PeerView, int]:
        """Send a change to every subscriber; returns what each peer must acknowledge."""
        targets = {}
        for view in list(self._pending):
            if view.subscribed:
                view.seq_sent += 1
                view.send(
                    Directory.model_construct(  # up to 65,536 numbers, not checked again
                        seq=view.seq_sent, upsert=upsert, remove=remove, unbind=list(unbind)
                    )
                )
            elif view.seq_acked >= view.seq_sent:
                self._pending.discard(view)
                continue
            targets[view] = view.seq_sent
        return targets


def _parts(entries: list[Entry]) -> Iterator[list[Entry]]:
    """``entries`` in portions of bounded size; at least one, which may be empty."""
    part: list[Entry] = []
    size = 0
    for entry in entries:
        more = ENTRY_BYTES + BASE_BYTES * len(entry.bases) + KEY_BYTES * len(entry.bindings)
        if part and size + more > PART_BYTES:
            yield part
            part, size = [], 0
        part.append(entry)
        size += more
    yield part
