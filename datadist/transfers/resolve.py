"""Resolves the arguments of a transfer: keys to entries, clusters to links, ranges to tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from datadist.caches.directory import KeyDirectory, KeyName
from datadist.caches.owned import OwnCache, describe
from datadist.caches.peers import PeerView
from datadist.caches.requests import no_answer
from datadist.control.messages import Binding, Entry
from datadist.links.domain import Attempt, Domain
from datadist.status import LLMException, LLMStatusCode, param_invalid
from datadist.transfers.limits import CallLimit
from datadist.transport import Capabilities
from datadist.types import RegisterMemStatus


@dataclass(frozen=True)
class ById:
    """A slot of a cache by its owner's id."""

    cache_id: int
    slot: int


Source: TypeAlias = KeyName | ById


@dataclass(frozen=True)
class Found:
    """Where a source lies: the owner's entry, the slot, and the key that the pull consumes."""

    entry: Entry
    slot: int
    binding: Binding | None


@dataclass(frozen=True)
class Layers:
    """Which layers to move: ranges of layers of ``per_layer`` tensors each; None means all."""

    source: range | None = None
    target: range | None = None
    per_layer: int = 2
    named: bool = True
    """Whether the caller named the number: else it is our cache's, and the peer's must be equal."""

    @property
    def all(self) -> bool:
        """Whether no range is given."""
        return self.source is None and self.target is None


@dataclass(frozen=True)
class Route:
    """A usable link to a peer."""

    domain: Domain
    attempt: Attempt
    rank: int
    view: PeerView

    @property
    def capabilities(self) -> Capabilities:
        """What the link can do with that peer."""
        return self.attempt.capabilities[self.rank]


class Ended(LLMException):
    """The link that a transfer was about to use has ended; another one may serve."""


def text_of(source: Source) -> str:
    """A source for people."""
    if isinstance(source, ById):
        return f"cache id {source.cache_id}, slot {source.slot}"
    return describe(source)


def find(directory: KeyDirectory, source: Source, consumed: set[int]) -> Found | None:
    """The entry of a source in a peer's directory, or None.

    An id finds the slot's request key first, which the pull then consumes (LLM-DataDist API,
    resolution of a pull).
    """
    if not isinstance(source, ById):
        hit = directory.find(source, consumed)
        return Found(hit[0], hit[1].slot, hit[1]) if hit else None
    entry = directory.entries.get(source.cache_id)
    if entry is None or source.slot >= entry.count:
        return None
    binding = directory.request_at(source.cache_id, source.slot, consumed)
    return Found(entry, source.slot, binding)


def routes_to(domains: Iterable[Domain], views: dict[str, PeerView], cluster: int) -> list[Route]:
    """Usable links to a cluster, the newest first."""
    routes = []
    for domain in sorted(domains, key=lambda d: -d.serial):
        attempt = domain.attempt
        if cluster not in domain.others or domain.status is not RegisterMemStatus.OK:
            continue
        rank = domain.ranks[cluster]
        if attempt is None or attempt.dead or rank in attempt.gone:
            continue
        view = views.get(attempt.members[rank].incarnation)
        if view is not None:
            routes.append(Route(domain, attempt, rank, view))
    return routes


def members_of(
    domains: Iterable[Domain], views: dict[str, PeerView], cluster: int
) -> list[PeerView]:
    """The cluster's engines in links that are being formed."""
    attempts = [d.attempt for d in domains if cluster in d.others and d.waiting and d.attempt]
    members = [member for attempt in attempts for member in attempt.members.values()]
    names = {member.incarnation for member in members if member.cluster_id == cluster}
    return [view for name in names if (view := views.get(name)) is not None]


def no_route(
    domains: Iterable[Domain], cluster: int, kind: type[LLMException] = LLMException
) -> LLMException:
    """LLM_NOT_YET_LINK, with the state of the newest link to the cluster, of the newest one that was
    OK, and what to do.
    """
    newest_first = sorted((d for d in domains if cluster in d.others), key=lambda d: -d.serial)
    broken = [d for d in newest_first[1:] if d.status is RegisterMemStatus.OK]
    why = "; ".join(_why_unusable(d, cluster) for d in newest_first[:1] + broken[:1])
    why = (
        why
        or "no link names it; call link on every member and wait for status OK, or link_clusters"
    )
    return kind(
        f"cluster {cluster} is not linked: {why}", status_code=LLMStatusCode.LLM_NOT_YET_LINK
    )


def _why_unusable(domain: Domain, cluster: int) -> str:
    if domain.status is RegisterMemStatus.PREPARING:
        return f"{domain} is still PREPARING; wait_link waits until it is OK"
    if domain.status is RegisterMemStatus.FAILED:
        return f"{domain} FAILED ({domain.reason}); unlink it, correct that and link again"
    gone = domain.attempt.gone if domain.attempt else {}
    reason = gone.get(domain.ranks[cluster], "it was unlinked just now")
    return f"{domain} is broken: {reason}; unlink it and link again"


def reaching(routes: list[Route], first: Route, entry: Entry) -> list[Route]:
    """The routes to the same peer whose links cover the cache's memory, the newest first.

    Raises LLM_PARAM_INVALID when the cache was registered after all of them were linked.
    """
    needed = set(entry.regions)
    found = [
        route
        for route in routes
        if route.view is first.view and needed <= route.attempt.exposed[route.rank]
    ]
    if found:
        return found
    raise param_invalid(
        f"cache {entry.cache_id} of cluster {first.view.session.cluster_id} was registered after "
        f"{first.domain} was linked, so this link does not reach its memory: unlink and link again "
        "(memory from the pool is always reachable)"
    )


def look_up(view: PeerView, source: Source, limit: CallLimit, token: int) -> Found:
    """The source in the peer's directory; a pull of that ``token`` has begun when it is found.

    Asks the peer when it is not there. Raises LLM_KV_CACHE_NOT_EXIST, LLM_TIMEOUT when the peer did
    not answer, LLM_NOT_YET_LINK when it is gone.
    """
    found = _attempt_look_up(view, source, token)
    if found is not None:
        return found
    answered = view.synchronize(limit.left)
    found = _attempt_look_up(view, source, token)
    if found is not None:
        return found
    if answered:
        raise not_there(view, source)
    raise no_answer_of(view, limit, f"whether it has a cache for {text_of(source)}")


def no_answer_of(view: PeerView, limit: CallLimit, what: str) -> LLMException:
    """Of a peer whose session tells whether it is gone, see `datadist.caches.requests.no_answer`."""
    return no_answer(view.session.cluster_id, view.session.closed, limit, what)


def slots_of(cache_id: int, count: int, cluster: int | None = None, blocks: bool = False) -> str:
    """How many slots a cache has, for a text; the cache is ours where no cluster is given."""
    whose = "this engine" if cluster is None else f"cluster {cluster}"
    kind = "blocks" if blocks else "slots"
    return f"cache {cache_id} of {whose} has {count} {kind}, 0 to {count - 1}"


def not_there(view: PeerView, source: Source) -> LLMException:
    """LLM_KV_CACHE_NOT_EXIST for a source that the peer does not have."""
    if isinstance(source, ById):
        with view.lock:
            entry = view.directory.entries.get(source.cache_id)
        if entry is not None and source.slot >= entry.count:
            cluster = view.session.cluster_id
            has = slots_of(source.cache_id, entry.count, cluster, entry.blocks)
            return LLMException(
                f"batch_index is {source.slot}: {has}",
                status_code=LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
            )
    return LLMException(
        f"cluster {view.session.cluster_id} has no cache for {text_of(source)}: it was not allocated "
        "or registered there, was pulled already, or was freed",
        status_code=LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
    )


def _attempt_look_up(view: PeerView, source: Source, token: int) -> Found | None:
    with view.lock:
        found = find(view.directory, source, view.consumed)
        if found is not None:
            view.begin_pull(token)
        return found


def check_agreed(own: OwnCache, entry: Entry, named: bool, cluster: int) -> None:
    """Whether both caches have equally many tensors per layer, unless the caller named the number.

    Raises LLM_PARAM_INVALID.
    """
    mine, theirs = own.layout.tensors_per_layer, entry.tensors_per_layer
    if not named and mine != theirs:
        raise param_invalid(
            f"cache {own.cache_id} has {mine} tensors per layer and cache {entry.cache_id} of cluster "
            f"{cluster} {theirs} (CacheDesc.tensors_per_layer): they must be equal, or give "
            "tensor_num_per_layer"
        )


def tensors_of(layers: Layers, local: int, remote: int) -> tuple[slice, slice]:
    """Tensors to move to and from (LLM-DataDist API, layer ranges); equal counts.

    Raises LLM_PARAM_INVALID.
    """
    per = layers.per_layer
    target = tensor_range(layers.target, per, local, "dst_layer_range", "local")
    source = tensor_range(layers.source, per, remote, "src_layer_range", "owner's")
    count = target.stop - target.start
    if source.stop - source.start != count:
        raise param_invalid(
            f"the pull would move {source.stop - source.start} of the owner's {remote} tensors to "
            f"{count} of the {local} local ones: give layer ranges of equal length"
        )
    return target, source


def tensor_range(layers: range | None, per: int, tensors: int, name: str, whose: str) -> slice:
    """The tensors of a range of layers; None means all. Raises LLM_PARAM_INVALID."""
    if layers is None:
        return slice(0, tensors)
    if layers.stop * per > tensors:
        raise param_invalid(
            f"{name} ends at layer {layers.stop}, but the {whose} cache has {tensors} tensors, "
            f"{tensors // per} layers of {per} (tensor_num_per_layer)"
        )
    return slice(layers.start * per, layers.stop * per)


def check_local(layers: Layers, tensors: int) -> None:
    """What the local tensors alone say of layer ranges (LLM-DataDist API, layer ranges).

    With any range they make whole layers; the range of the destination lies inside of them; both
    ranges are equally long, and that of the source alone covers all of them.

    Raises LLM_PARAM_INVALID.
    """
    source, target, per = layers.source, layers.target, layers.per_layer
    if source is None and target is None:
        return
    if tensors % per:
        raise param_invalid(
            f"the local cache has {tensors} tensors, not a multiple of tensor_num_per_layer {per}"
        )
    mine = tensor_range(target, per, tensors, "dst_layer_range", "local")
    if source is not None and len(source) * per != mine.stop - mine.start:
        raise param_invalid(
            f"src_layer_range {source} has {len(source)} layers, and "
            f"{(mine.stop - mine.start) // per} local ones are to be written: give layer ranges of "
            "equal length"
        )
