"""Links with workers of other instances: made when needed, checked, made again with growing pauses."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from vllm.logger import init_logger

from datadist import (
    LinkEventKind,
    LLMClusterInfo,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
)
from datadist_vllm.fingerprint import decode, difference
from datadist_vllm.parameters import RankAddress

logger = init_logger(f"vllm.{__name__}")

THREADS = 8
"""Links that are made at a time; one to a peer that does not answer takes `link_seconds`."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds in which a peer that could not be linked is not tried again; doubled each time."""
TIDY_SECONDS = 0.5
FORGET_SECONDS = 300.0
"""After which the failures of a peer are forgotten: it will not come back under this cluster id."""

Linked = Callable[[dict[str, Any] | str], None]
"""Gets what the peer says of itself, or why there is no link."""


@dataclass
class _Peer:
    own: dict[str, Any] | None = None
    """What the peer says of itself, while it is linked."""
    transport: str = ""
    """That the link uses: of two together, the one for this peer."""
    waiting: list[Linked] = field(default_factory=list)
    failures: int = 0
    reason: str = ""
    again: float = 0.0
    """When it may be tried again."""


class Links:
    """All links of one worker. ``shared`` is the fingerprint that peers must have, too."""

    def __init__(
        self, engine: LLMDataDist, host: str, shared: dict[str, Any], seconds: float
    ) -> None:
        self._engine = engine
        self._host = host
        self._shared = shared
        self._millis = int(seconds * 1000)
        self._lock = threading.Lock()
        self._peers: dict[RankAddress, _Peer] = {}
        self._threads = ThreadPoolExecutor(THREADS, "datadist-vllm-link")
        self._tidied = 0.0

    def when_linked(self, address: RankAddress, then: Linked) -> None:
        """Call ``then`` at once, or on another thread when the link is there or has failed."""
        with self._lock:
            peer = self._peers.setdefault(address, _Peer())
            if peer.own is None and time.monotonic() >= peer.again:
                peer.waiting.append(then)
                if len(peer.waiting) == 1:
                    self._threads.submit(self._link, address, peer)
                return
            answer = peer.own if peer.own is not None else f"{peer.reason} (not tried again yet)"
        then(answer)

    def forget(self, address: RankAddress, own: dict[str, Any]) -> None:
        """The link does not work any more: the next use makes a new one."""
        with self._lock:
            peer = self._peers.get(address)
            if peer is not None and peer.own is own:
                del self._peers[address]

    def transport(self, address: RankAddress) -> str:
        """That moves the bytes of a peer; the engine's own name for it where the peer is not linked."""
        with self._lock:
            peer = self._peers.get(address)
        return (peer.transport if peer is not None else "") or str(self._engine.backend)

    def tidy(self) -> None:
        """Give up what links that ended have left, at either end."""
        now = time.monotonic()
        if now - self._tidied < TIDY_SECONDS:
            return
        self._tidied = now
        for event in self._engine.link_events():
            if event.kind in (LinkEventKind.BROKEN, LinkEventKind.GONE):
                for cluster in event.cluster_ids:
                    if not self._works(cluster):  # else it was made anew since
                        logger.info("the link with cluster %d has ended: %s", cluster, event.reason)
                        self._give_up(cluster)
        with self._lock:
            for address, peer in list(self._peers.items()):
                if peer.failures and not peer.waiting and now - peer.again > FORGET_SECONDS:
                    del self._peers[address]

    def run(self, call: Callable[[], None]) -> None:
        """Call something that may wait, on another thread."""
        self._threads.submit(call)

    def close(self) -> None:
        """End the threads; the engine ends the links."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _works(self, cluster: int) -> bool:
        try:
            return self._engine.link_error(cluster_id=cluster) is None
        except LLMException:
            return False

    def _give_up(self, cluster: int) -> None:
        with self._lock:
            for address, peer in list(self._peers.items()):
                if address.cluster == cluster and peer.own is not None:
                    del self._peers[address]
        self._unlink(cluster)

    def _unlink(self, cluster: int) -> None:
        info = LLMClusterInfo()
        info.remote_cluster_id = cluster
        self._engine.unlink_clusters([info], 1000, force=True)

    def _link(self, address: RankAddress, peer: _Peer) -> None:
        answer: dict[str, Any] | str
        try:
            answer = self._linked(address, peer)
        except Exception as error:  # whatever it is, who waits must hear of it
            answer = str(error) or repr(error)
        with self._lock:
            waiting, peer.waiting = peer.waiting, []
            if isinstance(answer, str):
                peer.failures += 1
                peer.reason = answer
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (peer.failures - 1))
                peer.again = time.monotonic() + pause
            else:
                peer.own, peer.failures = answer, 0
        if isinstance(answer, str):
            logger.warning("no link with %s: %s", _named(address), answer)
        for then in waiting:
            then(answer)

    def _linked(self, address: RankAddress, peer: _Peer) -> dict[str, Any]:
        info = LLMClusterInfo()
        info.remote_cluster_id = address.cluster
        info.remote_role_type = LLMRole.MIX
        info.append_local_ip_info(self._host, 0)
        info.append_remote_ip_info(address.host, address.port)
        began = time.monotonic()
        status, _ = self._engine.link_clusters([info], self._millis)
        if status not in (LLMStatusCode.LLM_SUCCESS, LLMStatusCode.LLM_ALREADY_LINK):
            raise ValueError(f"{info.link_error} ({status.name})")
        own = self._fitting(address.cluster)
        peer.transport = self._transport_to(address.cluster)
        logger.info(
            "linked with %s over %s in %.0f ms",
            _named(address),
            peer.transport,
            (time.monotonic() - began) * 1000,
        )
        return own

    def _transport_to(self, cluster: int) -> str:
        links = self._engine.stats()["links"]
        found = (each["backend"] for each in links if each["cluster_id"] == cluster)
        return str(next(found, None) or "")

    def _fitting(self, cluster: int) -> dict[str, Any]:
        """What a linked peer says of itself. Where it does not fit, unlink and raise ``ValueError``."""
        try:
            shared, own = decode(self._engine.link_metadata(cluster_id=cluster)[cluster])
            differs = difference(self._shared, shared)
            if differs is not None:
                raise ValueError(f"the instances do not fit each other: {differs}")
        except ValueError:
            self._unlink(cluster)
            raise
        return own


def _named(address: RankAddress) -> str:
    return f"cluster {address.cluster} at {address.host}:{address.port}"
