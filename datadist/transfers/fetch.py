"""Layers to raw addresses in two-sided mode: the owner of the destination reads them on request.

Peers have no write access in this mode. The sender names its own memory and addresses inside the
receiver's caches; the receiver checks these, pulls, and answers with a status.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Set as AbstractSet
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from datadist.base.callers import pass_on
from datadist.caches.element_types import ElementTypes
from datadist.caches.owned import OwnCache, OwnDirectory
from datadist.caches.peers import TOKENS, PeerView
from datadist.caches.requests import Request, Requests, Service
from datadist.control.messages import Fetch, Fetched, seconds_until
from datadist.status import (
    LLMException,
    LLMStatusCode,
    code_of,
    param_invalid,
    text_without_code,
)
from datadist.transfers import resolve
from datadist.transfers.cuts import cut
from datadist.transfers.limits import CallLimit
from datadist.transfers.plan import Segments
from datadist.transfers.transfer import Transfers

log = logging.getLogger("datadist.transfer")

MAX_SEGMENTS = 100_000
"""Segments of one request, which keeps its message far below the largest frame."""
THREADS = 4
MOST = 2
"""Requests of one peer that run at one time."""


class Fetches:
    """Both ends of such requests. :meth:`send` is for any thread, the rest for the reactor."""

    def __init__(self, transfers: Transfers, owned: OwnDirectory, types: ElementTypes) -> None:
        self._transfers = transfers
        self._owned = owned
        self._types = types
        self._requests: Requests[Fetched] = Requests()
        self._service = Service("datadist-fetch", THREADS, MOST, transfers.timeout)

    # -- sending -----------------------------------------------------------------------------

    def strides(self, cluster: int, addresses: AbstractSet[int], nbytes: int) -> dict[int, int]:
        """Bytes from one block to the next where these addresses begin tensors of a cluster's caches.

        Only of blocks of ``nbytes`` that lie further apart. Where the cluster is not linked there are
        none. Raises LLM_PARAM_INVALID for an address where caches differ in that.
        """
        try:
            view = self._transfers.routes(cluster, time.monotonic() + self._transfers.timeout)[
                0
            ].view
        except LLMException as error:
            pass_on(error)
            return {}
        with view.lock:
            entries = [
                entry
                for entry in view.directory.entries.values()
                if entry.blocks and entry.block_bytes == nbytes
            ]
        if all(entry.dense for entry in entries):
            return {}
        found: dict[int, int] = {}
        for entry in entries:
            for base in addresses & set(entry.bases):
                if found.setdefault(base, entry.stride) != entry.stride:
                    raise param_invalid(
                        f"at {base:#x} caches of cluster {cluster} begin with blocks of {nbytes} bytes "
                        f"that lie {found[base]} and {entry.stride} bytes apart: which of them is meant "
                        "is not known; register one of them at another address, or not at all"
                    )
        return {base: stride for base, stride in found.items() if stride != nbytes}

    def send(
        self, cluster: int, segments: Segments, data_type: int, strides: list[int], limit: CallLimit
    ) -> None:
        """Have a cluster take ``segments`` of a cache of ours; ``remote`` are addresses in its caches.

        ``data_type`` is that of our cache, whose memory the caller keeps valid. ``strides`` are those
        of the cluster's blocks, if it is blocks that are written. Raises LLMException:
        LLM_NOT_YET_LINK, LLM_PARAM_INVALID for addresses outside of the peer's caches and for types
        that differ where they must not, LLM_TIMEOUT, LLM_FAILED.
        """
        if len(segments) > MAX_SEGMENTS:
            raise param_invalid(
                f"a layer of {len(segments)} segments is more than {MAX_SEGMENTS}: send fewer blocks"
            )
        limit.begin(self._transfers.timeout)
        route = self._transfers.routes(cluster, limit.deadline)[0]
        started, failed = time.monotonic(), True

        def message(number: int) -> Fetch:
            return Fetch(
                id=number,
                domain=route.attempt.token,
                source=_packed(segments.local),
                target=_packed(segments.remote),
                length=_packed(segments.length),
                data_type=data_type,
                same_type=self._types.required,
                strides=strides,
                seconds=seconds_until(limit.deadline),
            )

        try:
            self._requests.ask(
                route.view, message, lambda request: self._await(cluster, request, limit)
            )
            failed = False
        finally:
            self._transfers.count(route, True, segments.nbytes, started, failed)

    def _await(self, cluster: int, request: Request[Fetched], limit: CallLimit) -> None:
        request.wait(limit.deadline)
        if not request.over.is_set():
            raise LLMException(
                f"cluster {cluster} did not take the layer within {limit}",
                status_code=LLMStatusCode.LLM_TIMEOUT,
            )
        answer = request.answer
        if answer is None or answer.status != LLMStatusCode.LLM_SUCCESS:
            status = LLMStatusCode.LLM_FAILED if answer is None else code_of(answer.status)
            reason = "the peer is gone" if answer is None else answer.reason
            raise LLMException(
                f"cluster {cluster} could not take the layer: {reason}", status_code=status
            )

    def on_fetched(self, view: PeerView, message: Fetched) -> None:
        """A peer answers."""
        self._requests.answer(view, message.id, message)

    def on_gone(self, view: PeerView) -> None:
        """A peer's session is over."""
        self._requests.on_gone(view)

    # -- receiving ---------------------------------------------------------------------------

    def on_fetch(self, view: PeerView, message: Fetch) -> None:
        """A peer asks us to take a layer.

        Raises :class:`~datadist.control.account.LimitExceeded`.
        """
        token = next(TOKENS)
        nbytes = len(message.source) + len(message.target) + len(message.length)
        with view.lock:
            view.begin_pull(token)
        try:
            self._service.submit(
                view, nbytes, message.seconds,
                lambda deadline: self._serve(view, message, token, deadline),
            )  # fmt: skip
        except BaseException:
            view.end_pull(token)
            raise

    def _serve(self, view: PeerView, message: Fetch, token: int, deadline: float) -> None:
        status, reason = LLMStatusCode.LLM_SUCCESS, ""
        try:
            self._take(view, message, deadline)
        except LLMException as error:
            status, reason = error.status_code, text_without_code(error)
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

        def take(caches: list[OwnCache]) -> None:
            for cache in caches:
                _check_stride(cache, message)
                self._types.check_fetch(view, message, cache)
            segments = Segments(vectors[0], vectors[1], length, int(length.sum()))
            places = sorted({place for cache in caches for place in cache.layout.cuts})
            limit = CallLimit(max(0.001, deadline - time.monotonic())).begin(0)
            self._transfers.move(route, cut(segments, places, ()), limit)

        self._owned.using_all(self._targets(message, vectors[0], length), take)

    def _targets(
        self, message: Fetch, addresses: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> set[int]:
        """The caches at these addresses; where caches share memory, those of the sender's type."""
        with suppress(LLMException):
            return self._owned.caches_at(addresses, lengths, data_type=message.data_type)
        return self._owned.caches_at(addresses, lengths)

    def tell(self) -> None:
        """Have the threads end, without waiting for it."""
        self._service.tell()

    def close(self) -> None:
        """End the threads."""
        self._service.close()


def _check_stride(cache: OwnCache, message: Fetch) -> None:
    """Whether the sender knew how far apart blocks lie. Raises LLM_PARAM_INVALID."""
    stride = cache.layout.stride
    if not cache.layout.dense and message.strides and stride not in message.strides:
        raise param_invalid(
            f"blocks of cache {cache.cache_id} lie {stride} bytes apart (CacheDesc.block_stride), and "
            f"the sender took them to lie {', '.join(map(str, message.strides))} bytes apart: give "
            "addresses at which its tensors begin, and link before transfer_cache_async"
        )


def _packed(vector: object) -> bytes:
    return np.asarray(vector, np.int64).tobytes()
