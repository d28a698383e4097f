"""CLOSED for sides whose session ended by a cut connection, sent once more over a connection of its own.

The peer may have writes in flight to such a side. It settles them when it hears that the side has ended.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from datadist.messaging.engine import Endpoint, Engine, EngineError
from datadist.messaging.wire import Kind, pack

__all__ = ["SESSION_ENDED", "Farewell", "FarewellToken", "Farewells"]

log = logging.getLogger("datadist.messaging")

SESSION_ENDED = 1
"""Number of a CLOSED that is sent apart from its session: messages of the session may come later."""
TRIES = 5
TRY_SECONDS = 0.5
"""From the first try to the second one; each later one waits twice as long."""
TIMES = 2
"""It is sent again, since what an engine has sent may be lost with the connection."""
MAX_CLOSED = 1024
"""Sides of one peer; the oldest are dropped."""


@dataclass(eq=False)
class Farewell:
    """What one peer is told."""

    address: bytes
    closed: dict[bytes, bytes]
    """Reasons, by the peer's secret of the side."""
    endpoint: Endpoint | None = None
    tries: int = 0
    next_at: float = 0.0
    unsent: int = 0
    said: int = 0
    """So often all was sent."""


@dataclass(frozen=True, eq=False)
class FarewellToken:
    """A message that has not completed."""

    farewell: Farewell
    endpoint: Endpoint


class Farewells:
    """By the address of the peer's engine. On the engine's thread."""

    def __init__(
        self, engine: Engine, expect_tick: Callable[[float], None],
        send_over_session: Callable[[bytes, Mapping[bytes, bytes]], bool],
    ) -> None:  # fmt: skip
        self._engine = engine
        self._expect_tick = expect_tick
        self._send_over_session = send_over_session
        self._farewells: dict[bytes, Farewell] = {}
        self._closed = False

    @property
    def waiting(self) -> bool:
        """Whether :meth:`tick` has something to do."""
        return bool(self._farewells)

    @property
    def sending(self) -> bool:
        """Whether an engine has messages that it has not sent."""
        return any(each.endpoint is not None for each in self._farewells.values())

    def add(self, address: bytes, closed: Mapping[bytes, bytes]) -> None:
        """Tell the peer at this address that these sides have ended."""
        if self._closed or not closed:
            return
        earlier = self._farewells.get(address)
        if earlier is not None:
            self._close_endpoint(earlier)
            closed = {**earlier.closed, **closed}
        latest = dict(list(closed.items())[-MAX_CLOSED:])
        farewell = self._farewells[address] = Farewell(address, latest)
        self._try(farewell)

    def _try(self, farewell: Farewell) -> None:
        pause = TRY_SECONDS * 2**farewell.tries
        farewell.tries += 1
        farewell.next_at = time.monotonic() + pause
        self._expect_tick(pause)
        if self._send_over_session(farewell.address, farewell.closed):
            self._said(farewell)
            return
        if self._farewells.get(farewell.address) is not farewell:
            return  # that session has ended by it, and its sides are told with these
        try:
            endpoint = farewell.endpoint = self._engine.connect(farewell.address)
            farewell.unsent = len(farewell.closed)
            for secret, reason in farewell.closed.items():
                message = pack(Kind.CLOSED, secret, SESSION_ENDED, reason)
                endpoint.send(message, FarewellToken(farewell, endpoint))
        except EngineError as error:
            self._failed(farewell, str(error))
        except Exception as error:
            log.exception("unexpected error of an engine; please report it")
            self._failed(farewell, f"{type(error).__name__}: {error}")

    def completed(self, token: FarewellToken, error: str | None) -> None:
        """A message has been sent, or has failed."""
        farewell = token.farewell
        if farewell.endpoint is not token.endpoint:
            return
        if error is not None:
            self._failed(farewell, error)
            return
        farewell.unsent -= 1
        if not farewell.unsent:
            self._said(farewell)

    def _said(self, farewell: Farewell) -> None:
        farewell.said += 1
        if farewell.said == TIMES:
            self._end(farewell)
        else:
            self._close_endpoint(farewell)

    def lost(self, endpoint: Endpoint) -> None:
        """The engine has lost a connection."""
        for farewell in list(self._farewells.values()):
            if farewell.endpoint is endpoint:
                self._failed(farewell, "the connection was lost")

    def tick(self, now: float) -> None:
        """Try again what has failed, or was not sent in time."""
        for farewell in list(self._farewells.values()):
            if now >= farewell.next_at:
                if farewell.endpoint is not None:
                    self._failed(farewell, "the engine did not send it in time")
                if farewell.tries < TRIES:
                    self._try(farewell)
                else:
                    self._end(farewell)

    def close(self) -> None:
        """Nothing is sent any more."""
        self._closed = True
        for farewell in list(self._farewells.values()):
            self._end(farewell)

    def _failed(self, farewell: Farewell, why: str) -> None:
        log.debug("a peer was not told of the end of links: %s", why)
        self._close_endpoint(farewell)

    def _end(self, farewell: Farewell) -> None:
        self._close_endpoint(farewell)
        if self._farewells.get(farewell.address) is farewell:
            del self._farewells[farewell.address]

    def _close_endpoint(self, farewell: Farewell) -> None:
        endpoint, farewell.endpoint = farewell.endpoint, None
        if endpoint is None:
            return
        try:
            endpoint.close()
        except Exception:
            log.exception("unexpected error of an engine; please report it")
