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
from collections.abc import Sequence
from dataclasses import dataclass

from datadist.caches.pool import PagePool, PoolExhausted
from datadist.caches.pool_config import PoolConfig
from datadist.status import LLMException, LLMStatusCode, param_invalid
from datadist.transport import Placement, Region, Transport
from datadist.transports.defects import text_of

log = logging.getLogger("datadist.memory")

RETURN_SECONDS = 1.0
"""How long an allocation that does not fit waits for pages on their way back."""


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
        self._lock = threading.Lock()
        self._returned = threading.Condition(self._lock)
        self._ids = itertools.count(1)
        self._held: dict[int, _Held] = {}
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
        region_id = next(self._ids)
        self._held[region_id] = _Held(region, users=1, exposed=True)
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

        Raises LLM_PARAM_INVALID for a range that partly overlaps another, or above the transport's
        limit, LLM_FAILED where the transport refuses the memory.
        """
        taken: list[int] = []
        with self._lock:
            try:
                for address in addresses:
                    taken.append(self._register_one(address, size, placement))
            except BaseException:
                for region_id in taken:
                    self._drop_user(region_id)
                raise
        return taken

    def unregister(self, region_ids: Sequence[int]) -> None:
        """Undo :meth:`register`."""
        with self._lock:
            for region_id in region_ids:
                self._drop_user(region_id)

    def _register_one(self, address: int, size: int, placement: Placement) -> int:
        for region_id, held in self._held.items():
            region = held.region
            end = region.address + region.size
            if region.address <= address and address + size <= end:
                held.users += 1
                held.exposed = True
                return region_id
            if address < end and region.address < address + size:
                raise self._overlap(address, size, held)
        self._check_limit(placement, size)
        try:
            region = self._transport.register(address, size, placement)
        except Exception as error:
            why = text_of(error, self._transport)
            raise LLMException(
                f"cannot register {size} bytes at {address:#x} as {placement.name} memory: {why}",
                status_code=LLMStatusCode.LLM_FAILED,
            ) from error
        region_id = next(self._ids)
        self._held[region_id] = _Held(region, users=1, exposed=True)
        return region_id

    def _overlap(self, address: int, size: int, held: _Held) -> LLMException:
        region = held.region
        known = "registered" if held.users else "unregistered, but exposed by a live link (unlink)"
        return param_invalid(
            f"the {size} bytes at {address:#x} overlap in part the {region.size} bytes at "
            f"{region.address:#x}, which are {known}: register equal or contained ranges, or the "
            "larger range first"
        )

    def _check_limit(self, placement: Placement, size: int) -> None:
        limit = self._transport.capabilities.max_registered.get(placement)
        if limit is None:
            return
        used = sum(h.region.size for h in self._held.values() if h.region.placement is placement)
        if used + size > limit:
            raise param_invalid(
                f"at most {limit} bytes of {placement.name} memory can be registered with this "
                f"transport: {used} are, and {size} more were asked for; use a smaller pool or "
                "register less"
            )

    def _drop_user(self, region_id: int) -> None:
        self._held[region_id].users -= 1
        self._release_unused(region_id)

    def _release_unused(self, region_id: int) -> None:
        held = self._held[region_id]
        if not held.users:
            held.exposed = False
        if held.users or held.links:
            return
        del self._held[region_id]
        try:
            self._transport.release(held.region)
        except Exception as error:
            why = text_of(error, self._transport)
            raise LLMException(
                f"cannot release the {held.region.size} bytes at {held.region.address:#x}: {why}",
                status_code=LLMStatusCode.LLM_FAILED,
            ) from error

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
        with self._lock:
            for region_id in region_ids:
                self._held[region_id].links -= 1
                self._release_unused(region_id)

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
            self._pools.clear()
