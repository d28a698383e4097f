"""Checksums per transfer, for finding corruption: both ends read their own memory and compare.

After the transport has moved the bytes, the end that began the transfer asks the other one, over the
control session, for a CRC-32 of its ranges, and computes that of its own meanwhile. The checksum
does not use the transport. So it finds bytes that the transport left out, misplaced or changed, and
memory that its owner overwrote during the transfer. It does not find errors before or after the
transfer.
"""

from __future__ import annotations

import ctypes
import logging
import time
import zlib

import numpy as np
from numpy.typing import NDArray

from datadist.caches.owned import OwnCache, OwnDirectory
from datadist.caches.peers import PeerView
from datadist.caches.requests import Request, Requests, Service
from datadist.control.messages import Verified, Verify, seconds_until
from datadist.status import (
    LLMException,
    LLMStatusCode,
    code_of,
    param_invalid,
    text_without_code,
)
from datadist.transfers.plan import Segments
from datadist.transfers.resolve import Route
from datadist.transport import Placement

log = logging.getLogger("datadist.transfer")

MAX_SEGMENTS = 100_000
"""Segments of one request, which keeps its message far below the largest frame."""
THREADS = 2
MOST = 1
"""Requests of one peer that run at one time."""
PIECE = 64 << 20
"""Bytes between two checks of the deadline."""


class Verification:
    """Both ends. :meth:`compare` is for any thread, the ``on_`` methods for the reactor."""

    def __init__(
        self, owned: OwnDirectory, addressable: frozenset[Placement], longest: float
    ) -> None:
        self._owned = owned
        self._addressable = addressable
        self._requests: Requests[Verified] = Requests()
        self._service = Service("datadist-verify", THREADS, MOST, longest)

    def compare(self, route: Route, segments: Segments, deadline: float) -> None:
        """Raise LLM_FAILED where our bytes and the peer's differ.

        Raises LLMException: LLM_TIMEOUT when the peer did not answer, LLM_NOT_YET_LINK when it is
        gone, LLM_FEATURE_NOT_ENABLED for memory that CPU code cannot read.
        """
        vectors = [
            np.asarray(v, np.int64) for v in (segments.local, segments.remote, segments.length)
        ]
        for start in range(0, len(segments), MAX_SEGMENTS):
            local, remote, length = (v[start : start + MAX_SEGMENTS] for v in vectors)
            self._compare(route, local, remote, length, deadline)

    def _compare(
        self,
        route: Route,
        local: NDArray[np.int64],
        remote: NDArray[np.int64],
        length: NDArray[np.int64],
        deadline: float,
    ) -> None:
        def message(number: int) -> Verify:
            return Verify(
                id=number,
                address=remote.tobytes(),
                length=length.tobytes(),
                seconds=seconds_until(deadline),
            )

        def compare(request: Request[Verified]) -> None:
            ours = self._checksum(local, length, deadline)
            self._check_answer(route, request.wait(deadline), ours, int(length.sum()))

        self._requests.ask(route.view, message, compare)

    def _check_answer(self, route: Route, answer: Verified | None, ours: int, nbytes: int) -> None:
        session = route.view.session
        cluster = session.cluster_id
        if answer is None:
            gone = session.closed
            raise LLMException(
                f"cluster {cluster} {'is gone' if gone else 'did not answer in time'}: the transfer "
                "is not verified, take its bytes as not moved",
                status_code=LLMStatusCode.LLM_NOT_YET_LINK if gone else LLMStatusCode.LLM_TIMEOUT,
            )
        if answer.status != LLMStatusCode.LLM_SUCCESS:
            raise LLMException(
                f"cluster {cluster} could not verify the transfer: {answer.reason}",
                status_code=code_of(answer.status),
            )
        if answer.crc != ours:
            log.error(
                "checksums of %d bytes differ: cluster %d over %s", nbytes, cluster, route.domain
            )
            raise LLMException(
                f"the {nbytes} bytes differ from those of cluster {cluster} (CRC-32 {ours:08x} here, "
                f"{answer.crc:08x} there): its memory changed during the transfer, or "
                f"{route.domain} corrupts data",
                status_code=LLMStatusCode.LLM_FAILED,
            )

    def _checksum(
        self, address: NDArray[np.int64], length: NDArray[np.int64], deadline: float
    ) -> int:
        """CRC-32 of ranges of our caches, one after the other."""

        def checksum(caches: list[OwnCache]) -> int:
            for cache in caches:
                if cache.layout.placement not in self._addressable:
                    raise LLMException(
                        f"cache {cache.cache_id} is in {cache.layout.placement.name} memory, which "
                        "cannot be read for checksums with this backend: set datadist.checksum to "
                        '"0"',
                        status_code=LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
                    )
            crc = 0
            for start, size in zip(address.tolist(), length.tolist(), strict=True):
                for at in range(0, size, PIECE):
                    if time.monotonic() > deadline:
                        raise LLMException(
                            "there was not enough time for the checksum: raise sync_kv_timeout",
                            status_code=LLMStatusCode.LLM_TIMEOUT,
                        )
                    piece = (ctypes.c_char * min(PIECE, size - at)).from_address(start + at)
                    crc = zlib.crc32(piece, crc)
            return crc

        cache_ids = self._owned.caches_at(address, length, freed_too=True)
        return self._owned.using_all(cache_ids, checksum, freed_too=True)

    # -- from peers --------------------------------------------------------------------------

    def on_verify(self, view: PeerView, message: Verify) -> None:
        """A peer asks for the checksum of ranges of our caches.

        Raises :class:`~datadist.control.account.LimitExceeded`.
        """
        nbytes = len(message.address) + len(message.length)
        self._service.submit(
            view, nbytes, message.seconds, lambda deadline: self._serve(view, message, deadline)
        )

    def _serve(self, view: PeerView, message: Verify, deadline: float) -> None:
        status, reason, crc = LLMStatusCode.LLM_SUCCESS, "", 0
        if view.session.closed:
            return
        try:
            if len(message.address) % 8 or len(message.address) != len(message.length):
                raise param_invalid("the vectors of the request differ in length")
            address = np.frombuffer(message.address, np.int64)
            crc = self._checksum(address, np.frombuffer(message.length, np.int64), deadline)
        except LLMException as error:
            status, reason = error.status_code, text_without_code(error)
        view.send(Verified(id=message.id, status=status, reason=reason[:4000], crc=crc))

    def on_verified(self, view: PeerView, message: Verified) -> None:
        """A peer answers."""
        self._requests.answer(view, message.id, message)

    def on_gone(self, view: PeerView) -> None:
        """A peer's session is over."""
        self._requests.on_gone(view)

    def tell(self) -> None:
        """Have the threads end, without waiting for it."""
        self._service.tell()

    def close(self) -> None:
        """End the threads."""
        self._service.close()
