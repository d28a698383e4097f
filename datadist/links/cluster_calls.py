"""`link_clusters` and `unlink_clusters` as the caller's thread sees them: one result per cluster."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from datadist.base.flag import Flag
from datadist.caches.revocations import Revocations
from datadist.control.hostport import HostPort
from datadist.links.building import Builder
from datadist.links.clusters import Call, Clusters
from datadist.links.domain import Attempt, PairDomain
from datadist.status import LLMException, LLMStatusCode
from datadist.transports.defects import text_of

log = logging.getLogger("datadist.link")

GRACE_SECONDS = 1.0
"""How much later than its deadline a pair may be settled; never reached unless we are stopped."""


class Linked(NamedTuple):
    """What came of linking with one cluster."""

    code: LLMStatusCode
    reason: str | None
    """Why it failed."""


Removed: TypeAlias = "list[tuple[PairDomain, Attempt | None]]"
"""Pairs that were taken out, and what of them has yet to be closed."""


@dataclass(frozen=True)
class Target:
    """A cluster to link with or to unlink."""

    cluster: int
    addresses: tuple[tuple[str, int], ...]
    """IPv4 text and port of its listener; exactly one is needed."""


class ClusterCalls:
    """Links by address from any thread; results are returned, not raised.

    ``call`` runs a function on the reactor and raises LLM_FAILED when that does not answer, ``act``
    runs one on the thread of calls, as a whole; ``catch_up`` waits there for one that was interrupted.
    """

    def __init__(
        self,
        call: Callable[[Callable[[], Any]], Any],
        act: Callable[[Callable[[], Any]], Any],
        catch_up: Callable[[], None],
        clusters: Clusters,
        builder: Builder,
        revocations: Revocations,
    ) -> None:
        self._call = call
        self._act = act
        self._catch_up = catch_up
        self._clusters = clusters
        self._builder = builder
        self._revocations = revocations

    # -- link --------------------------------------------------------------------------------

    def link(
        self, targets: Sequence[Target], seconds: float, metadata: bytes | None = None
    ) -> list[Linked]:
        """Link with every target, all at once; a status and a reason each, within ``seconds``."""
        self._catch_up()
        self._await_turn()
        calls = [_call_to(target, seconds, metadata) for target in targets]
        try:
            for call in calls:
                if call is not None:
                    self._call(partial(self._clusters.dial, call))
            return [_settle(target, call) for target, call in zip(targets, calls, strict=True)]
        except BaseException:
            self._clusters.forget([call for call in calls if call is not None])
            raise

    def cluster_at(self, ip: str, port: int, seconds: float) -> int:
        """The cluster id of who listens there. Raises LLM_LINK_FAILED, LLM_TIMEOUT."""
        self._catch_up()
        call = Call(HostPort(ip, port), time.monotonic() + seconds, asks=True)
        self._call(partial(self._clusters.dial, call))
        call.met.wait(_left(call.deadline))
        if call.error is not None:
            raise LLMException(str(call.error), status_code=call.error.code)
        if call.found is None:
            raise LLMException(
                f"{call.place} did not answer in time", status_code=LLMStatusCode.LLM_TIMEOUT
            )
        return call.found.cluster_id

    # -- unlink ------------------------------------------------------------------------------

    def unlink(
        self, targets: Sequence[Target], seconds: float, force: bool, needs_address: bool
    ) -> list[LLMStatusCode]:
        """Unlink every target; without ``force`` its half is gone, too, when this returns."""
        deadline = time.monotonic() + seconds
        return [self._unlink(target, deadline, force, needs_address) for target in targets]

    def _unlink(
        self, target: Target, deadline: float, force: bool, needs_address: bool
    ) -> LLMStatusCode:
        if needs_address and not force and len(target.addresses) != 1:
            return _refuse(
                target, "unlink", LLMStatusCode.LLM_PARAM_INVALID, _needs_one_address(target)
            )
        self._await_turn()
        pair = self._call(lambda: self._clusters.pairs.get(target.cluster))
        if pair is None:
            return LLMStatusCode.LLM_SUCCESS
        if not force and not pair.usable and not pair.waiting:
            gone = pair.attempt.gone if pair.attempt else {}
            why = "; ".join(gone.values()) or "it is broken"
            return _refuse(
                target, "unlink", LLMStatusCode.LLM_UNLINK_FAILED,
                f"the peer cannot be told: {why}; use force=True",
            )  # fmt: skip
        return self.close(pair, max(0.0, deadline - time.monotonic()), wait=not force)

    def _await_turn(self) -> None:
        """Have the next call on the reactor see what has arrived by now, such as the end of a peer.

        The turn that runs this call may have looked for arrivals before. The next turn looks again.
        """
        self._call(lambda: None)

    def close(self, pair: PairDomain, seconds: float, wait: bool) -> LLMStatusCode:
        """End a pair; with ``wait`` until the peer confirmed, or ``seconds`` have passed."""
        closed, confirmed = self._act(lambda: self._close(pair, seconds if wait else 0.0))
        if not closed:
            return LLMStatusCode.LLM_UNLINK_FAILED
        if wait and not confirmed.wait(seconds):
            log.error("%s: the peer did not confirm the end in time", pair)
            return LLMStatusCode.LLM_TIMEOUT
        return LLMStatusCode.LLM_SUCCESS

    def _close(self, pair: PairDomain, grace_seconds: float) -> tuple[bool, Flag]:
        """Whether the link was closed without a fault, and what is set once the peer confirmed."""
        confirmed = Flag()
        attempt, told = self._call(lambda: self._clusters.remove(pair))
        self._revocations.when_acked(told, confirmed.set)
        return self._shut_down(pair, attempt, grace_seconds), confirmed

    def _shut_down(self, pair: PairDomain, attempt: Attempt | None, grace_seconds: float) -> bool:
        if attempt is not None:
            try:
                self._builder.close(attempt, grace_seconds)
            except Exception as error:
                log.error("%s: closing it failed: %s", pair, text_of(error, attempt.link))
                return False
        return True

    def remove_all(self) -> Removed:
        """End calls and take every pair out (finalize); on the reactor."""
        self._clusters.end()
        pairs = list(self._clusters.pairs.values())
        return [(pair, self._clusters.remove(pair)[0]) for pair in pairs]

    def close_all(self, removed: Removed) -> None:
        """Close the links of these pairs, without waiting for peers."""
        for pair, attempt in removed:
            self._shut_down(pair, attempt, 0.0)


def _call_to(target: Target, seconds: float, metadata: bytes | None) -> Call | None:
    if len(target.addresses) != 1:
        return None
    place = HostPort(*target.addresses[0])
    return Call(place, time.monotonic() + seconds, metadata=metadata)


def _settle(target: Target, call: Call | None) -> Linked:
    """Wait for what comes of a call."""
    if call is None:
        return _not_linked(target, LLMStatusCode.LLM_PARAM_INVALID, _needs_one_address(target))
    call.met.wait(_left(call.deadline))
    if call.error is not None:
        return _not_linked(target, call.error.code, str(call.error))
    pair = call.pair
    if pair is None:
        return Linked(LLMStatusCode.LLM_TIMEOUT, f"{call.place} did not answer in time")
    if pair.cluster != target.cluster:
        log.warning(
            "remote_cluster_id is %d, but at %s listens cluster %d: linking with that",
            target.cluster, call.place, pair.cluster,
        )  # fmt: skip
    if not pair.settled.wait(_left(pair.deadline)):
        return Linked(LLMStatusCode.LLM_TIMEOUT, f"{pair} was not complete in time")
    failed = pair.code is not LLMStatusCode.LLM_SUCCESS
    reason = pair.reason or "it was unlinked, or this engine ended, meanwhile"
    return Linked(pair.code, reason if failed else None)


def _not_linked(target: Target, code: LLMStatusCode, reason: str) -> Linked:
    return Linked(_refuse(target, "link", code, reason), reason)


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic() + GRACE_SECONDS)


def _refuse(target: Target, verb: str, code: LLMStatusCode, reason: str) -> LLMStatusCode:
    log.error("cannot %s cluster %d: %s: %s", verb, target.cluster, code.name, reason)
    return code


def _needs_one_address(target: Target) -> str:
    return (
        f"exactly one remote address is needed (append_remote_ip_info), not {len(target.addresses)}"
    )
