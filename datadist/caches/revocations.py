"""What waits until peers have let go of memory: page returns, and calls that must be certain."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from datadist.caches.peers import PeerView


@dataclass(eq=False)
class _Waiting:
    left: int
    """Peers that have to acknowledge yet."""
    then: Callable[[], None]


class Revocations:
    """Calls by the acknowledgements they wait for. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._order = itertools.count()
        self._waiting: dict[PeerView, list[tuple[int, int, _Waiting]]] = {}
        """Heaps by the number that the peer has to acknowledge."""

    def when_acked(self, targets: Mapping[PeerView, int], then: Callable[[], None]) -> None:
        """Run ``then`` once every view has acknowledged its number, or is gone."""
        with self._lock:
            left = {
                view: seq for view, seq in targets.items() if not view.gone and view.seq_acked < seq
            }
            waiting = _Waiting(len(left), then)
            for view, seq in left.items():
                heap = self._waiting.setdefault(view, [])
                heapq.heappush(heap, (seq, next(self._order), waiting))
        if not left:
            then()

    def on_ack(self, view: PeerView, seq: int) -> None:
        """A peer has acknowledged up to ``seq``."""
        with self._lock:
            view.seq_acked = max(view.seq_acked, min(seq, view.seq_sent))
        self._settle(view, view.seq_acked)

    def on_gone(self, view: PeerView) -> None:
        """Nothing of a peer can reach us any more."""
        self._settle(view, None)

    def _settle(self, view: PeerView, seq: int | None) -> None:
        done = []
        with self._lock:
            heap = self._waiting.get(view, [])
            while heap and (seq is None or heap[0][0] <= seq):
                waiting = heapq.heappop(heap)[2]
                waiting.left -= 1
                if not waiting.left:
                    done.append(waiting)
            if not heap:
                self._waiting.pop(view, None)
        for waiting in done:
            waiting.then()
