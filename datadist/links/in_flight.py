"""Transfers that go on although their calls have ended: looked at until they have settled, or forced.

See ``in_flight`` of :class:`~datadist.transport.TransportError`, and :meth:`Link.force`.
"""

from __future__ import annotations

import logging
import math
import time

from datadist.base.texts import in_seconds
from datadist.base.workers import Workers
from datadist.caches.quarantine import Kept, Quarantine
from datadist.control.reactor import Reactor
from datadist.links.domain import Attempt
from datadist.transport import FORCE_SECONDS, TransferError, Unsupported
from datadist.transports.defects import text_of

log = logging.getLogger("datadist.transfer")

SWEEP_SECONDS = 0.02
"""From one look at what is kept to the next."""


class TransfersInFlight:
    """Ends the quarantine of what has settled, and has links end what does not settle."""

    def __init__(self, reactor: Reactor, workers: Workers, quarantine: Quarantine) -> None:
        self._reactor = reactor
        self._workers = workers
        self._quarantine = quarantine
        self._sweeping = False
        quarantine.on_kept = lambda kept: reactor.post(lambda: self._watch(kept))

    def _watch(self, kept: Kept) -> None:
        self._reactor.later(FORCE_SECONDS, lambda: self._force_later(kept))
        if not self._sweeping:
            self._sweeping = True
            self._sweep()

    def _sweep(self) -> None:
        self._sweeping = self._quarantine.release_settled()
        if self._sweeping:
            self._reactor.later(SWEEP_SECONDS, self._sweep)

    def _force_later(self, kept: Kept) -> None:
        attempt = kept.owner
        if isinstance(attempt, Attempt) and self._quarantine.holds(kept):
            self._workers.submit(lambda: self._force_late(kept, attempt), attempt.owner)

    def _force_late(self, kept: Kept, attempt: Attempt) -> None:
        with attempt.forcing:
            if not attempt.closed and self._quarantine.holds(kept):
                self._force(kept, attempt, f"did not settle within {in_seconds(FORCE_SECONDS)}")

    def end_all(self, attempt: Attempt) -> None:
        """Have a link that is about to be closed end what it has in flight; not on the reactor."""
        with attempt.forcing:
            attempt.closed = True
            for kept in self._quarantine.of(attempt):
                self._force(kept, attempt, "had not settled when its link was closed")

    def _force(self, kept: Kept, attempt: Attempt, why: str) -> None:
        """Once for all that a rank has in flight now, and never again where the transport cannot."""
        if attempt.link is None or kept.since <= attempt.forced.get(kept.rank, 0.0):
            return
        attempt.forced[kept.rank] = time.monotonic()
        try:
            attempt.link.force(kept.rank)
        except Unsupported as error:
            attempt.forced[kept.rank] = math.inf
            log.warning("%s %s: it is waited for, since %s", kept.text, why, error)
            return
        except TransferError as error:
            log.warning("%s %s: it is waited for, since %s", kept.text, why, error)
        except Exception as error:
            log.error(
                "%s %s, and ending it failed: %s", kept.text, why, text_of(error, attempt.link)
            )
        attempt.gone.setdefault(
            kept.rank, f"{kept.text} {why}, and the connection was given up for that"
        )
        attempt.abort([kept.rank])
        log.warning("%s %s: the connection is given up", kept.text, why)
