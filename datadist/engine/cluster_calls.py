"""`link_clusters` and `unlink_clusters` as the caller's thread sees them: one result per cluster."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from datadist.control.reactor import Reactor
from datadist.engine.building import Builder
from datadist.engine.clusters import Clusters, DialError, PairDomain
from datadist.engine.revocations import Revocations
from datadist.status import LLMException, LLMStatusCode
from datadist.transport import TransportError

log = logging.getLogger("datadist.link")

CONTROL_SECONDS = 30.0
GRACE_SECONDS = 1.0
"""How much later than its deadline a pair may be settled; never reached unless we are stopped."""


@dataclass(frozen=True)
class Target:
    """A cluster to link with or to unlink."""

    cluster: int
    addresses: tuple[tuple[str, int], ...]
    """IPv4 text and port of its listener; exactly one is needed."""


class ClusterCalls:
    """Links by address from any thread; results are returned, not raised."""

    def __init__(
        self, reactor: Reactor, clusters: Clusters, builder: Builder, revocations: Revocations
    ) -> None:
        self._reactor = reactor
        self._clusters = clusters
        self._builder = builder
        self._revocations = revocations

    # -- link --------------------------------------------------------------------------------

    def link(self, targets: Sequence[Target], seconds: float) -> list[LLMStatusCode]:
        """Link with every target, all at once; a status each, within ``seconds``."""
        started: list[PairDomain | LLMStatusCode] = [self._dial(t, seconds) for t in targets]
        return [item if isinstance(item, LLMStatusCode) else _settle(item) for item in started]

    def _dial(self, target: Target, seconds: float) -> PairDomain | LLMStatusCode:
        if len(target.addresses) != 1:
            return _refuse(
                target, "link", LLMStatusCode.LLM_PARAM_INVALID, _needs_one_address(target)
            )
        ip, port = target.addresses[0]
        try:
            pair = self._reactor.call(
                lambda: self._clusters.dial(ip, port, seconds), CONTROL_SECONDS
            )
        except DialError as error:
            return _refuse(target, "link", error.code, str(error))
        if pair.cluster != target.cluster:
            log.warning(
                "remote_cluster_id is %d, but at %s:%d listens cluster %d: linking with that",
                target.cluster, ip, port, pair.cluster,
            )  # fmt: skip
        return pair

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
        pair = self._clusters.pairs.get(target.cluster)
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

    def close(self, pair: PairDomain, seconds: float, wait: bool) -> LLMStatusCode:
        """End a pair; with ``wait`` until the peer confirmed, or ``seconds`` have passed."""
        attempt, told = self._reactor.call(lambda: self._clusters.remove(pair), CONTROL_SECONDS)
        confirmed = threading.Event()
        self._revocations.when_acked(told, confirmed.set)
        if attempt is not None:
            try:
                self._builder.close(attempt, seconds if wait else 0.0)
            except (TransportError, LLMException) as error:
                log.error("%s: closing it failed: %s", pair, error)
                return LLMStatusCode.LLM_UNLINK_FAILED
        if wait and not confirmed.wait(seconds):
            log.error("%s: the peer did not confirm the end in time", pair)
            return LLMStatusCode.LLM_TIMEOUT
        return LLMStatusCode.LLM_SUCCESS

    def close_all(self) -> None:
        """End every pair without waiting for peers (finalize)."""
        for pair in list(self._clusters.pairs.values()):
            self.close(pair, 0.0, wait=False)


def _settle(pair: PairDomain) -> LLMStatusCode:
    left = pair.deadline - time.monotonic() + GRACE_SECONDS
    return pair.code if pair.settled.wait(max(0.0, left)) else LLMStatusCode.LLM_TIMEOUT


def _refuse(target: Target, verb: str, code: LLMStatusCode, reason: str) -> LLMStatusCode:
    log.error("cannot %s cluster %d: %s: %s", verb, target.cluster, code.name, reason)
    return code


def _needs_one_address(target: Target) -> str:
    return (
        f"exactly one remote address is needed (append_remote_ip_info), not {len(target.addresses)}"
    )
