"""Our own grants: who may read which blocks, until when, and who has finished.

A grant lives in one dict, and ends in one order: its word becomes odd, then it is forgotten, then its
state says so. An exception may come anywhere: an end that was begun is noted, and the next call
completes it. Leases run on the monotonic clock of this process only.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from datadist.base.event_queue import EventQueue
from datadist.caches.directory import KeyName
from datadist.caches.owned import OwnDirectory, describe
from datadist.control.reactor import Reactor, Timer
from datadist.grants.granted import Granted
from datadist.grants.own_grant import OwnGrant
from datadist.grants.state import GrantState
from datadist.grants.words import SLOTS, Words
from datadist.status import LLMException, LLMStatusCode, param_invalid
from datadist.transports.defects import text_of

__all__ = ["MAX_ENDED", "MAX_GRANTS", "OwnGrants"]

log = logging.getLogger("datadist.memory")

T = TypeVar("T")

MAX_GRANTS = 1 << 17
"""Live grants of one engine: about 2 KB each, and 8 bytes per block."""
MAX_ENDED = 1 << 16
"""Ended grants that wait for the program; it has to take them."""
LAPSES = 256
"""Leases that end in one turn of the control thread."""
MANY_LEASES = 64
"""So many of grants that have ended are kept at least."""
RETRY_SECONDS = 1.0
"""From one attempt to the next to end a grant whose word the device does not take."""


class OwnGrants:
    """Every method works from any thread, but for those of peers and timers, which are the reactor's."""

    def __init__(
        self, owned: OwnDirectory, words: Words, reactor: Reactor, cluster: int, incarnation: str
    ) -> None:
        self._owned = owned
        self._words = words
        self._reactor = reactor
        self._cluster = cluster
        self._incarnation = incarnation
        self._live: dict[int, OwnGrant] = {}
        """By generation."""
        self._by_name: dict[KeyName, OwnGrant] = {}
        self._by_cache: dict[int, dict[OwnGrant, None]] = {}
        self._by_reader: dict[str, dict[OwnGrant, None]] = {}
        """By the incarnation of peers that asked."""
        self._ending: dict[int, tuple[OwnGrant, GrantState]] = {}
        """Ends that were begun, by generation."""
        self._generations = itertools.count(2, 2)
        self._calls = itertools.count(1)
        """Numbers of those of :meth:`take_ended`."""
        self._slots = 0
        """So many were ever used."""
        self._free: dict[int, None] = {}
        self._leases: list[tuple[float, int]] = []
        """Deadlines and generations, a heap; deadlines of renewed grants are earlier than they are."""
        self._timer: Timer | None = None
        self._due = math.inf
        self._closed = False
        self._warned = False
        self.ended: EventQueue[OwnGrant] = EventQueue()
        owned.granted = self._by_name
        owned.before_removal = self._on_removed

    def __len__(self) -> int:
        """How many live."""
        return len(self._live)

    # -- granting ----------------------------------------------------------------------------

    def add(self, grant: OwnGrant) -> None:
        """Open the blocks; an earlier grant of the key is revoked. What is interrupted grants nothing.

        Raises LLM_PARAM_INVALID for a key of a cache and for too many grants, LLM_KV_CACHE_NOT_EXIST,
        LLM_ENGINE_FINALIZED, LLM_FAILED where the device does not take the word; an earlier grant lives
        on then.
        """
        try:
            self._run(lambda: self._add(grant))
            if grant.deadline < self._due:
                self._reactor.post(self._arm)
        except BaseException:
            grant.told = True
            self._owned.state.post(lambda: self._end(grant, GrantState.REVOKED))
            raise

    def _add(self, grant: OwnGrant) -> None:
        self._check(grant)
        earlier = self._by_name.get(grant.name)
        if earlier is None and len(self._live) >= MAX_GRANTS:
            raise param_invalid(
                f"{len(self._live)} grants live, and an engine has at most {MAX_GRANTS}: end some first"
            )
        grant.generation = next(self._generations)
        self._live[grant.generation] = grant
        self._take_slot(grant)
        if earlier is not None:
            self._end(earlier, GrantState.REVOKED)
        self._by_cache.setdefault(grant.cache_id, {})[grant] = None
        grant.deadline = time.monotonic() + grant.lease
        self._note_lease(grant.deadline, grant.generation)
        self._by_name[grant.name] = grant

    def _check(self, grant: OwnGrant) -> None:
        if self._closed:
            raise LLMException(
                "the engine was finalized meanwhile", status_code=LLMStatusCode.LLM_ENGINE_FINALIZED
            )
        if self._owned.get(grant.cache_id) is None:
            raise LLMException(
                f"cache {grant.cache_id} does not exist in this engine: it was freed",
                status_code=LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
            )
        cache_id = self._owned.cache_of(grant.name)
        if cache_id is not None:
            raise param_invalid(
                f"the key ({describe(grant.name)}) is bound to cache {cache_id}: a key names a grant or "
                "a cache; use another key, or remove that one first"
            )

    def _take_slot(self, grant: OwnGrant) -> None:
        if not self._words.region_id:
            return
        if self._free:
            grant.slot, _ = self._free.popitem()  # what is interrupted here loses a slot
        elif self._slots < SLOTS:
            self._slots += 1  # first, so that no slot is given twice
            grant.slot = self._slots - 1
        else:
            return
        try:
            self._words.write(grant.slot, grant.generation)
        except LLMException:
            self._free[grant.slot] = None
            grant.slot = None
            raise

    def token(self, grant: OwnGrant) -> bytes:
        """What a reader needs to know of it."""
        slot = grant.slot
        return Granted(
            self._cluster, self._incarnation, grant.generation,
            0 if slot is None else self._words.address(slot),
            0 if slot is None else self._words.region_id,
            grant.cache_id, grant.name, grant.blocks,
        ).encode()  # fmt: skip

    def renew(self, grant: OwnGrant, lease: float) -> None:
        """A lease of so many seconds from now on. Raises LLM_KV_CACHE_NOT_EXIST once it has ended."""
        self._run(lambda: self._renew(grant, lease))
        if grant.deadline < self._due:
            self._reactor.post(self._arm)

    def _renew(self, grant: OwnGrant, lease: float) -> None:
        if grant.state is not GrantState.GRANTED:
            raise LLMException(
                f"the grant of {describe(grant.name)} has ended ({grant.state.name}): grant the blocks "
                "again",
                status_code=LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
            )
        deadline = time.monotonic() + lease
        if deadline < grant.deadline:
            self._note_lease(deadline, grant.generation)
        grant.lease, grant.deadline = lease, deadline

    def _note_lease(self, deadline: float, generation: int) -> None:
        """Also forgets grants that have ended, whose leases may have been long, once they are most."""
        if len(self._leases) > MANY_LEASES + 2 * len(self._live):
            live = list(self._live.values())
            self._leases = sorted((grant.deadline, grant.generation) for grant in live)
        heapq.heappush(self._leases, (deadline, generation))

    # -- ending ------------------------------------------------------------------------------

    def revoke(self, grant: OwnGrant) -> None:
        """Close the blocks, unless it has ended; nobody reads them with success from then on.

        Raises LLM_FAILED where the device does not take the word; the grant lives on then.
        """
        self._run(lambda: self._end(grant, GrantState.REVOKED))
        if grant.state is GrantState.GRANTED:
            raise LLMException(
                f"the grant of {describe(grant.name)} cannot be revoked: its generation word cannot be "
                "written (see the log); do not use the blocks",
                status_code=LLMStatusCode.LLM_FAILED,
            )

    def _run(self, change: Callable[[], T]) -> T:
        def settled() -> T:
            self._settle()
            return change()

        return self._owned.state.run(settled)

    def _post(self, change: Callable[[], object]) -> None:
        def settled() -> None:
            self._settle()
            change()

        self._owned.state.post(settled)

    def _settle(self) -> None:
        """Complete what an exception interrupted."""
        for grant, state in list(self._ending.values()):
            self._end(grant, state)

    def _end(self, grant: OwnGrant, state: GrantState) -> None:
        """End a grant, in the order of the text above; harmless for one that has ended."""
        generation = grant.generation
        if generation not in self._live and generation not in self._ending:
            return
        _, state = self._ending.setdefault(generation, (grant, state))
        if grant.state is GrantState.GRANTED and not self._close_word(grant):
            self._ending.pop(generation, None)
            return
        self._forget(grant)
        if grant.slot is not None:
            self._free[grant.slot] = None
        self._live.pop(generation, None)
        self._tell(grant, state)
        self._ending.pop(generation, None)

    def _close_word(self, grant: OwnGrant) -> bool:
        """Whether no read of the blocks succeeds any more; else it is tried again later."""
        if grant.slot is None or self._closed:
            return True
        try:
            self._words.write(grant.slot, grant.generation + 1)
        except LLMException as error:
            why = text_of(error, self._words)
            log.error("the grant of %s cannot be ended yet: %s", describe(grant.name), why)
            grant.deadline = time.monotonic() + RETRY_SECONDS
            heapq.heappush(self._leases, (grant.deadline, grant.generation))
            self._reactor.post(self._arm)
            return False
        return True

    def _forget(self, grant: OwnGrant) -> None:
        if self._by_name.get(grant.name) is grant:
            del self._by_name[grant.name]
        _discard(self._by_cache, grant.cache_id, grant)
        for reader in grant.asked:
            _discard(self._by_reader, reader, grant)

    def _tell(self, grant: OwnGrant, state: GrantState) -> None:
        grant.state = state
        grant.done.set()
        if grant.told:
            return
        if len(self.ended) < MAX_ENDED:
            self.ended.put(grant)
        elif not self._warned:
            self._warned = True
            log.warning(
                "%d ended grants wait for the program, and further ends are not queued: call "
                "ended_grants now and then",
                MAX_ENDED,
            )
        grant.told = True

    def take_ended(self) -> list[Any]:
        """What the program has of the grants that have ended since the last call, each once.

        Where it is interrupted, the next call returns them all.
        """
        call, queued = next(self._calls), list[OwnGrant]()
        try:
            self.ended.take_into(queued)
            fresh = [grant for grant in dict.fromkeys(queued) if not grant.taken]
            handles = [grant.handle for grant in fresh]
            for grant in fresh:
                grant.taken = call
            return handles
        except BaseException:
            for grant in queued:
                if grant.taken == call:
                    grant.taken = 0
            self.ended.put_back(queued)
            raise

    def _on_removed(self, cache_id: int) -> None:
        """A cache goes; called by who holds the state."""
        self._settle()
        for grant in list(self._by_cache.get(cache_id, ())):
            self._end(grant, GrantState.REVOKED)

    def close(self) -> None:
        """End all, since the engine ends."""
        self._owned.state.do(self._close)

    def _close(self) -> None:
        self._settle()
        for grant in list(self._live.values()):
            self._end(grant, GrantState.REVOKED)
        self._closed = True
        self.ended.close()

    # -- leases ------------------------------------------------------------------------------

    def _arm(self) -> None:
        """Have the timer come with the first deadline; on the reactor."""
        leases = self._leases
        due = leases[0][0] if leases else math.inf
        if due >= self._due and self._timer is not None:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._due, self._timer = due, None
        if leases:
            delay = max(0.0, due - time.monotonic())
            self._timer = self._reactor.later(delay, self._on_timer)

    def _on_timer(self) -> None:
        self._timer, self._due = None, math.inf
        self._post(self._lapse)

    def _lapse(self) -> None:
        now, leases = time.monotonic(), self._leases
        for _ in range(LAPSES):
            if not leases or leases[0][0] > now:
                break
            generation = leases[0][1]
            grant = self._live.get(generation)
            if grant is not None and grant.deadline > now:  # it was renewed
                heapq.heapreplace(leases, (grant.deadline, generation))
                continue
            if grant is not None:
                self._end(grant, GrantState.LAPSED)
            if leases and leases[0][1] == generation:
                heapq.heappop(leases)
        self._reactor.post(self._arm)

    # -- readers -----------------------------------------------------------------------------

    def asked(self, incarnation: str, name: KeyName, answer: Callable[[bytes], None]) -> None:
        """A peer asks for the grant of a key; it hears the token, or nothing."""

        def change() -> None:
            grant = self._by_name.get(name)
            if grant is not None and incarnation not in grant.finished:
                self._by_reader.setdefault(incarnation, {})[grant] = None
                grant.asked.add(incarnation)
                grant.lost.discard(incarnation)
            answer(b"" if grant is None else self.token(grant))

        self._post(change)

    def checked(self, generation: int, answer: Callable[[bool], None]) -> None:
        """A peer asks whether a grant lives."""
        self._post(lambda: answer(generation in self._live))

    def released(
        self, incarnation: str, generations: Iterable[int], names: Iterable[KeyName]
    ) -> None:
        """A peer has finished with these."""

        def change() -> None:
            found = [self._live.get(generation) for generation in generations]
            for grant in [*found, *(self._by_name.get(name) for name in names)]:
                if grant is not None and grant.state is GrantState.GRANTED:
                    self._finish(grant, incarnation)

        self._post(change)

    def _finish(self, grant: OwnGrant, incarnation: str) -> None:
        grant.finished.add(incarnation)
        grant.lost.discard(incarnation)
        grant.asked.discard(incarnation)
        _discard(self._by_reader, incarnation, grant)
        self._end_if_over(grant)

    def _end_if_over(self, grant: OwnGrant) -> None:
        if len(grant.finished) >= grant.readers:
            self._end(grant, GrantState.CONSUMED)
        elif len(grant.finished) + len(grant.lost) >= grant.readers and grant.lost:
            self._end(grant, GrantState.READER_LOST)

    def lost(self, incarnation: str) -> None:
        """A peer's session is over: what it asked for and has not finished with, it never will."""

        def change() -> None:
            for grant in list(self._by_reader.get(incarnation, ())):
                grant.lost.add(incarnation)
                grant.asked.discard(incarnation)
                _discard(self._by_reader, incarnation, grant)
                self._end_if_over(grant)

        self._post(change)


def _discard(groups: dict[Any, dict[OwnGrant, None]], key: object, grant: OwnGrant) -> None:
    """Take a grant out of a group, and the group away when it is empty."""
    group = groups.get(key)
    if group is not None:
        group.pop(grant, None)
        if not group:
            groups.pop(key, None)
