"""Cached routes for repeated pulls and pushes between blocks caches.

A decoder pulls a few blocks from the same cache repeatedly. Looking up link, key and bounds takes
longer than moving a block. So the result of a complete look-up is cached, and is used as long as
the peer's directory, the link and our cache do not change. Any other case, and every error, takes
the slow path, which reports errors.

:meth:`Shortcuts.pull` is one function without helpers, since calls and locks are most of the cost
of a small pull.
"""

from __future__ import annotations

from array import array
from time import monotonic
from typing import TypeAlias

import numpy as np

from datadist.base.callers import pass_on
from datadist.caches.owned import OwnCache, OwnDirectory
from datadist.caches.peers import TOKENS
from datadist.control.messages import Entry
from datadist.transfers import resolve
from datadist.transfers.plan import (
    SCALAR_SEGMENTS,
    Blocks,
    Segments,
    check_blocks,
    check_distinct,
    plan_blocks,
)
from datadist.transfers.resolve import Route
from datadist.transfers.transfer import AT_ONCE, SURE_SECONDS, Transfers
from datadist.transport import TransportError

MOST = 256
FEW_BYTES = 256 << 10
"""Largest read of the small path in bytes; such a read takes microseconds, so that repeating it is
cheap.
"""
Few: TypeAlias = "tuple[array[int], array[int], array[int]]"
"""Local addresses, remote addresses, bytes."""
Name: TypeAlias = "tuple[int, ...]"
"""Cluster, model id of the blocks key, id of our cache; of a push also the tensors of a layer, so that
names of pulls and of pushes differ."""


class Way:
    """A resolved route from a blocks key of a cluster to one of our caches."""

    def __init__(
        self, cache: OwnCache, entry: Entry, route: Route, version: int, transfers: Transfers
    ) -> None:
        layout = cache.layout
        self.cache = cache
        self.entry = entry
        """The owner's cache."""
        self.route = route
        self.version = version
        """Of the peer's directory."""
        self.view = route.view
        self.session = route.view.session
        self.attempt = route.attempt
        self.rank = route.rank
        self.turn = route.attempt.locks[route.rank]
        self.gone = route.attempt.gone
        self.tensors = len(layout.bases)
        self.tallies = transfers.tallies(route, push=False)
        self.watched = transfers.watches_control
        """Whether reads of the transport report messages that arrived meanwhile."""
        self.local_bases, self.local_count = layout.bases, layout.count
        self.remote_bases, self.remote_count = tuple(entry.bases), entry.count
        self.local_base, self.remote_base = self.local_bases[0], self.remote_bases[0]
        self.stride = layout.stride
        self.few = min(SCALAR_SEGMENTS, FEW_BYTES // layout.stride)
        self.lengths = [array("q", (layout.stride,) * n) for n in range(self.few + 1)]
        """Vectors of ``stride``, by their number."""

    def holds(self) -> bool:
        """Whether the peer is still linked and its directory has not changed."""
        return (
            self.view.version == self.version
            and not self.session.closed
            and self.rank not in self.gone
        )

    def plan_few(self, src_blocks: list[int], dst_blocks: list[int]) -> Few | None:
        """Up to ``few`` segments of a pull; None for more, and for lists that are not in order."""
        count = len(dst_blocks)
        segments = count * self.tensors
        if count != len(src_blocks) or not 0 < segments <= self.few:
            return None
        length, stride = self.lengths[segments], self.stride
        local, remote = length[:], length[:]  # in half the time of making new ones
        if segments == 1:  # a third of the time of the loops
            (mine,), (theirs,) = dst_blocks, src_blocks
            if type(mine) is not int or type(theirs) is not int:
                return None
            if not (0 <= mine < self.local_count and 0 <= theirs < self.remote_count):
                return None
            local[0] = self.local_base + mine * stride
            remote[0] = self.remote_base + theirs * stride
            return local, remote, length
        if count > 1 and len(set(dst_blocks)) != count:
            return None
        place, bases, limit = 0, self.local_bases, self.local_count
        for block in dst_blocks:
            if type(block) is not int or not 0 <= block < limit:
                return None
            for base in bases:
                local[place] = base + block * stride
                place += 1
        place, bases, limit = 0, self.remote_bases, self.remote_count
        for block in src_blocks:
            if type(block) is not int or not 0 <= block < limit:
                return None
            for base in bases:
                remote[place] = base + block * stride
                place += 1
        return local, remote, length

    def plan(self, theirs: Blocks, mine: Blocks, write: bool) -> Segments | None:
        """The segments between these blocks; None for lists that are not in order."""
        for blocks in (theirs, mine):
            if isinstance(blocks, (list, tuple)):
                if not blocks:
                    return None
            elif not isinstance(blocks, np.ndarray) or not blocks.size:
                return None
        try:
            remote = check_blocks("theirs", theirs, self.remote_count)
            local = check_blocks("mine", mine, self.local_count)
            if write:
                check_distinct("theirs", remote, self.remote_count)
            else:
                check_distinct("mine", local, self.local_count)
            stride = self.stride
            return plan_blocks(
                self.local_bases, self.remote_bases, local, remote, stride, stride, stride
            )
        except (TypeError, ValueError) as error:
            pass_on(error)
            return None


class Shortcuts:
    """Cached routes by key; every method works from any thread."""

    def __init__(self, transfers: Transfers, owned: OwnDirectory) -> None:
        self._transfers = transfers
        self._owned = owned
        self._ways: dict[Name, Way] = {}

    def remember(
        self, name: Name, cache: OwnCache, entry: Entry, route: Route, version: int
    ) -> None:
        """Keep what a full transfer of all layers found; ``version`` is that of the look-up.

        Unless a newer link serves by now: one that comes later changes the version.
        """
        if not self._transfers.serves(route):
            return
        if len(self._ways) >= MOST:
            self._ways.clear()
        self._ways[name] = Way(cache, entry, route, version, self._transfers)

    def clear(self) -> None:
        """Forget all ways."""
        self._ways.clear()

    def pull(self, name: Name, src_blocks: Blocks, dst_blocks: Blocks) -> bool:
        """Pull over a cached route; False if the pull must be repeated on the slow path.

        It may have written to the destination blocks then.

        Raises LLMException as the slow path does.
        """
        started = monotonic()
        way = self._ways.get(name)
        if way is None:
            return False
        if way.watched and type(src_blocks) is list and type(dst_blocks) is list:
            few = way.plan_few(src_blocks, dst_blocks)
            done = None if few is None else self._pull_few(way, few, started)
            if done is False:
                self._ways.pop(name, None)
            if done is not None:
                return done
        return self._move(name, way, way.plan(src_blocks, dst_blocks, False), started, False)

    def push(self, name: Name, src_blocks: Blocks, dst_blocks: Blocks) -> bool:
        """Push over a cached route; False if nothing was written and the push must take the slow
        path.

        Raises LLMException as the slow path does.
        """
        way = self._ways.get(name)
        if way is None:
            return False
        started = monotonic()
        return self._move(name, way, way.plan(dst_blocks, src_blocks, True), started, True)

    def _move(
        self, name: Name, way: Way, segments: Segments | None, started: float, write: bool
    ) -> bool:
        if segments is None:
            return False
        layers = way.tensors // name[-1] if write else 1
        deadline = started + self._transfers.timeout * layers
        token, done = next(TOKENS), False
        try:
            if (
                self._owned.pin(way.cache, token)
                and way.session.settled()
                and way.view.begin_pull_at(way.version, token)
            ):
                self._transfers.move(way.route, segments, deadline, way.entry, write)
                done = True
            way.view.end_pull(token)  # as _end, without the call
            self._owned.unpin(way.cache, token)
        except BaseException as error:
            way.view.pulls.discard(token)  # in C: no handler of a signal comes before these
            way.cache.pins.discard(token)
            self._end(way, token)
            if not isinstance(error, resolve.Ended):
                raise
        if not done:
            self._ways.pop(name, None)
        return done

    def _pull_few(self, way: Way, few: Few, started: float) -> bool | None:
        """Read and then check that the route was still valid; None if the lock of the link is busy."""
        view, transfers = way.view, self._transfers
        local, remote, length = few
        link, rank, token = way.attempt.link, way.rank, next(TOKENS)
        heard: bool | None = None
        held: list[bool] = []
        try:
            held += map(way.turn.acquire, AT_ONCE)  # noted in C, see Transfers
            if True not in held:
                return None
            if (
                self._owned.pin(way.cache, token)
                and view.begin_pull_at(way.version, token)
                and not (link is None or way.attempt.dead or rank in way.gone)
            ):
                heard = link.read(rank, local, remote, length, transfers.timeout)
            view.end_pull(token)  # as _end, without the call
            self._owned.unpin(way.cache, token)
        except BaseException as error:
            if isinstance(error, TransportError):
                transfers.keep(way.route, error, local, length, write=False)
            way.view.pulls.discard(token)  # in C: no handler of a signal comes before these
            way.cache.pins.discard(token)
            self._end(way, token)
            if not isinstance(error, Exception):
                raise
            pass_on(error)
            if not (way.session.settled() and way.holds()):
                return False
            transfers.count(way.route, False, 0, started, failed=True)
            raise transfers.failure(way.route, error, "pull from") from error
        finally:
            if True in held:
                way.turn.release()
        seconds = monotonic() - started
        if heard is not False:
            return False
        # What was being handled has changed the way once that is done, so this order counts. The
        # rest is `holds`, without the call.
        session = way.session
        if session.dispatching or view.version != way.version or session.closed or rank in way.gone:
            return False
        if seconds > SURE_SECONDS and not way.entry.pooled:
            return False
        transfers.count_done(way.tallies, way.stride * len(length), seconds)
        return True

    def _end(self, way: Way, token: int) -> None:
        """Note that a pull ended, as far as it had begun."""
        way.view.end_pull(token)
        self._owned.unpin(way.cache, token)
