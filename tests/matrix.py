"""Tables of checks: each by itself, and ahead of every later one that the same call can break."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray

from datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    DataType,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
)
from datadist.api.cache_manager import CacheManager
from tests.nodes import table_for

INT32 = DataType.DT_INT32
OWN, PEER = 1, 2
POOL = 1 << 18
PAGE_SHIFT = 12
SHAPE = (2, 256)
BOUND = 5
"""A request id and a model id that are bound in every world with a pool."""

Error: TypeAlias = "type[Exception] | LLMStatusCode"


@dataclass(frozen=True)
class Of:
    """An argument that is an attribute of the world."""

    name: str


@dataclass(frozen=True)
class Check:
    """One documented check: the arguments, or the world, that break it, and what is raised."""

    raises: Error
    text: str
    """What the message matches."""
    broken: Mapping[str, Any] = field(default_factory=dict)
    world: str | None = None


@dataclass(frozen=True)
class Table:
    """The checks of a method in the documented order; ``good`` breaks none but those of the world."""

    method: str
    good: Mapping[str, Any]
    checks: tuple[Check, ...]
    world: str = "two-sided"
    target: Callable[..., Any] | None = None
    """What to call where no world is needed."""


class World:
    """An engine, cluster 1, in a state; what is asked of it is made when it is asked for.

    States: "two-sided", "one-sided", "unpooled" (nothing configured, nothing registered), "fresh" (not
    initialised), "linking" (`link` was called), "hixl" (that is its backend), "finalized" and
    "finalized one-sided" (its manager is still at hand).
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.arrays: list[NDArray[np.int32]] = []
        self.engine = LLMDataDist(LLMRole.MIX, OWN)
        if name == "fresh":
            return
        self.engine.init(_options(name))
        self.manager: CacheManager = self.engine.cache_manager
        if name == "unpooled":
            return
        desc = CacheDesc(1, [2, 16], INT32)
        self.manager.allocate_cache(desc, [CacheKey(OWN, BOUND)])
        self.manager.allocate_blocks_cache(desc, BlocksCacheKey(OWN, BOUND))
        if name.startswith("finalized"):
            _ = self.contiguous, self.odd, self.blocks, self.other_blocks, self.fewer_blocks
            _ = self.on_host, self.host_blocks, self.freed, self.freed_blocks
        if name == "linking":
            self.engine.link("linking", {OWN: 0, PEER: 1}, table_for({OWN: 0, PEER: 1}))
        if name.startswith("finalized"):
            self.engine.finalize()

    def addresses(self, shape: tuple[int, ...] = SHAPE, count: int = 2) -> list[int]:
        """Memory for tensors of int32, one address each."""
        made = [np.zeros(shape, np.int32) for _ in range(count)]
        self.arrays += made
        return [int(array.ctypes.data) for array in made]

    @cached_property
    def addrs(self) -> list[int]:
        """Memory for the tensors of :data:`DESC`."""
        return self.addresses()

    def _make(self, desc: CacheDesc, blocks: bool = False) -> Cache:
        manager = self.manager
        if self.name == "unpooled" or desc.placement is Placement.HOST:
            register = manager.register_blocks_cache if blocks else manager.register_cache
            return register(desc, self.addresses(tuple(desc.shape), desc.num_tensors))
        return (manager.allocate_blocks_cache if blocks else manager.allocate_cache)(desc)

    @cached_property
    def contiguous(self) -> Cache:
        """Two tensors, two slots, from the pool where there is one."""
        return self._make(CacheDesc(2, SHAPE, INT32))

    @cached_property
    def odd(self) -> Cache:
        """Three tensors."""
        return self._make(CacheDesc(3, SHAPE, INT32))

    @cached_property
    def blocks(self) -> Cache:
        """Two tensors of two blocks."""
        return self._make(CacheDesc(2, SHAPE, INT32), blocks=True)

    @cached_property
    def other_blocks(self) -> Cache:
        """A blocks cache with blocks of another size, and another number of tensors."""
        return self._make(CacheDesc(1, (2, 16), INT32), blocks=True)

    @cached_property
    def fewer_blocks(self) -> Cache:
        """A blocks cache with one tensor."""
        return self._make(CacheDesc(1, SHAPE, INT32), blocks=True)

    @cached_property
    def on_host(self) -> Cache:
        """Registered, contiguous, placement HOST."""
        return self._make(CacheDesc(2, SHAPE, INT32, Placement.HOST))

    @cached_property
    def host_blocks(self) -> Cache:
        """Registered blocks, placement HOST."""
        return self._make(CacheDesc(2, SHAPE, INT32, Placement.HOST), blocks=True)

    @cached_property
    def freed(self) -> Cache:
        """A contiguous cache that was deallocated."""
        cache = self._make(CacheDesc(2, SHAPE, INT32))
        self.manager.deallocate_cache(cache)
        return cache

    @cached_property
    def freed_blocks(self) -> Cache:
        """A blocks cache that was deallocated."""
        cache = self._make(CacheDesc(2, SHAPE, INT32), blocks=True)
        self.manager.deallocate_blocks_cache(cache)
        return cache

    @property
    def other_engine(self) -> LLMDataDist:
        """A second object, not initialised."""
        return LLMDataDist(LLMRole.MIX, PEER)


DESC = CacheDesc(2, SHAPE, INT32)


def _options(name: str) -> dict[str, str]:
    config = LLMConfig()
    config.enable_cache_manager = True
    config.transfer_backend = "shm"
    config.enable_remote_cache_accessible = name in ("one-sided", "hixl", "finalized one-sided")
    if name == "hixl":
        config.transfer_backend, config.listen_ip_info = "hixl", "127.0.0.1:0"
    if name != "unpooled":
        config.mem_pool_cfg = json.dumps({"memory_size": POOL, "page_shift": PAGE_SHIFT})
    return config.generate_options()


class Worlds:
    """The present world; another one replaces it, because a process has one engine at a time."""

    def __init__(self) -> None:
        self._present: World | None = None

    def get(self, name: str) -> World:
        """The world of a name."""
        if self._present is None or self._present.name != name:
            self.close()
            self._present = World(name)
        return self._present

    def close(self) -> None:
        """Finalize what there is."""
        if self._present is not None:
            self._present.engine.finalize()
            self._present = None


@contextmanager
def worlds_in(runtime_dir: Path) -> Iterator[Worlds]:
    """Worlds whose engines meet in a directory of their own."""
    runtime_dir.chmod(0o700)
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("DATADIST_RUNTIME_DIR", str(runtime_dir))
        worlds = Worlds()
        stack.callback(worlds.close)
        yield worlds


def cases(tables: list[Table]) -> list[Any]:
    """A parameter for each table and each world that its checks need."""
    return [
        pytest.param(table, world, id=f"{table.method}-{world}")
        for table in tables
        for world in sorted({world for world, *_ in calls(table)})
    ]


def verify(table: Table, name: str = "two-sided", worlds: Worlds | None = None) -> None:
    """Make every call of the table that belongs to a world."""
    world = None if worlds is None else worlds.get(name)
    for needed, broken, number, later in calls(table):
        if needed != name:
            continue
        given = {**table.good, **broken}
        made = {n: getattr(world, v.name) if isinstance(v, Of) else v for n, v in given.items()}
        method = table.target or _method(world, table.method)
        try:
            refuse(method, made, table.checks[number])
        except BaseException as error:
            beside = "alone" if later is None else f"with {table.checks[later]}"
            raise AssertionError(f"{table.checks[number]} {beside}: {error}") from error


def calls(table: Table) -> Iterator[tuple[str, dict[str, Any], int, int | None]]:
    """The world, the arguments, the check that counts, and the later one that is broken, too."""
    for number, check in enumerate(table.checks):
        yield check.world or table.world, dict(check.broken), number, None
        for later, other in enumerate(table.checks[number + 1 :], number + 1):
            two_worlds = check.world and other.world
            if not (two_worlds or set(check.broken) & set(other.broken)):
                world = check.world or other.world or table.world
                yield world, {**other.broken, **check.broken}, number, later


def refuse(method: Callable[..., Any], arguments: Mapping[str, Any], check: Check) -> None:
    """Call a method; it raises what ``check`` says, and nothing derived from it."""
    kind = LLMException if isinstance(check.raises, LLMStatusCode) else check.raises
    with pytest.raises(kind, match=check.text) as caught:
        method(**arguments)
    if isinstance(check.raises, LLMStatusCode):
        assert isinstance(caught.value, LLMException)
        assert caught.value.status_code is check.raises, (arguments, caught.value)
    else:
        assert type(caught.value) is kind, (arguments, caught.value)


def _method(world: World | None, name: str) -> Any:
    assert world is not None
    owner, method = name.split(".")
    owners = {"LLMDataDist": "engine", "CacheManager": "manager", "Other": "other_engine"}
    return getattr(getattr(world, owners[owner]), method)
