"""Pulls of granted blocks: read them, and then whether the grant still lived once they were read.

The owner makes the word of a grant odd before it reuses the blocks. So a word that is unchanged after the
data has been read says that the data is that of the grant, however long the read took.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from datadist.base.callers import pass_on
from datadist.caches.block_ranges import BlockRanges
from datadist.caches.directory import KeyName
from datadist.caches.element_types import ElementTypes
from datadist.caches.owned import OwnCache, OwnDirectory, describe
from datadist.caches.peers import PeerView
from datadist.caches.quarantine import Quarantine
from datadist.control.messages import Entry
from datadist.grants.granted import Granted
from datadist.grants.messages import GrantMessages
from datadist.grants.words import WORD, Words
from datadist.status import LLMException, LLMStatusCode, param_invalid
from datadist.transfers import resolve
from datadist.transfers.block_lists import Blocks, check_blocks, check_destinations
from datadist.transfers.cuts import cut
from datadist.transfers.limits import CallLimit
from datadist.transfers.plan import Segments
from datadist.transfers.pull import plan_pairs
from datadist.transfers.resolve import Found, Layers, Route
from datadist.transfers.transfer import (
    Transfers,
    as_param_invalid,
    check_accessible,
    check_entry_accessible,
)

__all__ = ["GrantedPulls", "GrantedRead"]


UNUSABLE = "; what was read must not be used"


class GrantEnded(LLMException):
    """The grant has ended; the key may name another one."""


@dataclass(frozen=True, eq=False)
class GrantedRead:
    """What one call reads of a grant, and into which blocks of ours."""

    cluster: int
    name: KeyName
    cache_id: int
    positions: Blocks
    """In the granted list; none for all of it."""
    dst_blocks: Blocks
    layers: Layers
    token: Granted | None = None
    release: bool = False
    """Whether it finishes with the grant also where it does not read all."""
    notifies: bool = False
    """Whether a message to the owner follows, which must come after what finishes with the grant."""


class GrantedPulls:
    """Pulls by grant; every method works from any thread."""

    def __init__(
        self, transfers: Transfers, owned: OwnDirectory, grants: GrantMessages, words: Words,
        types: ElementTypes, quarantine: Quarantine, one_sided: bool,
    ) -> None:  # fmt: skip
        self._transfers = transfers
        self._owned = owned
        self._grants = grants
        self._words = words
        self._types = types
        self._quarantine = quarantine
        self._one_sided = one_sided

    def may_pull(self, cluster: int) -> bool:
        """Whether a link names the cluster, so that a key may be one of its grants."""
        return self._transfers.names(cluster)

    def pull(self, read: GrantedRead, limit: CallLimit) -> bool:
        """Pull granted blocks within the time of ``limit``; False if the key names no grant.

        Raises LLMException with the status codes of ``CacheManager.pull_blocks``.
        """
        self._transfers.check_cluster(read.cluster)
        return self._owned.using(read.cache_id, lambda cache: _Pull(self, cache, read, limit).run())

    def check(self, read: GrantedRead) -> None:
        """Raise what :meth:`pull` raises for what this engine alone can tell."""
        self._transfers.check_cluster(read.cluster)
        self._owned.using(
            read.cache_id, lambda cache: _Pull(self, cache, read, CallLimit()).check_own()
        )

    def release(self, cluster: int, name: KeyName, token: Granted | None) -> None:
        """Finish with a grant without reading; without a token with that which the key names there.

        What we know of the key may be an earlier grant. Raises LLM_NOT_YET_LINK.
        """
        self._transfers.check_cluster(cluster)
        limit = CallLimit().begin(self._transfers.timeout)
        view = self._transfers.routes(cluster, limit.deadline)[0].view
        if token is not None and token.incarnation != view.incarnation:
            return  # of an engine that has ended, and its grants with it
        self._finish(view, name, None if token is None else token.generation)

    def _finish(
        self, view: PeerView, name: KeyName, generation: int | None, at_once: bool = False
    ) -> None:
        self._grants.forget(view, name)
        self._grants.release(view, name if generation is None else generation, at_once)


class _Pull:
    """One pull into a cache of ours."""

    def __init__(
        self, pulls: GrantedPulls, cache: OwnCache, read: GrantedRead, limit: CallLimit
    ) -> None:
        self._pulls = pulls
        self._transfers = pulls._transfers
        self._cache = cache
        self._wanted = read
        self._cluster, self._name = read.cluster, read.name
        self._limit = limit

    def run(self) -> bool:
        """False where the key names no grant."""
        self._limit.begin(self._transfers.timeout)
        self.check_own()
        routes = self._transfers.routes(self._cluster, self._limit.deadline)
        view, token = routes[0].view, self._wanted.token
        granted = self._check_token(view, token) if token else self._known(view)
        fresh = granted is None
        if granted is None:
            if self._is_of_cache(view):
                return False
            granted = self._ask(view)
        if granted is None:
            return self._refuse(view)
        try:
            self._attempt(routes, view, granted)
        except GrantEnded as error:
            self._pulls._grants.forget(view, self._name)
            pass_on(error)
            if token is not None or fresh:
                raise
            granted = self._ask(view)  # what was known is old: the key may be granted again
            if granted is None:
                raise
            self._attempt(routes, view, granted)
        return True

    def check_own(self) -> None:
        """Raise for what this engine alone can tell; note the destination blocks."""
        layout, wanted = self._cache.layout, self._wanted
        if self._pulls._one_sided:
            check_accessible(self._cache)
        resolve.check_local(wanted.layers, len(layout.bases))
        with as_param_invalid():
            self._targets = check_destinations("dst_blocks", wanted.dst_blocks, layout.count)
        if wanted.token is not None:
            self._places(wanted.token)

    # -- which grant -------------------------------------------------------------------------

    def _check_token(self, view: PeerView, token: Granted) -> Granted:
        if token.incarnation != view.incarnation:
            raise self._ended("the token is of an engine of that cluster that has ended")
        return token

    def _known(self, view: PeerView) -> Granted | None:
        return self._pulls._grants.known(view, self._name)

    def _ask(self, view: PeerView) -> Granted | None:
        return self._pulls._grants.ask(view, self._name, self._limit)

    def _is_of_cache(self, view: PeerView) -> bool:
        with view.lock:
            found = resolve.find(view.directory, self._name, view.consumed)
        if found is not None and self._wanted.release:
            raise param_invalid(
                f"release is True, but {describe(self._name)} names a cache of cluster {self._cluster} "
                "and no grant"
            )
        return found is not None

    def _refuse(self, view: PeerView) -> bool:
        """The owner has no such grant: a cache of that key has been heard of by now, if there is one."""
        if self._is_of_cache(view) or not (len(self._wanted.positions) or self._wanted.release):
            return False
        raise self._ended("no grant of that key lives there")

    def _ended(self, why: str) -> GrantEnded:
        return GrantEnded(
            f"the grant of {describe(self._name)} by cluster {self._cluster} does not exist: {why}",
            status_code=LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
        )

    # -- moving ------------------------------------------------------------------------------

    def _attempt(self, routes: list[Route], view: PeerView, granted: Granted) -> None:
        """Raises :class:`GrantEnded` where it has ended, whatever the read itself came to."""
        try:
            whole = view.pulling(lambda pin: self._move(routes, view, granted, pin))
        except GrantEnded:
            raise
        except LLMException as error:
            pass_on(error)
            if self._is_over(view, granted, error):
                why = f"it ended during the read, which failed ({error})"
                raise self._ended(why + UNUSABLE) from error
            raise
        if whole or self._wanted.release:
            self._pulls._finish(view, self._name, granted.generation, self._wanted.notifies)

    def _is_over(self, view: PeerView, granted: Granted, error: LLMException) -> bool:
        """Whether a read that failed was one of a grant that has ended, as far as the owner says.

        An owner to which no link leads any more says of no grant that it lives.
        """
        unsaid = LLMStatusCode.LLM_NOT_YET_LINK, LLMStatusCode.LLM_ENGINE_FINALIZED
        cancelled, spent = self._limit.cancelled, not self._limit.left
        if view.session.closed or cancelled or spent or error.status_code in unsaid:
            return False
        if not self._transfers.leads_to(view):
            return False
        try:
            return not self._is_live(view, granted)
        except LLMException as failed:
            pass_on(failed)
            return False

    def _is_live(self, view: PeerView, granted: Granted) -> bool:
        return self._pulls._grants.is_live(view, granted.generation, self._limit)

    def _move(self, routes: list[Route], view: PeerView, granted: Granted, pin: int) -> bool:
        """Whether all of the grant was read."""
        found = self._find(view, granted, pin)
        layers = self._wanted.layers
        resolve.check_agreed(self._cache, found.entry, layers.named, self._cluster)
        local, remote = len(self._cache.layout.bases), len(found.entry.bases)
        mine, theirs = resolve.tensors_of(layers, local, remote)
        blocks = self._blocks(granted, found.entry)
        planned = plan_pairs(self._cache, found, mine, theirs, self._targets, blocks)
        segments = cut(planned, self._cache.layout.cuts, found.entry.cuts)
        self._pulls._types.check_pull(view, found.entry, self._cache)

        def move(route: Route) -> None:
            reader = _WordReader(self._pulls, route, granted, self._limit)
            try:
                reader.take()
                self._transfers.move(
                    route, reader.segments(segments), self._limit, found.entry,
                    after=lambda: self._check(view, granted, reader),
                )  # fmt: skip
            finally:
                reader.close()

        self._transfers.move_over(resolve.reaching(routes, routes[0], found.entry), move)
        positions = self._wanted.positions
        every = len(positions) == 0 or len(set(positions)) == len(granted.blocks)
        return every and theirs == slice(0, remote)

    def _find(self, view: PeerView, granted: Granted, pin: int) -> Found:
        entry = self._entry(view, granted.cache_id, pin)
        if entry is None:  # its news may be on the way, behind the token
            answered = view.synchronize(self._limit.left)
            entry = self._entry(view, granted.cache_id, pin)
            if entry is None and not answered:
                raise resolve.no_answer_of(
                    view, self._limit, "whether the cache of the grant lives"
                )
        if entry is None or not entry.blocks:
            raise self._ended("its cache was freed")
        found = Found(entry, 0, None)
        if self._pulls._one_sided:
            check_entry_accessible(found)
        return found

    @staticmethod
    def _entry(view: PeerView, cache_id: int, pin: int) -> Entry | None:
        with view.lock:
            entry = view.directory.entries.get(cache_id)
            if entry is not None:
                view.begin_pull(pin)
            return entry

    def _blocks(self, granted: Granted, entry: Entry) -> Sequence[int]:
        """The owner's blocks that are to be read. Raises LLM_PARAM_INVALID."""
        places = self._places(granted)
        blocks: Sequence[int] = granted.blocks[np.asarray(places, np.int64)].tolist()
        if max(blocks) >= entry.count:
            raise self._ended(
                f"the token names block {max(blocks)}, and the cache has {entry.count}"
            )
        return blocks

    def _places(self, granted: Granted) -> Blocks:
        """The positions in the granted list that are to be read. Raises LLM_PARAM_INVALID."""
        count, places = len(granted.blocks), self._wanted.positions
        with as_param_invalid():
            places = self._check_places(places, count) if len(places) else range(count)
        if len(places) != len(self._targets):
            raise param_invalid(
                f"dst_blocks has {len(self._targets)} entries, and {len(places)} of the {count} granted "
                "blocks are to be pulled: each goes to the destination block at the same place"
            )
        return places

    @staticmethod
    def _check_places(places: Blocks, count: int) -> Blocks:
        holder = "src_blocks are positions in the list of the grant, which"
        return check_blocks("src_blocks", places, count, holder)

    def _check(self, view: PeerView, granted: Granted, reader: _WordReader) -> None:
        """The data has been read by now. Raises :class:`GrantEnded`."""
        value = reader.value()
        live = self._is_live(view, granted) if value is None else value == granted.generation
        if not live:
            raise self._ended("it was consumed, revoked, or has lapsed meanwhile" + UNUSABLE)


class _WordReader:
    """The word of a grant, read over a route; with the data, where reads are ordered."""

    def __init__(
        self, pulls: GrantedPulls, route: Route, granted: Granted, limit: CallLimit
    ) -> None:
        self._pulls = pulls
        self._route = route
        self._granted = granted
        self._limit = limit
        self._with_data = False
        self._scratch: list[int] = []
        """The number of the word that is read into; none where the owner is asked instead."""

    def take(self) -> None:
        """Have a word to read into, if the link reaches that of the owner."""
        reached = self._route.attempt.exposed.get(self._route.rank, frozenset())
        if self._granted.word_region in reached:
            self._pulls._words.take_scratch(self._scratch)

    def _vectors(self) -> tuple[array[int], array[int], array[int]]:
        here = self._pulls._words.scratch_address(self._scratch[0])
        return array("q", [here]), array("q", [self._granted.word_address]), array("q", [WORD])

    def segments(self, data: Segments) -> Segments:
        """What to read for the data: in one read with the word, or by itself."""
        ordered = self._pulls._transfers.reads_in_order(self._route)
        self._with_data = bool(self._scratch) and ordered
        if not self._with_data:
            return data
        local, remote, length = (
            array("q", np.asarray(each, np.int64).tobytes())
            for each in (data.local, data.remote, data.length)
        )
        for vector, more in zip((local, remote, length), self._vectors(), strict=True):
            vector.extend(more)
        return Segments(local, remote, length, data.nbytes)

    def value(self) -> int | None:
        """The word, once the data has been read; None where it cannot be read. Raises as a read."""
        if not self._scratch:
            return None
        if not self._with_data:
            self._read()
        return self._pulls._words.value(self._scratch[0])

    def _read(self) -> None:
        local, remote, length = self._vectors()
        route = self._route
        if route.attempt.link is None:
            raise resolve.no_route([], route.attempt.members[route.rank].cluster_id, resolve.Ended)
        if not self._limit.left:  # of no read, so that the link is not given up
            cluster = route.attempt.members[route.rank].cluster_id
            raise LLMException(
                f"the data of cluster {cluster} was read, but no time is left to read whether the grant "
                f"lives: the call has {self._limit}",
                status_code=LLMStatusCode.LLM_TIMEOUT,
            )
        self._pulls._transfers.operate(
            route, Segments(local, remote, length, WORD), self._limit, write=False
        )

    def close(self) -> None:
        """Give the scratch word back, once nothing is read into it."""
        words = self._pulls._words
        for number in self._scratch:
            address = words.scratch_address(number)
            give_back = partial(words.give_back, number)
            if not self._pulls._quarantine.defers(BlockRanges((address,), WORD), give_back):
                give_back()
