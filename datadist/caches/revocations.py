"""Calls that run after peers have confirmed that they do not access memory any more."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from datadist.base.exclusive import Exclusive
from datadist.caches.peers import PeerView


@dataclass(eq=False)
class _Waiting:
    left: set[PeerView]
    """Peers that have to acknowledge yet."""
    then: Callable[[], object]


class Revocations:
    """Calls by the acknowledgements they wait for. Any thread; nothing here waits.

    Calls may come twice where an exception interrupted the thread that made them.
    """

    def __init__(self) -> None:
        self._state = Exclusive()
        self._order = itertools.count()
        self._waiting: dict[PeerView, list[tuple[int, int, _Waiting]]] = {}
        """Heaps by the number that the peer has to acknowledge."""

    def hand_over_to(self, post: Callable[[Callable[[], None]], object]) -> None:
        """See :class:`Exclusive`."""
        self._state.hand_over = post

    def when_acked(self, targets: Mapping[PeerView, int], then: Callable[[], object]) -> None:
        """Run ``then`` once every view has acknowledged its number, or is gone."""
        self._state.post(lambda: self._wait(targets, then))

    def settle(self) -> None:
        """Complete what an exception interrupted; waits for nobody."""
        self._state.serve(wait=False)

    def _wait(self, targets: Mapping[PeerView, int], then: Callable[[], object]) -> None:
        left = {view: seq for view, seq in targets.items() if not _answered(view, seq)}
        waiting = _Waiting(set(left), then)
        for view, seq in left.items():
            heap = self._waiting.setdefault(view, [])
            heapq.heappush(heap, (seq, next(self._order), waiting))
        if not left:
            then()

    def on_ack(self, view: PeerView, seq: int) -> None:
        """A peer has acknowledged up to ``seq``; on the control thread."""
        view.seq_acked = max(view.seq_acked, min(seq, view.seq_sent))
        self._state.post(lambda: self._settle(view))

    def on_gone(self, view: PeerView) -> None:
        """Nothing of a peer can reach us any more: it is marked as gone."""
        self._state.post(lambda: self._settle(view))

    def _settle(self, view: PeerView) -> None:
        heap = self._waiting.get(view, [])
        while heap and _answered(view, heap[0][0]):
            waiting = heap[0][2]
            waiting.left.discard(view)
            if not waiting.left:
                waiting.then()
            heapq.heappop(heap)
        if not heap:
            self._waiting.pop(view, None)


def _answered(view: PeerView, seq: int) -> bool:
    return view.gone or view.seq_acked >= seq
