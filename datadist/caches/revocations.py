"""What waits until peers have let go of memory: page returns, and calls that must be certain."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from datadist.caches.peers import PeerView


@dataclass(eq=False)
class _Waiting:
    targets: dict[PeerView, int]
    then: Callable[[], None]


class Revocations:
    """Calls by the acknowledgements they wait for. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []

    def when_acked(self, targets: Mapping[PeerView, int], then: Callable[[], None]) -> None:
        """Run ``then`` once every view has acknowledged its number, or is gone."""
        with self._lock:
            left = {
                view: seq for view, seq in targets.items() if not view.gone and view.seq_acked < seq
            }
            if left:
                self._waiting.append(_Waiting(left, then))
                return
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
        with self._lock:
            for waiting in self._waiting:
                if view in waiting.targets and (seq is None or waiting.targets[view] <= seq):
                    del waiting.targets[view]
            done = [waiting for waiting in self._waiting if not waiting.targets]
            self._waiting = [waiting for waiting in self._waiting if waiting.targets]
        for waiting in done:
            waiting.then()
