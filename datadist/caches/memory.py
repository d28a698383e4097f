"""The memory of one engine: pools per placement, and regions that the user registered.

Registration (transport interface): ranges that overlap share the regions of what they have in common,
and only the rest is registered, so a transport never gets overlapping regions, and a region never
changes while links and transfers use it. A range may so lie in several regions: :meth:`Memory.begins`
says where these begin. After `unregister` a region stays registered with the transport until the last
link that exposes it is closed.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import mmap
import time
from bisect import bisect_right, insort
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import itemgetter
from typing import TypeAlias

from datadist.base.exclusive import Exclusive
from datadist.base.flag import Flag
from datadist.caches.block_ranges import BlockRanges
from datadist.caches.pool import PagePool, PoolExhausted, Run
from datadist.caches.pool_config import PoolConfig
from datadist.caches.quarantine import Quarantine
from datadist.status import LLMException, LLMStatusCode, param_invalid
from datadist.transport import Link, Offer, Placement, Region, Transport
from datadist.transports.defects import text_of

log = logging.getLogger("datadist.memory")

RETURN_SECONDS = 1.0
"""How long an allocation that does not fit waits for freed pages that peers have not confirmed yet."""


MAX_SINGLE_INSERTS = 64
"""Up to this number of new regions, inserting each is cheaper than sorting all."""
Range: TypeAlias = "tuple[int, int]"
"""Address and bytes."""
POOL = "pool"
"""The user of a pool's region, for good."""


class _ToldLink:
    """An open link, and what it was told of regions that it was not opened over."""

    def __init__(self, known: frozenset[int]) -> None:
        self.link: Link | None = None
        """None until it is open."""
        self._known = known
        """Ids of the regions that it was opened over."""
        self._told: dict[int, list[None]] = {}
        """By id: an item once a region was added, two once it was removed. They are noted in C: a
        handler of a signal that raises makes no call twice."""

    def add(self, region_id: int, region: Region) -> None:
        """Once; a second time only if it failed. Raises what the link raises."""
        if self.link is not None and region_id not in self._known:
            told = self._told.setdefault(region_id, [])
            if not told:
                told += map(self.link.region_added, (region,))

    def remove(self, region_id: int, region: Region) -> None:
        """Once, and only after :meth:`add`."""
        told = self._told.get(region_id, [])
        if self.link is not None and len(told) == 1:
            try:
                told += map(self.link.region_removed, (region,))
            except Exception as error:
                log.error(
                    "a link that was told of a region's end raised: %s", text_of(error, self.link)
                )
        self._told.pop(region_id, None)


_left: list[object] = []
"""Of engines that ended, kept since transfers may still touch them."""


@dataclass(eq=False)
class _RegisteredRegion:
    region: Region
    users: set[Hashable] = field(default_factory=set)
    """Who registered something that lies in it."""
    exposed: bool = True
    links: set[Hashable] = field(default_factory=set)


class Memory:
    """Pools and registered regions; every method works from any thread.

    What is registered is one dict of regions and their users, each of which comes and goes in one step.
    The rest follows from that, and is found anew where an exception interrupted a change.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.quarantine = Quarantine()
        self._ids = itertools.count(1)
        self._registering = Exclusive()
        """While the transport registers or releases, which takes long."""
        self._state = Exclusive()
        """While the regions change."""
        self._held: dict[int, _RegisteredRegion] = {}
        self._fresh: list[Region] = []
        """Known to the transport, on their way into the dict."""
        self._links: dict[Hashable, _ToldLink] = {}
        """Changes while something is being registered or released, but for newcomers."""
        self._dropped: dict[int, Region] = {}
        """Known to the transport, and gone from the dict."""
        self.core: set[Hashable] = set()
        """Users that are parts of core; their memory alone is no reason to link."""
        self._buffers: list[object] = []
        """Memory of core that is registered."""
        self._pools: dict[Placement, tuple[int, PagePool]] = {}
        self._coming: dict[Placement, dict[Hashable, int]] = {p: {} for p in Placement}
        """Allocations per placement and owner that peers have yet to let go."""
        self._tensors: list[tuple[BlockRanges, list[object]]] = []
        """Of caches that were not unregistered when the engine ended."""
        self._bells: dict[Flag, None] = {}
        """Of allocations that wait for them."""
        self._closed = False
        self._whole = False
        """Whether what follows from the dict of regions is right."""
        self._mend()

    def _mend(self) -> None:
        """Find out what follows from the dict of regions, unless that is known."""
        if self._whole:
            return
        self._by_begin: dict[int, int] = {h.region.address: i for i, h in self._held.items()}
        """Ids by address."""
        self._begins = sorted(self._by_begin)
        """The addresses in order."""
        self._bytes = dict.fromkeys(Placement, 0)
        """What is registered, pools included."""
        for held in self._held.values():
            self._bytes[held.region.placement] += held.region.size
        self._whole = True

    # -- pools -------------------------------------------------------------------------------

    def add_pool(self, placement: Placement, config: PoolConfig) -> None:
        """Reserve and expose a pool.

        Raises LLM_OUT_OF_MEMORY where there is not enough, LLM_PARAM_INVALID above the transport's
        limit or where no page fits, LLM_FAILED for what else the transport refuses.
        """
        if config.page_size > config.memory_size:
            raise param_invalid(
                f"a {placement.name} pool of {config.memory_size} bytes holds no page of "
                f"{config.page_size} bytes: raise memory_size or lower page_shift"
            )
        self._check_limit(placement, config.memory_size)
        what = f"the {placement.name} pool of {config.memory_size} bytes"
        self._allocate_fresh(config.memory_size, placement, what)
        region = self._fresh[-1]
        (region_id,) = self._state.run(lambda: self._take(POOL))
        pool = PagePool(region.address, region.size, config.page_shift)
        self._pools[placement] = (region_id, pool)

    def add_region(self, size: int, placement: Placement, user: str) -> tuple[int, Region]:
        """Memory of core that links expose from then on, one region per user; its id and itself.

        It is of the kind that peers reach anyway: the transport's where there is a pool, else our own,
        which is registered as the user's caches are, unless the processor cannot have such memory. A
        user has it until :meth:`close`. Raises as :meth:`add_pool`, LLM_ENGINE_FINALIZED, and
        ``RuntimeError`` inside of another call of the same thread.
        """
        return self._registering.run(lambda: self._add_region(size, placement, user))

    def _add_region(self, size: int, placement: Placement, user: str) -> tuple[int, Region]:
        self._release_all()
        self._check_open()
        for region_id in self.regions_of(user):
            return region_id, self._held[region_id].region
        self._check_limit(placement, size)
        if len(self._held) >= Offer.MAX_REGIONS:
            raise param_invalid(f"{len(self._held)} ranges are registered: none is left for core")
        try:
            if self._pools or placement not in self._transport.capabilities.host_addressable:
                self._allocate_fresh(size, placement, f"{size} bytes of {placement.name} memory")
            else:
                buffer = (ctypes.c_char * size).from_buffer(mmap.mmap(-1, size))
                self._buffers.append(buffer)
                self._register_fresh([(ctypes.addressof(buffer), size)], placement)
            (region_id,) = self._state.run(lambda: self._take(user))
            self.core.add(user)
            self._tell_links([region_id])
        except BaseException:
            self._let_go(self.regions_of(user), user)
            raise
        return region_id, self._held[region_id].region

    def _allocate_fresh(self, size: int, placement: Placement, what: str) -> None:
        try:
            self._fresh += map(self._transport.allocate, (size,), (placement,))
        except Exception as error:
            short = isinstance(error, MemoryError)
            raise LLMException(
                f"cannot allocate {what}: {error if short else text_of(error, self._transport)}",
                status_code=LLMStatusCode.LLM_OUT_OF_MEMORY if short else LLMStatusCode.LLM_FAILED,
            ) from error

    def has_pool(self, placement: Placement | None = None) -> bool:
        """Whether a pool of that placement, or any, is configured."""
        return bool(self._pools) if placement is None else placement in self._pools

    def pool_region(self, placement: Placement) -> tuple[int, Region]:
        """Id and region of the pool of that placement. Raises LLM_ENGINE_FINALIZED."""
        region_id = self._pools[placement][0]
        held = self._held.get(region_id)
        if held is None:
            raise _finalized()
        return region_id, held.region

    def wait_filled(self, timeout: float) -> None:
        """Wait for the pages of all regions, and raise, as :meth:`Region.wait_filled` does."""
        deadline = time.monotonic() + timeout
        for held in list(self._held.values()):
            held.region.wait_filled(max(0.0, deadline - time.monotonic()))

    def pool_usage(self, placement: Placement) -> dict[str, int]:
        """Pages of a pool in use, free, and freed but waiting for peers; bytes of a page.

        Takes no lock: a signal handler may ask.
        """
        pool = self._pools[placement][1]
        used = pool.pages_used
        return {
            "page_bytes": pool.page_size,
            "pages_used": used,
            "pages_free": pool.pages - used,
            "allocations_returning": self._returning(placement),
        }

    def _returning(self, placement: Placement) -> int:
        return sum(list(self._coming[placement].values()))

    def allocate(
        self, placement: Placement, sizes: Sequence[int], runs: list[Run] | None = None
    ) -> list[int]:
        """Addresses of one allocation per size; waits a moment for pages that are coming back.

        ``runs`` as for :meth:`PagePool.allocate`.

        Raises LLM_OUT_OF_MEMORY, LLM_ENGINE_FINALIZED after :meth:`close`, and ``RuntimeError``
        inside of another call of the same thread.
        """
        pool = self._pools[placement][1]
        deadline = time.monotonic() + RETURN_SECONDS
        while True:
            self._check_open()
            bell, coming = Flag(), self._returning(placement)
            self._bells[bell] = None  # before the attempt: what comes back meanwhile counts
            try:
                return pool.allocate(sizes, runs)
            except PoolExhausted as error:
                left = deadline - time.monotonic()
                if not coming or left <= 0:
                    raise self._exhausted(placement, coming, error) from None
                bell.wait(left)
            finally:
                self._bells.pop(bell, None)

    @staticmethod
    def _exhausted(placement: Placement, coming: int, error: PoolExhausted) -> LLMException:
        held = f" ({coming} freed allocations wait for confirmations of peers)" if coming else ""
        return LLMException(
            f"{placement.name} memory: {error}{held}", status_code=LLMStatusCode.LLM_OUT_OF_MEMORY
        )

    def expect(self, placement: Placement, owner: Hashable, count: int) -> None:
        """Announce that ``count`` allocations will be freed by :meth:`give_back`."""
        self._coming[placement][owner] = count

    def give_back(self, placement: Placement, owner: Hashable, runs: Sequence[Run]) -> None:
        """Free allocations; harmless a second time."""
        self._pools[placement][1].free_runs(runs)
        self._coming[placement].pop(owner, None)
        for bell in list(self._bells):
            bell.set()

    # -- registered memory -------------------------------------------------------------------

    def register(
        self, addresses: Sequence[int], size: int, placement: Placement, user: Hashable
    ) -> list[int]:
        """Ids of the regions that hold ``size`` bytes at each address, in their order; all or none.

        They are kept for ``user`` until :meth:`unregister`; each registration has one of its own.

        Raises LLM_PARAM_INVALID for a range that overlaps in part what a link still exposes, for too
        many ranges, or above the transport's limit, LLM_FAILED where the transport refuses the
        memory, LLM_ENGINE_FINALIZED after :meth:`close`, ``RuntimeError`` inside of another call of
        the same thread.
        """
        return self._registering.run(lambda: self._register(addresses, size, placement, user))

    def _register(
        self, addresses: Sequence[int], size: int, placement: Placement, user: Hashable
    ) -> list[int]:
        self._release_all()
        self._check_open()
        try:
            shared, fresh = self._state.run(lambda: self._plan(addresses, size, placement, user))
            self._register_fresh(fresh, placement)
            taken = self._state.run(lambda: self._take(user))
            self._tell_links([*shared, *taken])
        except BaseException:
            self._let_go(self.regions_of(user), user)
            raise
        begins = [*shared.values(), *(address for address, _ in fresh)]
        return [i for _, i in sorted(zip(begins, [*shared, *taken], strict=True))]

    def pool_holds(self, addresses: Sequence[int], size: int) -> bool:
        """Whether pools, which every link exposes, hold ``size`` bytes at each address."""
        pools = [self.pool_region(placement)[1] for placement in list(self._pools)]
        return all(
            any(p.address <= a and a + size <= p.address + p.size for p in pools) for a in addresses
        )

    def begins(self, region_ids: Sequence[int]) -> list[int]:
        """Addresses of regions that a user keeps."""
        return [self._held[region_id].region.address for region_id in region_ids]

    def unregister(self, region_ids: Sequence[int], user: Hashable) -> None:
        """Undo :meth:`register`; inside of another call of the same thread after that.

        Raises LLM_FAILED where the transport does not let go.
        """
        failed: list[LLMException] = []
        self._registering.do(lambda: failed.extend(self._let_go(region_ids, user)))
        if failed:
            raise failed[0]

    def unregister_later(
        self, region_ids: Sequence[int], user: Hashable, then: Callable[[], object] = lambda: None
    ) -> None:
        """:meth:`unregister` with the next call that registers or lets go, and ``then``; never waits."""
        self._registering.leave(lambda: (self._let_go(region_ids, user), then()))

    def keep(self, ranges: BlockRanges, tensors: list[object]) -> None:
        """Keep tensors that lie in these ranges until :meth:`close`; the list is empty after that."""
        self._tensors.append((ranges, tensors))

    def settle(self) -> None:
        """Complete what was left for later."""
        self._registering.do(lambda: None)

    def regions_of(self, user: Hashable) -> list[int]:
        """What is kept for a user, by id."""
        return [i for i, held in list(self._held.items()) if user in held.users]

    def _plan(
        self, addresses: Sequence[int], size: int, placement: Placement, user: Hashable
    ) -> tuple[dict[int, int], list[Range]]:
        """Begins of the regions by id that hold a part, kept for the user, and what none holds."""
        self._mend()
        shared: dict[int, int] = {}
        fresh: list[Range] = []
        for address, nbytes in _unions(addresses, size):
            self._split(address, address + nbytes, shared, fresh)
        if len(self._held) + len(fresh) > Offer.MAX_REGIONS:
            raise param_invalid(
                f"{len(fresh)} ranges beside {len(self._held)} are more than the {Offer.MAX_REGIONS} "
                "that can be registered: register larger ranges that hold several tensors, first"
            )
        self._check_limit(placement, sum(map(itemgetter(1), fresh)))
        for region_id in shared:
            self._held[region_id].users.add(user)
            self._held[region_id].exposed = True
        return shared, fresh

    def _split(self, start: int, stop: int, shared: dict[int, int], fresh: list[Range]) -> None:
        """Add the regions that hold parts of a range, by id, and the parts between them."""
        free = start
        for place in range(max(0, bisect_right(self._begins, start) - 1), len(self._begins)):
            begin = self._begins[place]
            if begin >= stop:
                break
            region_id = self._by_begin[begin]
            held = self._held[region_id]
            end = begin + held.region.size
            if end <= start:
                continue
            if not held.users:
                self._check_again(start, stop, held.region)
            shared[region_id] = begin
            if free < begin:
                fresh.append((free, begin - free))
            free = end
        if free < stop:
            fresh.append((free, stop - free))

    def _check_again(self, start: int, stop: int, old: Region) -> None:
        """Raise where peers would not reach a range, parts of which links expose from before."""
        if not old.address <= start < stop <= old.address + old.size:
            raise _overlap(start, stop - start, old, "overlap in part")
        if not self._transport.capabilities.follows_addresses:
            raise _overlap(start, stop - start, old, "lie in")

    def _register_fresh(self, ranges: Sequence[Range], placement: Placement) -> None:
        if not ranges:
            return
        addresses, sizes = zip(*ranges, strict=True)
        try:
            with self._transport.registering():
                # noted in C: none is lost between its registration and that
                self._fresh += map(self._transport.register, addresses, sizes, repeat(placement))
        except Exception as error:
            why = text_of(error, self._transport)
            raise LLMException(
                f"cannot register {sizes[len(self._fresh)]} bytes at "
                f"{addresses[len(self._fresh)]:#x} as "
                f"{placement.name} memory: {why}",
                status_code=LLMStatusCode.LLM_FAILED,
            ) from error

    def _take(self, user: Hashable) -> list[int]:
        """Keep the fresh regions for a user; their ids."""
        self._mend()
        new = {next(self._ids): _RegisteredRegion(region, {user}) for region in self._fresh}
        self._whole = False
        self._held.update(new)
        self._fresh.clear()
        for region_id, held in new.items():
            region = held.region
            self._by_begin[region.address] = region_id
            self._bytes[region.placement] += region.size
            if len(new) <= MAX_SINGLE_INSERTS:
                insort(self._begins, region.address)
        if len(new) > MAX_SINGLE_INSERTS:
            self._begins = sorted(self._by_begin)
        self._whole = True
        return list(new)

    def _drop(self, region_ids: Sequence[int], undo: Callable[[_RegisteredRegion], None]) -> None:
        """Take regions out that nothing uses any more after ``undo``."""
        self._mend()
        self._whole = False
        for region_id in region_ids:
            held = self._held.get(region_id)
            if held is None:
                continue
            undo(held)
            if not held.users:
                held.exposed = False
            if held.users or held.links:
                continue
            region = self._dropped[region_id] = held.region
            del self._held[region_id]
            del self._by_begin[region.address]
            self._bytes[region.placement] -= region.size
            if len(region_ids) <= MAX_SINGLE_INSERTS:
                del self._begins[bisect_right(self._begins, region.address) - 1]
        if len(region_ids) > MAX_SINGLE_INSERTS:
            self._begins = sorted(self._by_begin)
        self._whole = True

    def _let_go(self, region_ids: Sequence[int], user: Hashable) -> list[LLMException]:
        self._state.do(lambda: self._drop(region_ids, lambda held: held.users.discard(user)))
        return self._release_all()

    def _release_all(self) -> list[LLMException]:
        """Release what is not used any more; what the transport does not let go, as LLM_FAILED.

        That includes what an interrupted call had registered, or was about to release.
        """
        failed = []
        for region_id, region in list(self._dropped.items()):
            if region_id not in self._held:
                for told in list(self._links.values()):
                    told.remove(region_id, region)
                failed += self._release(region)
                self._dropped.pop(region_id, None)
        held = {id(held.region) for held in self._held.values()} if self._fresh else set()
        while self._fresh:
            if id(self._fresh[-1]) not in held:
                failed += self._release(self._fresh[-1])
            self._fresh.pop()
        return failed

    def _release(self, region: Region) -> list[LLMException]:
        try:
            self._transport.release(region)
        except Exception as error:
            why = text_of(error, self._transport)
            text = f"cannot release the {region.size} bytes at {region.address:#x}: {why}"
            return [LLMException(text, status_code=LLMStatusCode.LLM_FAILED)]
        return []

    def _check_limit(self, placement: Placement, size: int) -> None:
        limit = self._transport.capabilities.max_registered.get(placement)
        if limit is None:
            return
        used = self._bytes[placement]
        if used + size > limit:
            raise param_invalid(
                f"at most {limit} bytes of {placement.name} memory can be registered with this "
                f"transport: {used} are, and {size} more were asked for; use a smaller pool or "
                "register less"
            )

    # -- links -------------------------------------------------------------------------------

    def empty(self) -> bool:
        """Whether there is neither a pool nor a registration that a link could expose."""
        held = list(self._held.values())
        return not any(each.exposed and not each.users & self.core for each in held)

    def expose(self, link: Hashable) -> dict[int, Region]:
        """The regions that a new link exposes, by id; they are kept until :meth:`conceal`."""
        return self._state.run(lambda: self._expose(link))

    def _expose(self, link: Hashable) -> dict[int, Region]:
        chosen = {i: held for i, held in self._held.items() if held.exposed}
        for held in chosen.values():
            held.links.add(link)
        self._links[link] = _ToldLink(frozenset(chosen))
        return {i: held.region for i, held in chosen.items()}

    def tell_link(self, key: Hashable, link: Link) -> None:
        """Tell a link of what was registered since :meth:`expose`, and later of what comes and goes.

        Raises what the link raises.
        """
        self._registering.run(lambda: self._tell_link(key, link))

    def _tell_link(self, key: Hashable, link: Link) -> None:
        told = self._links.get(key)
        if told is None:  # it is closed already
            return
        told.link = link
        for region_id, held in list(self._held.items()):
            if held.users:
                told.add(region_id, held.region)

    def tell_link_at_once(self, key: Hashable, link: Link) -> bool:
        """:meth:`tell_link`, unless memory is being registered or released, or the link raises."""
        try:
            return self._registering.run_at_once(lambda: self._tell_link(key, link))
        except Exception as error:
            log.debug("a link is told again of what was registered: %s", text_of(error, link))
            return False

    def forget_link(self, key: Hashable) -> None:
        """Tell a link nothing any more: it is about to be closed."""
        self._registering.do(lambda: self._links.pop(key, None))

    def _tell_links(self, region_ids: Sequence[int]) -> None:
        """Tell the links of regions that a user has got, unless they know them.

        Raises LLM_FAILED where one refuses.
        """
        for told in list(self._links.values()):
            for region_id in region_ids:
                region = self._held[region_id].region
                try:
                    told.add(region_id, region)
                except Exception as error:
                    raise LLMException(
                        f"cannot register the {region.size} bytes at {region.address:#x}: an open link "
                        f"refuses them: {text_of(error, told.link)}",
                        status_code=LLMStatusCode.LLM_FAILED,
                    ) from error

    def conceal(self, region_ids: Sequence[int], link: Hashable) -> None:
        """Undo :meth:`expose` after the link was closed; harmless a second time.

        Raises LLM_FAILED where the transport does not let go.
        """
        failed: list[LLMException] = []

        def released_by_peers() -> None:
            self._links.pop(link, None)
            self._state.do(lambda: self._drop(region_ids, lambda held: held.links.discard(link)))
            failed.extend(self._release_all())

        self._registering.do(released_by_peers)
        if failed:
            raise failed[0]

    def _check_open(self) -> None:
        if self._closed:
            raise _finalized()

    def close(self) -> None:
        """Release everything. What was in pools may still be freed.

        What a transfer may still touch, or a link that the transport has not closed, stays mapped and
        registered for the life of the process.
        """
        self._closed = True
        for region_id, held in list(self._held.items()):
            region = held.region
            touched = self.quarantine.touching(BlockRanges((region.address,), region.size))
            if held.links or touched is not None:
                _left.append(held.region)
                del self._held[region_id]
                continue
            held.users.clear()
            held.links.clear()
        self._whole = False
        self._state.run(lambda: self._drop(list(self._held), lambda held: None))
        for error in self._release_all():
            log.warning("%s", error)
        for ranges, tensors in self._tensors:
            if self.quarantine.touching(ranges) is not None:
                _left.append(tuple(tensors))
            tensors.clear()
        self._tensors.clear()


def _finalized() -> LLMException:
    return LLMException(
        "the engine was finalized meanwhile", status_code=LLMStatusCode.LLM_ENGINE_FINALIZED
    )


def _unions(addresses: Sequence[int], size: int) -> list[Range]:
    """Ranges of ``size`` bytes by address, as one where they overlap; not where they only meet."""
    unions: list[Range] = []
    for address in sorted(set(addresses)):
        if unions and address < sum(unions[-1]):
            unions[-1] = (unions[-1][0], address + size - unions[-1][0])
        else:
            unions.append((address, size))
    return unions


def _overlap(address: int, size: int, region: Region, how: str) -> LLMException:
    return param_invalid(
        f"the {size} bytes at {address:#x} {how} the {region.size} bytes at "
        f"{region.address:#x}, which are unregistered, but exposed by a live link: unlink first, since "
        "that memory may have been freed"
    )
