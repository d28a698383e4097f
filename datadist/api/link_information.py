"""What a program can ask of links beyond the documented API: metadata, events, who listens where."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datadist.api.config import MAX_METADATA
from datadist.api.descriptors import descriptor_of
from datadist.base import checks
from datadist.base.calls import begin, entries
from datadist.base.keywords import named_keywords
from datadist.engine.interpreter import check_interpreter, check_proc_for_addresses
from datadist.links.events import LinkEvent
from datadist.status import param_invalid
from datadist.types import ipv4_number, ipv4_text

if TYPE_CHECKING:
    from datadist.engine.engine import Engine


@named_keywords
@entries
class LinkInformation:
    """The part of an engine that tells of its links."""

    def link_metadata(
        self, comm_id: int | None = None, *, cluster_id: int | None = None
    ) -> dict[int, bytes]:
        """What the peers of an OK link gave as ``metadata``, by cluster id; empty bytes for nothing.

        Name the link by its comm id, or by the cluster id of one member: then it is the newest link
        with that cluster, also one of `link_clusters`, and only that member.

        Raises ``RuntimeError`` before `init`, ``TypeError`` also where neither is given, ``ValueError``,
        LLMException: LLM_PARAM_INVALID where both are, LLM_NOT_YET_LINK for a link that is not OK.
        """
        return self._asked(comm_id, cluster_id, "link_metadata").links_known.metadata(
            comm_id, cluster_id
        )

    def link_error(
        self, comm_id: int | None = None, *, cluster_id: int | None = None
    ) -> str | None:
        """Why a domain FAILED, or which members an OK one has lost; None when all is well.

        Also which of its transfers go on although their calls have ended, since a page does not come.
        With ``cluster_id`` instead of a comm id it is about the newest link with that cluster, also
        one of `link_clusters`, or about the last call of `link_clusters` for it, if there is none.

        Raises as :meth:`link_metadata`, but not for links that are not OK.
        """
        return self._asked(comm_id, cluster_id, "link_error").links_known.error(comm_id, cluster_id)

    def link_events(self) -> list[LinkEvent]:
        """What became of links since the last call, oldest first.

        Up to 4096 events wait, 64 before the first call; where there are more the oldest ones are
        dropped, and the first event is one of kind DROPPED that says how many.

        Raises ``RuntimeError`` before `init`.
        """
        begin("link_events")
        return self._initialised().links_known.events.take()

    def link_events_fileno(self) -> int:
        """A descriptor that is readable while `link_events` may have some, for `select` and the like.

        Now and then it is readable for nothing. It belongs to the engine: do not read or close it.
        Raises ``RuntimeError`` before `init`, LLMException (LLM_FAILED) where no descriptor is left.
        """
        begin("link_events_fileno")
        return descriptor_of(self._initialised().links_known.events, "events of links")

    @property
    def listen_address(self) -> tuple[str, int] | None:
        """Where others find this engine with `link_clusters`; None where it listens nowhere.

        The port is the one that was found where ``listen_ip_info`` has port 0.

        Raises ``RuntimeError`` before `init`.
        """
        place = self._initialised().listens_at()
        return None if place is None else (place.host, place.port)

    def cluster_at(self, ip: str | int, port: int, timeout: int = 3000) -> int:
        """The cluster id of the engine that listens at an address (``listen_ip_info``); links nothing.

        ``timeout`` in milliseconds.

        Raises ``RuntimeError`` before `init` and for text that is no IPv4 address, ``TypeError``,
        ``ValueError``, LLMException: LLM_LINK_FAILED where nobody listens, LLM_TIMEOUT,
        LLM_PARAM_INVALID for a ``timeout`` that is not positive.
        """
        begin("cluster_at")
        engine = self._initialised()
        checks.check_isinstance("ip", ip, (str, int), allow_none=False)
        checks.check_uint16("port", port)
        checks.check_int32("timeout", timeout)
        if timeout <= 0:
            raise param_invalid(f"timeout is {timeout}, it must be positive (milliseconds)")
        check_interpreter("cluster_at")
        check_proc_for_addresses("cluster_at")
        text = ipv4_text(ipv4_number(ip) if isinstance(ip, str) else ip)
        return engine.clusters.cluster_at(text, port, timeout / 1000)

    def _asked(self, comm_id: int | None, cluster_id: int | None, method: str) -> Engine:
        engine = self._initialised()
        if comm_id is not None and cluster_id is not None:
            raise param_invalid(
                f"comm_id is {comm_id} and cluster_id {cluster_id}: give one of the two"
            )
        if cluster_id is None:
            return self._check_comm_id(comm_id, method)
        checks.check_uint64("cluster_id", cluster_id)
        return engine

    def _initialised(self) -> Engine:
        raise NotImplementedError

    def _check_comm_id(self, comm_id: int | None, method: str) -> Engine:
        raise NotImplementedError


def check_metadata(metadata: bytes | None) -> None:
    """Bytes, not too many. Raises ``TypeError``, LLM_PARAM_INVALID."""
    checks.check_isinstance("metadata", metadata, bytes)
    if metadata is not None and len(metadata) > MAX_METADATA:
        raise param_invalid(
            f"metadata has {len(metadata)} bytes, at most {MAX_METADATA} are possible: give a digest, "
            "or send the rest another way"
        )
