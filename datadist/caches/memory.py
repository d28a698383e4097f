"""The memory of one engine: pools per placement, and regions that the user registered.

Registration (transport interface): equal or contained ranges share one region, so a transport
never sees overlapping ones. A region that was given up stays known to the transport until the last
link that exposes it is closed.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from bisect import bisect_right, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from datadist.caches.pool import PagePool, PoolExhausted
from datadist.caches.pool_config import PoolConfig
from datadist.caches.quarantine import Quarantine
from datadist.status import LLMException, LLMStatusCode, param_invalid
from datadist.transport import Offer, Placement, Region, Transport
from datadist.transports.defects import text_of

log = logging.getLogger("datadist.memory")

RETURN_SECONDS = 1.0
"""How long an allocation that does not fit waits for pages on their way back."""


FEW = 64
"""Up to so many regions it is cheaper to insert each in order than to sort all."""


@dataclass(eq=False)
class _Held:
    region: Region
    users: int
    """Registrations that lie in it; a pool has one for good."""
    exposed: bool
    links: int = 0


class Memory:
    """Pools and registered regions; every method works from any thread."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.quarantine = Quarantine()
        self._lock = threading.Lock()
        self._returned = threading.Condition(self._lock)
        self._ids = itertools.count(1)
        self._registering = threading.RLock()
        """Held while the transport registers or releases, which takes long; ``_lock`` is not."""
        self._held: dict[int, _Held] = {}
        self._by_begin: dict[int, int] = {}
        """Ids by address."""
        self._begins: list[int] = []
        """The addresses in order."""
        self._bytes = dict.fromkeys(Placement, 0)
        """What is registered, pools included."""
        self._pools: dict[Placement, tuple[int, PagePool]] = {}
        self._coming = dict.fromkeys(Placement, 0)
        """Allocations per placement that peers have yet to let go."""

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
        try:
            region = self._transport.allocate(config.memory_size, placement)
        except MemoryError as error:
            raise LLMException(
                f"cannot allocate the {placement.name} pool of {config.memory_size} bytes: {error}",
                status_code=LLMStatusCode.LLM_OUT_OF_MEMORY,
            ) from error
        except Exception as error:
            why = text_of(error, self._transport)
            raise LLMException(
                f"cannot allocate the {placement.name} pool of {config.memory_size} bytes: {why}",
                status_code=LLMStatusCode.LLM_FAILED,
            ) from error
        (region_id,) = self._take([region])
        self._held[region_id].users = 1
        pool = PagePool(region.address, region.size, config.page_shift)
        self._pools[placement] = (region_id, pool)

    def has_pool(self, placement: Placement | None = None) -> bool:
        """Whether a pool of that placement, or any, is configured."""
        return bool(self._pools) if placement is None else placement in self._pools

    def pool_region(self, placement: Placement) -> tuple[int, Region]:
        """Id and region of the pool of that placement."""
        region_id = self._pools[placement][0]
        return region_id, self._held[region_id].region

    def pool_usage(self, placement: Placement) -> dict[str, int]:
        """Pages of a pool in use, free, and freed but waiting for peers; bytes of a page."""
        pool = self._pools[placement][1]
        with self._lock:
            return {
                "page_bytes": pool.page_size,
                "pages_used": pool.pages_used,
                "pages_free": pool.pages_free,
                "allocations_returning": self._coming[placement],
            }

    def allocate(self, placement: Placement, sizes: Sequence[int]) -> list[int]:
        """Addresses of one allocation per size; waits a moment for pages that are coming back.

        Raises LLM_OUT_OF_MEMORY.
        """
        pool = self._pools[placement][1]
        deadline = time.monotonic() + RETURN_SECONDS
        with self._lock:
            while True:
                try:
                    return pool.allocate(sizes)
                except PoolExhausted as error:
                    left = deadline - time.monotonic()
                    if not self._coming[placement] or left <= 0:
                        raise self._exhausted(placement, error) from None
                self._returned.wait(left)

    def _exhausted(self, placement: Placement, error: PoolExhausted) -> LLMException:
        coming = self._coming[placement]
        held = f" ({coming} freed allocations wait for peers to let go)" if coming else ""
        return LLMException(
            f"{placement.name} memory: {error}{held}", status_code=LLMStatusCode.LLM_OUT_OF_MEMORY
        )

    def expect(self, placement: Placement, count: int) -> None:
        """Note that ``count`` allocations will come back by :meth:`give_back`."""
        with self._lock:
            self._coming[placement] += count

    def give_back(self, placement: Placement, addresses: Sequence[int]) -> None:
        """Free allocations that were announced by :meth:`expect`."""
        with self._lock:
            self._coming[placement] -= len(addresses)
            for address in addresses:
                self._pools[placement][1].free(address)
            self._returned.notify_all()

    def free(self, placement: Placement, addresses: Sequence[int]) -> None:
        """Free allocations that no peer has heard of."""
        with self._lock:
            for address in addresses:
                self._pools[placement][1].free(address)
            self._returned.notify_all()

    # -- registered memory -------------------------------------------------------------------

    def register(self, addresses: Sequence[int], size: int, placement: Placement) -> list[int]:
        """Ids of the regions, one per address, that hold ``size`` bytes each; all or none.

        Raises LLM_PARAM_INVALID for a range that partly overlaps another, for too many ranges, or
        above the transport's limit, LLM_FAILED where the transport refuses the memory.
        """
        with self._registering:
            with self._lock:
                shared, fresh = self._plan(addresses, size, placement)
            try:
                regions = self._register_fresh(fresh, size, placement)
            except BaseException:
                self._let_go([region_id for _, region_id in shared])
                raise
            with self._lock:
                ids = dict(shared) | dict(zip(fresh, self._take(regions), strict=True))
                for address in addresses:
                    self._held[ids[address]].users += 1
                for _, region_id in shared:  # what kept them for this call
                    self._held[region_id].users -= 1
                return [ids[address] for address in addresses]

    def unregister(self, region_ids: Sequence[int]) -> None:
        """Undo :meth:`register`. Raises LLM_FAILED where the transport does not let go."""
        with self._registering:
            self._let_go(region_ids)

    def _plan(
        self, addresses: Sequence[int], size: int, placement: Placement
    ) -> tuple[list[tuple[int, int]], list[int]]:
        """Addresses with the regions that hold them, kept for the call, and the other addresses."""
        shared, fresh = [], []
        for address in dict.fromkeys(addresses):
            region_id = self._region_at(address, size)
            if region_id is None:
                fresh.append(address)
            else:
                shared.append((address, region_id))
        for first, second in pairwise(sorted(fresh)):
            if second < first + size:
                raise _overlap(second, size, first, size, "given as well")
        if len(self._held) + len(fresh) > Offer.MAX_REGIONS:
            raise param_invalid(
                f"{len(fresh)} ranges beside {len(self._held)} are more than the {Offer.MAX_REGIONS} "
                "that can be registered: register larger ranges that hold several tensors, first"
            )
        self._check_limit(placement, size * len(fresh))
        for _, region_id in shared:
            self._held[region_id].users += 1
            self._held[region_id].exposed = True
        return shared, fresh

    def _region_at(self, address: int, size: int) -> int | None:
        """The region that holds a range; None where none has a part of it. Regions are disjoint."""
        place = bisect_right(self._begins, address)
        for begin in self._begins[max(0, place - 1) : place + 1]:
            held = self._held[self._by_begin[begin]]
            end = begin + held.region.size
            if begin <= address and address + size <= end:
                return self._by_begin[begin]
            if address < end and begin < address + size:
                live = "unregistered, but exposed by a live link (unlink)"
                known = "registered" if held.users else live
                raise _overlap(address, size, begin, held.region.size, known)
        return None

    def _register_fresh(
        self, addresses: Sequence[int], size: int, placement: Placement
    ) -> list[Region]:
        regions: list[Region] = []
        if not addresses:
            return regions
        try:
            with self._transport.registering():
                for address in addresses:
                    regions.append(self._transport.register(address, size, placement))
        except BaseException as error:
            self._release(regions)
            if not isinstance(error, Exception):
                raise
            why = text_of(error, self._transport)
            raise LLMException(
                f"cannot register {size} bytes at {addresses[len(regions)]:#x} as {placement.name} "
                f"memory: {why}",
                status_code=LLMStatusCode.LLM_FAILED,
            ) from error
        return regions

    def _take(self, regions: Sequence[Region]) -> list[int]:
        """Keep new regions; their ids."""
        ids = []
        for region in regions:
            region_id = next(self._ids)
            ids.append(region_id)
            self._held[region_id] = _Held(region, users=0, exposed=True)
            self._by_begin[region.address] = region_id
            self._bytes[region.placement] += region.size
            if len(regions) <= FEW:
                insort(self._begins, region.address)
        if len(regions) > FEW:
            self._begins = sorted(self._by_begin)
        return ids

    def _drop(self, region_ids: Sequence[int]) -> list[Region]:
        """Take regions out that nothing uses any more; the caller releases them."""
        regions = []
        for region_id in region_ids:
            held = self._held[region_id]
            if not held.users:
                held.exposed = False
            if held.users or held.links:
                continue
            del self._held[region_id]
            region = held.region
            del self._by_begin[region.address]
            self._bytes[region.placement] -= region.size
            regions.append(region)
            if len(region_ids) <= FEW:
                del self._begins[bisect_right(self._begins, region.address) - 1]
        if len(region_ids) > FEW:
            self._begins = sorted(self._by_begin)
        return regions

    def _let_go(self, region_ids: Sequence[int]) -> None:
        with self._lock:
            for region_id in region_ids:
                self._held[region_id].users -= 1
            regions = self._drop(list(dict.fromkeys(region_ids)))
        self._release(regions)

    def _release(self, regions: Iterable[Region]) -> None:
        """All of them. Raises LLM_FAILED for the first one that the transport does not let go."""
        failed = None
        for region in regions:
            try:
                self._transport.release(region)
            except Exception as error:
                why = text_of(error, self._transport)
                failed = failed or LLMException(
                    f"cannot release the {region.size} bytes at {region.address:#x}: {why}",
                    status_code=LLMStatusCode.LLM_FAILED,
                )
        if failed is not None:
            raise failed

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
        return not any(held.exposed for held in self._held.values())

    def expose(self) -> dict[int, Region]:
        """The regions that a new link exposes, by id; each counts until :meth:`conceal`."""
        with self._lock:
            chosen = {i: held for i, held in self._held.items() if held.exposed}
            for held in chosen.values():
                held.links += 1
            return {i: held.region for i, held in chosen.items()}

    def conceal(self, region_ids: Sequence[int]) -> None:
        """Undo :meth:`expose` after the link was closed."""
        with self._registering:
            with self._lock:
                for region_id in region_ids:
                    self._held[region_id].links -= 1
                regions = self._drop(region_ids)
            self._release(regions)

    def close(self) -> None:
        """Release everything; no link is open any more."""
        with self._lock:
            for held in self._held.values():
                try:
                    self._transport.release(held.region)
                except Exception as error:
                    why = text_of(error, self._transport)
                    log.warning("cannot release %r: %s", held.region, why)
            self._held.clear()
            self._by_begin.clear()
            self._begins.clear()
            self._pools.clear()


def _overlap(address: int, size: int, other: int, other_size: int, known: str) -> LLMException:
    return param_invalid(
        f"the {size} bytes at {address:#x} overlap in part the {other_size} bytes at {other:#x}, "
        f"which are {known}: register equal or contained ranges, or the larger range first"
    )
