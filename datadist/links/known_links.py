"""What an engine knows of its links, by comm id or by cluster: reasons, metadata, events."""

from __future__ import annotations

from collections.abc import Callable

from datadist.caches.quarantine import Quarantine
from datadist.links.domain import Domain, TableDomain
from datadist.links.events import LinkEvents
from datadist.status import LLMException, LLMStatusCode
from datadist.types import RegisterMemStatus

__all__ = ["KnownLinks"]

MAX_REASONS = 1024
"""Clusters of which it is kept why the last `link_clusters` failed."""


class KnownLinks:
    """For any thread. ``domain`` finds a domain by comm id or raises, ``domains`` gives all links.

    ``hear`` handles what the engines of a cluster have sent by now.
    """

    def __init__(
        self,
        domain: Callable[[int], TableDomain],
        domains: Callable[[], list[Domain]],
        hear: Callable[[int], None],
        quarantine: Quarantine,
        events: LinkEvents,
    ) -> None:
        self._domain = domain
        self._domains = domains
        self._hear = hear
        self._quarantine = quarantine
        self.events = events
        self._reasons: dict[int, str] = {}

    def note(self, cluster: int | None, reason: str | None) -> None:
        """Keep why a cluster could not be linked; None: it could. Of too many the oldest one goes."""
        if cluster is None:
            return
        self._reasons.pop(cluster, None)
        if reason is not None:
            self._reasons[cluster] = reason
            for oldest in list(self._reasons)[:-MAX_REASONS]:
                self._reasons.pop(oldest, None)

    def error(self, comm_id: int | None, cluster: int | None) -> str | None:
        """Why a link failed, whom it has lost, and what of it does not end.

        Raises LLM_NOT_YET_LINK where nothing is known.
        """
        if cluster is None:
            return self._error_of(self._domain(-1 if comm_id is None else comm_id), None)
        domain = self._newest(cluster)
        if domain is not None:
            return self._error_of(domain, domain.ranks[cluster])
        reason = self._reasons.get(cluster)
        if reason is None:
            raise _not_linked(cluster)
        return reason

    def _error_of(self, domain: Domain, rank: int | None) -> str | None:
        if domain.reason is not None or domain.attempt is None:
            return domain.reason
        gone = domain.attempt.gone
        texts = [gone[each] for each in sorted(gone) if rank in (None, each)]
        return "; ".join(texts + self._quarantine.texts(domain.attempt)) or None

    def metadata(self, comm_id: int | None, cluster: int | None) -> dict[int, bytes]:
        """What members gave, by cluster. Raises LLM_NOT_YET_LINK for a link that is not OK."""
        if cluster is None:
            domain: Domain | None = self._domain(-1 if comm_id is None else comm_id)
        else:
            domain = self._newest(cluster, RegisterMemStatus.OK)
            if domain is None:  # the peer may be OK already, and what makes us OK may have arrived
                self._hear(cluster)
                domain = self._newest(cluster, RegisterMemStatus.OK)
        if domain is None:
            raise _not_linked(cluster)
        attempt = domain.attempt
        if domain.status is not RegisterMemStatus.OK or attempt is None:
            raise LLMException(
                f"{domain} is {domain.status.name}: its members have not told their metadata",
                status_code=LLMStatusCode.LLM_NOT_YET_LINK,
            )
        return {
            each: attempt.metadata.get(rank, b"")
            for each, rank in domain.others.items()
            if cluster in (None, each)
        }

    def _newest(self, cluster: int, status: RegisterMemStatus | None = None) -> Domain | None:
        found = [
            domain
            for domain in self._domains()
            if cluster in domain.others and status in (None, domain.status)
        ]
        return max(found, key=lambda domain: domain.serial, default=None)


def _not_linked(cluster: int | None) -> LLMException:
    return LLMException(
        f"cluster {cluster} is not linked: no link names it; call link or link_clusters",
        status_code=LLMStatusCode.LLM_NOT_YET_LINK,
    )
