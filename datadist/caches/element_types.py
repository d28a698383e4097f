"""Element types of the two caches of a transfer: a difference is logged once, or refused.

Upstream compares bytes only (LLM-DataDist API, pull and push), and programs may reinterpret them on
purpose. By default a difference is therefore a warning; with ``datadist.check_types`` it is an error.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

from datadist.base.seen_cases import SeenCases
from datadist.caches.owned import OwnCache
from datadist.caches.peers import PeerView
from datadist.control.messages import Entry, Fetch
from datadist.status import param_invalid
from datadist.types import DataType

log = logging.getLogger("datadist.transfer")

MAX_WARNED = 4096
"""Differences that are remembered; after that many, all are forgotten and may be logged again."""
KNOWN = frozenset(member.value for member in DataType)
UNKNOWN = -1
"""Stands for every number without a :class:`DataType`, so that a peer cannot invent new differences."""


class Side(NamedTuple):
    """One cache of a transfer."""

    cluster: int
    cache_id: int | None
    """None where it is not known, -1 for a CPU cache."""
    data_type: int
    """Number of a :class:`DataType`; a newer peer may have others."""


class ElementTypes:
    """Compares the types of caches; every method works from any thread and takes no lock.

    ``required``: raise LLM_PARAM_INVALID for types that differ, rather than log a warning. Each
    warning is logged once per peer (its incarnation), operation and ordered pair of types.
    """

    def __init__(self, cluster: int, required: bool) -> None:
        self._cluster = cluster
        self.required = required
        self._warned = SeenCases(MAX_WARNED)

    def check_pull(self, view: PeerView, source: Entry, target: OwnCache) -> None:
        """Compare before a pull. Raises LLM_PARAM_INVALID where equal types are required."""
        if source.data_type != target.layout.data_type:
            self._report("pull", view.incarnation, _theirs(view, source), self._ours(target))

    def check_push(self, view: PeerView, source: OwnCache, target: Entry) -> None:
        """Compare before a push. Raises LLM_PARAM_INVALID where equal types are required."""
        if source.layout.data_type != target.data_type:
            self._report("push", view.incarnation, self._ours(source), _theirs(view, target))

    def check_fetch(self, view: PeerView, message: Fetch, target: OwnCache) -> None:
        """Compare before a layer is read on request of its sender, who may require equal types, too.

        Raises LLM_PARAM_INVALID where one of the two engines requires them.
        """
        if message.data_type != target.layout.data_type:
            source = Side(view.session.cluster_id, None, message.data_type)
            self._report(
                "transfer_cache_async",
                view.incarnation,
                source,
                self._ours(target),
                message.same_type,
            )

    def check_copy(self, method: str, source: tuple[int, int], target: tuple[int, int]) -> None:
        """Compare before a copy inside this engine; ``source`` and ``target`` are cache id and type.

        Raises LLM_PARAM_INVALID where equal types are required.
        """
        if source[1] != target[1]:
            self._report(method, "", Side(self._cluster, *source), Side(self._cluster, *target))

    def _ours(self, cache: OwnCache) -> Side:
        return Side(self._cluster, cache.cache_id, cache.layout.data_type)

    def _report(
        self, operation: str, peer: str, source: Side, target: Side, required: bool = False
    ) -> None:
        if self.required or required:
            raise param_invalid(
                f"{operation}: {_difference(source, target)}, and the option datadist.check_types "
                "requires equal types. Nothing of the source was moved, no key was consumed. Create both "
                'caches with the same data_type, or set datadist.check_types to "0" to move the '
                "bytes without conversion"
            )
        case = operation, peer, _known(source.data_type), _known(target.data_type)
        if self._warned.is_new(case):
            log.warning(
                "%s: %s. The bytes are moved without conversion. If the target is to hold the same "
                "numbers, create both caches with the same data_type; if the bytes are "
                'reinterpreted on purpose, ignore this. With the option datadist.check_types = "1" '
                "such transfers are errors. This is logged once for these types%s",
                operation,
                _difference(source, target),
                " and this peer" if peer else "",
            )


def _theirs(view: PeerView, entry: Entry) -> Side:
    return Side(view.session.cluster_id, entry.cache_id, entry.data_type)


def _known(number: int) -> int:
    return number if number in KNOWN else UNKNOWN


def _name(number: int) -> str:
    if _known(number) == UNKNOWN:
        return f"number {number}, which this version does not know"
    return DataType(number).name


def _difference(source: Side, target: Side) -> str:
    return (
        f"the element types differ: the source, {_cache(source)}, has data_type "
        f"{_name(source.data_type)}, and the target, {_cache(target)}, has data_type "
        f"{_name(target.data_type)}"
    )


def _cache(side: Side) -> str:
    if side.cache_id is None:
        return f"a cache of cluster {side.cluster}"
    if side.cache_id < 0:
        return "a CPU cache"
    return f"cache {side.cache_id} of cluster {side.cluster}"
