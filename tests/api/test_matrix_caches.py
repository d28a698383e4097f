"""Every check of the cache manager's methods for memory and local copies, in the documented order.

Source of the rows: LLM-DataDist API, CacheManager.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    LLMException,
    LLMStatusCode,
    MemInfo,
    Memtype,
    Placement,
)
from tests.matrix import (
    BOUND,
    DESC,
    INT32,
    OWN,
    SHAPE,
    Check,
    Of,
    Table,
    Worlds,
    cases,
    verify,
    worlds_in,
)

PI = LLMStatusCode.LLM_PARAM_INVALID
FAILED = LLMStatusCode.LLM_FAILED
FINALIZED = LLMStatusCode.LLM_ENGINE_FINALIZED
UNKNOWN = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
NO_MEMORY = LLMStatusCode.LLM_OUT_OF_MEMORY
NOT_ENABLED = LLMStatusCode.LLM_FEATURE_NOT_ENABLED

# Of the checks that one description breaks the first one counts: each breaks the later ones, too.
HUGE = 1 << 21
NO_TENSORS = CacheDesc(0, [HUGE, *[0] * 31], INT32)
TOO_MANY_DIMS = CacheDesc(2, [HUGE, *[1] * 31], INT32)
ZERO_DIM = CacheDesc(2, [HUGE, 0], INT32)
OVERFLOW = CacheDesc(2, [HUGE, 1 << 42], INT32)
TOO_LARGE = CacheDesc(2, [HUGE], INT32)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    """One engine at a time, in the state that a case needs."""
    with worlds_in(tmp_path_factory.mktemp("run")) as each:
        yield each


def _allocation(method: str, keys: tuple[Check, ...], bound: tuple[Check, ...]) -> Table:
    return Table(
        f"CacheManager.{method}",
        {"cache_desc": DESC},
        (
            Check(TypeError, "cache_desc is a int", {"cache_desc": 1}),
            keys[0],
            Check(AttributeError, "cache_desc is None", {"cache_desc": None}),
            Check(PI, "num_tensors", {"cache_desc": NO_TENSORS}),
            Check(FINALIZED, "finalized", world="finalized"),
            Check(PI, "no DEVICE pool", world="unpooled"),
            *keys[1:],
            Check(PI, "32 dimensions", {"cache_desc": TOO_MANY_DIMS}),
            Check(PI, "must be positive", {"cache_desc": ZERO_DIM}),
            Check(PI, "over int64", {"cache_desc": OVERFLOW}),
            Check(NO_MEMORY, "exhausted", {"cache_desc": TOO_LARGE}),
            *bound,
        ),
    )


def _registration(method: str, keys: tuple[Check, ...]) -> Table:
    return Table(
        f"CacheManager.{method}",
        {"cache_desc": DESC, "addrs": Of("addrs")},
        (
            Check(TypeError, "cache_desc is a int", {"cache_desc": 1}),
            Check(TypeError, "addrs is a tuple", {"addrs": (4096, 8192)}),
            Check(TypeError, r"addrs\[0\] is a str", {"addrs": ["4096", 1]}),
            keys[0],
            Check(TypeError, "remote_accessible is a int", {"remote_accessible": 1}),
            Check(PI, "after link", {"remote_accessible": True}, "linking"),
            Check(TypeError, "addrs is a NoneType", {"addrs": None}),
            Check(PI, "addrs is empty", {"addrs": []}),
            Check(AttributeError, "cache_desc is None", {"cache_desc": None}),
            Check(PI, "as many addrs", {"addrs": [0]}),
            Check(PI, "valid address", {"addrs": [0, 4096]}),
            Check(FINALIZED, "finalized", world="finalized"),
            *keys[1:],
            Check(PI, "32 dimensions", {"cache_desc": TOO_MANY_DIMS}),
            Check(PI, "must be positive", {"cache_desc": ZERO_DIM}),
            Check(PI, "over int64", {"cache_desc": OVERFLOW}),
            Check(FAILED, "not memory", {"addrs": [4096, 8192]}),
        ),
    )


def _deallocation(method: str, good: str, other: str) -> Table:
    return Table(
        f"CacheManager.{method}",
        {"cache": Of(good)},
        (
            Check(TypeError, "cache is a int", {"cache": 1}),
            Check(AttributeError, "cache is None", {"cache": None}),
            Check(PI, "use deallocate_", {"cache": Of(other)}),
            Check(NOT_ENABLED, "no memory pool", world="unpooled"),
            Check(FINALIZED, "finalized", world="finalized"),
        ),
    )


def _memory(kind: Memtype = Memtype.MEM_TYPE_DEVICE, addr: int = 4096, size: int = 64) -> MemInfo:
    return MemInfo(kind, addr, size)


COPY_GOOD = {"dst": Of("contiguous"), "src": Of("on_host")}

TABLES = [
    _allocation(
        "allocate_cache",
        (Check(TypeError, r"cache_keys\[0\] is a Bl", {"cache_keys": [BlocksCacheKey(1)]}),),
        (
            Check(PI, "3 cache keys", {"cache_keys": [CacheKey(OWN, 7)] * 3}),
            Check(PI, "identical keys", {"cache_keys": (CacheKey(OWN, 6), CacheKey(9, 6))}),
            Check(PI, "is bound to cache", {"cache_keys": [CacheKey(9, BOUND)]}),
        ),
    ),
    _allocation(
        "allocate_blocks_cache",
        (
            Check(TypeError, "only support BlocksCacheKey", {"blocks_cache_key": CacheKey(1, 1)}),
            Check(TypeError, "model_id is -1", {"blocks_cache_key": BlocksCacheKey(OWN, -1)}),
        ),
        (Check(PI, "is bound to cache", {"blocks_cache_key": BlocksCacheKey(9, BOUND)}),),
    ),
    _registration(
        "register_cache",
        (Check(TypeError, "cache_keys is a Cache", {"cache_keys": CacheKey(1, 1)}),),
    ),
    _registration(
        "register_blocks_cache",
        (
            Check(TypeError, "only support BlocksCacheKey", {"blocks_cache_key": CacheKey(1, 1)}),
            Check(
                TypeError,
                "model_id is 18446744073709551616",
                {"blocks_cache_key": BlocksCacheKey(OWN, 1 << 64)},
            ),
        ),
    ),
    _deallocation("deallocate_cache", "contiguous", "blocks"),
    _deallocation("deallocate_blocks_cache", "blocks", "contiguous"),
    Table(
        "CacheManager.remove_cache_key",
        {"cache_key": CacheKey(OWN, 77)},
        (
            Check(TypeError, "only support CacheKey", {"cache_key": BlocksCacheKey(1)}),
            Check(AttributeError, "cache_key is None", {"cache_key": None}),
            Check(NOT_ENABLED, "no memory pool", world="unpooled"),
            Check(FINALIZED, "finalized", world="finalized"),
        ),
    ),
    Table(
        "CacheManager.unregister_cache",
        {"cache_id": 1},
        (
            Check(TypeError, "cache_id is a NoneType", {"cache_id": None}),
            Check(TypeError, "cache_id is a str", {"cache_id": "1"}),
            Check(ValueError, "cache_id is 9", {"cache_id": 1 << 63}),
            Check(FINALIZED, "finalized", world="finalized"),
        ),
    ),
    Table(
        "CacheManager.check_cache_key",
        {},
        (
            Check(TypeError, "only support CacheKey or", {"cache_key": 1}),
            Check(AttributeError, "cache_key is None", {"cache_key": None}),
            Check(PI, "exactly one of req_id", {"cache_key": CacheKey(1, 2, prefix_id=3)}),
            Check(PI, "exactly one of req_id", {"cache_key": CacheKey(1, 2**64 - 1)}),
        ),
    ),
    Table(
        "CacheManager.copy_cache",
        COPY_GOOD,
        (
            Check(TypeError, "dst is a int", {"dst": 1}),
            Check(TypeError, "src is a int", {"src": 1}),
            Check(TypeError, "dst_batch_index is a str", {"dst_batch_index": "0"}),
            Check(ValueError, "dst_batch_index", {"dst_batch_index": -1}),
            Check(ValueError, "src_batch_index", {"src_batch_index": 1 << 32}),
            Check(ValueError, "offset", {"offset": -1}),
            Check(TypeError, "size is a NoneType", {"size": None}),
            Check(ValueError, "size", {"size": 1 << 63}),
            Check(AttributeError, "src is None", {"src": None}),
            Check(PI, "src is a blocks cache", {"src": Of("host_blocks")}),
            Check(AttributeError, "dst is None", {"dst": None}),
            Check(PI, "dst is a blocks cache", {"dst": Of("blocks")}),
            Check(PI, "size is 0", {"size": 0}),
            Check(PI, "size is -2", {"size": -2}),
            Check(ValueError, "req_id", {"req_id": -1}),
            Check(FINALIZED, "finalized", world="finalized"),
            Check(UNKNOWN, "does not exist", {"src": Of("freed")}),
            Check(UNKNOWN, "does not exist", {"dst": Of("freed")}),
            Check(PI, "they must be equal", {"dst": Of("odd")}),
            Check(PI, "src_batch_index is 2", {"src_batch_index": 2}),
            Check(PI, "dst_batch_index is 2", {"dst_batch_index": 2}),
            Check(PI, "offset is 1024", {"offset": 1024}),
            Check(PI, "do not fit", {"size": 1025}),
        ),
    ),
    Table(
        "CacheManager.copy_blocks",
        {"cache": Of("blocks"), "copy_block_info": {0: [1]}},
        (
            Check(TypeError, "cache is a int", {"cache": 1}),
            Check(TypeError, "only support dict", {"copy_block_info": [0, 1]}),
            Check(TypeError, "a key of copy_block_info", {"copy_block_info": {"0": (1,)}}),
            Check(TypeError, "only support list", {"copy_block_info": {0: (1,)}}),
            Check(TypeError, r"copy_block_info\[0\]\[0\]", {"copy_block_info": {0: ["1"]}}),
            Check(AttributeError, "cache is None", {"cache": None}),
            Check(PI, "cache is not a blocks cache", {"cache": Of("contiguous")}),
            Check(
                PI,
                r"copy_block_info\[1\]\[0\] is 1, and so is copy_block_info\[0\]\[0\]",
                {"copy_block_info": {0: [1], 1: [1]}},
            ),
            Check(FINALIZED, "finalized", world="finalized"),
            Check(UNKNOWN, "does not exist", {"cache": Of("freed_blocks")}),
            Check(PI, "names block 2", {"copy_block_info": {2: [0]}}),
            Check(PI, "names block 3", {"copy_block_info": {0: [1, 3]}}),
        ),
    ),
    Table(
        "CacheManager.swap_blocks",
        {"src_cache": Of("blocks"), "dst_cache": Of("host_blocks"), "src_to_dst": {0: 1}},
        (
            Check(TypeError, "src_cache is a int", {"src_cache": 1}),
            Check(TypeError, "dst_cache is a int", {"dst_cache": 1}),
            Check(AttributeError, "src_cache is None", {"src_cache": None}),
            Check(PI, "src_cache is not a blocks cache", {"src_cache": Of("contiguous")}),
            Check(AttributeError, "dst_cache is None", {"dst_cache": None}),
            Check(PI, "dst_cache is not a blocks cache", {"dst_cache": Of("on_host")}),
            Check(TypeError, "only support dict", {"src_to_dst": [(0, 1)]}),
            Check(TypeError, "a key of src_to_dst", {"src_to_dst": {"0": 9}}),
            Check(PI, "must be equal", {"src_cache": Of("other_blocks")}),
            Check(PI, "number of tensors", {"src_cache": Of("fewer_blocks")}),
            Check(PI, "names block 2", {"src_to_dst": {2: 0}}),
            Check(PI, "names block -1", {"src_to_dst": {0: -1}}),
            Check(
                PI,
                r"src_to_dst\[1\] is 0, and so is src_to_dst\[0\]",
                {"src_to_dst": {0: 0, 1: 0}},
            ),
            Check(
                PI,
                "between HOST and DEVICE",
                {"src_cache": Of("blocks"), "dst_cache": Of("freed_blocks")},
            ),
            Check(PI, "between HOST and DEVICE", {"src_cache": Of("host_blocks")}),
            Check(FINALIZED, "finalized", world="finalized"),
            Check(PI, "no tensors any more", {"src_cache": Of("freed_blocks")}),
        ),
    ),
    Table(
        "CacheManager.remap_registered_memory",
        {"mem_infos": _memory()},
        (
            Check(PI, "only support MemInfo", {"mem_infos": (_memory(addr=0),)}),
            Check(PI, "only support MemInfo", {"mem_infos": None}),
            Check(PI, "only support MemInfo", {"mem_infos": [_memory(addr=0), 1]}),
            Check(
                PI, "only support MEM_TYPE_DEVICE", {"mem_infos": _memory(Memtype.MEM_TYPE_HOST, 0)}
            ),
            Check(PI, "addr must not be 0", {"mem_infos": [_memory(addr=0)]}),
            Check(PI, "size must be positive", {"mem_infos": _memory(size=0)}),
            Check(PI, "mem_infos is empty", {"mem_infos": []}),
            Check(FINALIZED, "finalized", world="finalized"),
            Check(LLMStatusCode.LLM_NOT_YET_LINK, "nothing is linked"),
        ),
    ),
]


@pytest.mark.parametrize(("table", "world"), cases(TABLES))
def test_checks(worlds: Worlds, table: Table, world: str) -> None:
    verify(table, world, worlds)


def test_lists_of_keys_are_no_none(worlds: Worlds) -> None:
    world = worlds.get("two-sided")
    with pytest.raises(TypeError, match="cache_keys is a NoneType"):
        world.manager.allocate_cache(DESC, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cache_keys is a NoneType"):
        world.manager.register_cache(DESC, world.addrs, None)  # type: ignore[arg-type]


# -- what is no failure --------------------------------------------------------------------------


def test_freeing_what_is_gone_or_not_of_the_pool_is_a_success(worlds: Worlds) -> None:
    world = worlds.get("two-sided")
    manager = world.manager
    manager.deallocate_cache(world.freed)
    manager.deallocate_blocks_cache(world.freed_blocks)
    manager.remove_cache_key(CacheKey(OWN, 4242))
    manager.unregister_cache(4242)
    registered = manager.register_cache(DESC, world.addresses(), [CacheKey(OWN, 900)])
    manager.remove_cache_key(CacheKey(OWN, 900))
    with pytest.raises(LLMException, match="is bound to cache") as caught:
        manager.allocate_cache(DESC, [CacheKey(OWN, 900)])
    assert caught.value.status_code is PI
    manager.deallocate_cache(registered)
    assert registered.tensor_addrs == []
    manager.unregister_cache(registered.cache_id)
    allocated = manager.allocate_cache(DESC, [CacheKey(OWN, 900)])
    manager.unregister_cache(allocated.cache_id)
    manager.deallocate_cache(manager.allocate_cache(DESC, [CacheKey(OWN, 900)]))
    manager.remove_cache_key(CacheKey(OWN, 900))


def test_a_failed_allocation_keeps_nothing_but_its_number(worlds: Worlds) -> None:
    manager = worlds.get("two-sided").manager
    before = manager.allocate_cache(DESC)
    for keys in ([CacheKey(OWN, BOUND)], [CacheKey(OWN, 6)] * 2):
        with pytest.raises(LLMException):
            manager.allocate_cache(CacheDesc(1, [2, 1 << 14], INT32), keys)
    for _ in range(2):  # more would not fit if those had kept their memory
        large = manager.allocate_cache(CacheDesc(1, [2, 1 << 14], INT32))
        manager.deallocate_cache(large)
    assert large.cache_id == before.cache_id + 4
    manager.deallocate_cache(before)


def test_the_default_of_remote_accessible_follows_placement_and_link(worlds: Worlds) -> None:
    host = CacheDesc(2, SHAPE, INT32, Placement.HOST)
    for name, accessible in (("two-sided", True), ("linking", False)):
        world = worlds.get(name)
        owned = world.engine._live(FAILED).owned
        for desc, expected in ((DESC, accessible), (host, False)):
            cache = world.manager.register_cache(desc, world.addresses())
            own = owned.get(cache.cache_id)
            assert own is not None
            assert own.accessible is expected, (name, desc)
            world.manager.unregister_cache(cache.cache_id)


def test_shared_memory_cannot_remap(worlds: Worlds) -> None:
    with pytest.raises(LLMException, match="backend shm") as caught:
        worlds.get("linking").manager.remap_registered_memory([_memory()])
    assert caught.value.status_code is NOT_ENABLED
