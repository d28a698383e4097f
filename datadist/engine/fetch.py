"""Layers to raw addresses in two-sided mode: the owner of the destination reads them on request.

Peers have no write access in this mode. The sender names its own memory and addresses inside the
receiver's caches; the receiver checks these, pulls, and answers with a status.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from contextlib import ExitStack

import numpy as np

from datadist.control.messages import Fetch, Fetched, seconds_until
from datadist.engine import resolve
from datadist.engine.owned import OwnDirectory
from datadist.engine.peers import PeerView
from datadist.engine.plan import Segments
from datadist.engine.transfer import Transfers
from datadist.engine.workers import Workers
from datadist.status import LLMException, LLMStatusCode, param_invalid

log = logging.getLogger("datadist.transfer")

MAX_SEGMENTS = 100_000
"""Segments of one request, which keeps its message far below the largest frame."""
WORKERS = 2


class _Waiting:
    """A request of ours and its answer."""

    def __init__(self, view: PeerView) -> None:
        self.view = view
        self.answered = threading.Event()
        self.status = LLMStatusCode.LLM_FAILED
        self.reason = "the peer is gone"


class Fetches:
    """Both ends of such requests. :meth:`send` is for any thread, the rest for the reactor."""

    def __init__(self, transfers: Transfers, owned: OwnDirectory) -> None:
        self._transfers = transfers
        self._owned = owned
        self._ids = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}
        self._workers: Workers | None = None

    # -- sending -----------------------------------------------------------------------------

    def send(self, cluster: int, segments: Segments, deadline: float) -> None:
        """Have a cluster take ``segments`` of our memory; ``remote`` are addresses in its caches.

        The caller keeps our memory valid. Raises LLMException: LLM_NOT_YET_LINK, LLM_PARAM_INVALID
        for addresses outside of the peer's caches, LLM_TIMEOUT, LLM_FAILED.
        """
        if len(segments) > MAX_SEGMENTS:
            raise param_invalid(
                f"a layer of {len(segments)} segments is more than {MAX_SEGMENTS}: send fewer blocks"
            )
        route = self._transfers.routes(cluster, deadline)[0]
        request = next(self._ids)
        started, failed = time.monotonic(), True
        waiting = self._waiting[request] = _Waiting(route.view)
        try:
            route.view.send(
                Fetch.model_construct(
                    id=request,
                    domain=route.attempt.token,
                    source=_packed(segments.local),
                    target=_packed(segments.remote),
                    length=_packed(segments.length),
                    seconds=seconds_until(deadline),
                )
            )
            if route.view.session.closed:
                waiting.answered.set()
            self._await(cluster, waiting, deadline)
            failed = False
        finally:
            del self._waiting[request]
            self._transfers.count(route, True, segments.nbytes, started, failed)

    def _await(self, cluster: int, waiting: _Waiting, deadline: float) -> None:
        if not waiting.answered.wait(max(0.0, deadline - time.monotonic())):
            raise LLMException(
                f"cluster {cluster} did not take the layer within sync_kv_timeout "
                f"({self._transfers.timeout:g} s)",
                status_code=LLMStatusCode.LLM_TIMEOUT,
            )
        if waiting.status is not LLMStatusCode.LLM_SUCCESS:
            raise LLMException(
                f"cluster {cluster} could not take the layer: {waiting.reason}",
                status_code=waiting.status,
            )

    def on_fetched(self, message: Fetched) -> None:
        """A peer answers."""
        waiting = self._waiting.get(message.id)
        if waiting is not None:
            known = message.status in set(LLMStatusCode)
            waiting.status = LLMStatusCode(message.status if known else LLMStatusCode.LLM_FAILED)
            waiting.reason = message.reason
            waiting.answered.set()

    def on_gone(self, view: PeerView) -> None:
        """A peer's session is over."""
        for waiting in list(self._waiting.values()):
            if waiting.view is view:
                waiting.answered.set()

    # -- receiving ---------------------------------------------------------------------------

    def on_fetch(self, view: PeerView, message: Fetch) -> None:
        """A peer asks us to take a layer."""
        if self._workers is None:
            self._workers = Workers(WORKERS, "datadist-fetch")
        with view.lock:
            token = view.begin_pull()
        deadline = time.monotonic() + message.seconds
        self._workers.submit(lambda: self._serve(view, message, token, deadline))

    def _serve(self, view: PeerView, message: Fetch, token: int, deadline: float) -> None:
        status, reason = LLMStatusCode.LLM_SUCCESS, ""
        try:
            self._take(view, message, deadline)
        except LLMException as error:
            status, reason = error.status_code, str(error)
        except Exception as error:
            log.exception("a layer of cluster %d failed; please report it", view.session.cluster_id)
            status, reason = LLMStatusCode.LLM_FAILED, f"{type(error).__name__}: {error}"
        finally:
            view.end_pull(token)
        view.send(Fetched(id=message.id, status=status, reason=reason[:4000]))

    def _take(self, view: PeerView, message: Fetch, deadline: float) -> None:
        if any(len(raw) % 8 for raw in (message.target, message.source, message.length)):
            raise param_invalid("the vectors of the request are not of int64")
        vectors = [np.frombuffer(raw, np.int64) for raw in (message.target, message.source)]
        length = np.frombuffer(message.length, np.int64)
        if not len(length) or any(len(vector) != len(length) for vector in vectors):
            raise param_invalid("the vectors of the request differ in length, or are empty")
        cluster = view.session.cluster_id
        route = next(
            (
                route
                for route in self._transfers.routes(cluster, deadline)
                if route.attempt.token == message.domain
            ),
            None,
        )
        if route is None:
            raise resolve.no_route([], cluster)
        with ExitStack() as stack:
            for cache_id in self._owned.caches_at(vectors[0], length):
                stack.enter_context(self._owned.pinned(cache_id))
            segments = Segments(vectors[0], vectors[1], length, int(length.sum()))
            self._transfers.move(route, segments, deadline)

    def close(self) -> None:
        """End the threads."""
        if self._workers is not None:
            self._workers.stop()


def _packed(vector: object) -> bytes:
    return np.asarray(vector, np.int64).tobytes()
