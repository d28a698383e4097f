"""Operations on `LLMDataDist` that the kit's processes run; each function runs in such a process."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKeyByIdAndIndex,
    DataType,
    LLMConfig,
    LLMDataDist,
    LLMRole,
)
from datadist.status import LLMException, text_without_code
from datadist.testing import operations
from datadist.testing.child import State
from datadist.testing.far_hosts import LISTEN_PORT
from datadist.testing.pattern import difference, pattern
from datadist.transport import Placement, TransportOptions

if TYPE_CHECKING:
    from datadist import Cache

POOL = 8 << 20
TENSORS, SLOTS, WIDTH = 3, 4, 1000


@dataclass(frozen=True)
class EngineSettings:
    """How an engine is initialised."""

    backend: str
    options: TransportOptions
    placement: Placement
    one_sided: bool
    seconds: float


def option_key(backend: str, name: str) -> str:
    """The option of `init`: of a combination such as ``shm+ucx`` the name says whose, ``ucx.device``."""
    return f"datadist.{name}" if "+" in backend else f"datadist.{backend}.{name}"


def start_engine(state: State, cluster: int, settings: EngineSettings) -> None:
    """An engine in the place of the kit's own transport."""
    operations.close_transport(state)
    config = LLMConfig()
    config.enable_cache_manager = True
    config.enable_remote_cache_accessible = settings.one_sided
    config.transfer_backend = settings.backend
    config.device_id = settings.options.device_id
    config.link_total_time = int(settings.seconds)
    config.sync_kv_timeout = int(settings.seconds * 1000)
    if settings.options.listen_address is not None:
        place = settings.options.listen_address
        config.listen_ip_info = f"{place}:{LISTEN_PORT + settings.options.device_id}"
    pool = json.dumps({"memory_size": POOL, "page_shift": 12})
    if settings.placement is Placement.DEVICE:
        config.mem_pool_cfg = pool
    else:
        config.host_mem_pool_cfg = pool
    options = config.generate_options()
    for name, value in settings.options.extra.items():
        options[option_key(settings.backend, name)] = value
    if settings.options.auth_key is not None:
        os.environ["DATADIST_AUTH_KEY"] = os.fsdecode(settings.options.auth_key)
    state.engine = LLMDataDist(LLMRole.MIX, cluster)
    state.engine.init(options)


def link(state: State, name: str, mapping: Mapping[int, int], table: str) -> int:
    """Begin to link; the comm id."""
    comm_id: int = state.engine.link(name, dict(mapping), table)
    return comm_id


def wait_link(state: State, comm_id: int) -> None:
    """Until it is OK."""
    state.engine.wait_link(comm_id)


def unlink(state: State, comm_id: int) -> None:
    """Unlink."""
    state.engine.unlink(comm_id)


def _desc(placement: Placement) -> CacheDesc:
    return CacheDesc(TENSORS, [SLOTS, WIDTH], DataType.DT_INT32, placement)


def make_cache(
    state: State, label: str, placement: Placement, seed: int, key: int | None = None
) -> int:
    """A cache from the pool, filled: with ``key`` one of blocks. Returns its id."""
    manager, cluster = state.engine.cache_manager, state.engine.cluster_id
    if key is None:
        cache = manager.allocate_cache(_desc(placement))
    else:
        cache = manager.allocate_blocks_cache(_desc(placement), BlocksCacheKey(cluster, key))
    state.any[label] = cache
    for index, array in enumerate(cache.numpy()):
        array[:] = _content(seed, index)
    return int(cache.cache_id)


def _content(seed: int, tensor: int) -> Any:
    import numpy as np

    data = pattern(seed * 64 + tensor, SLOTS * WIDTH * 4)
    return np.frombuffer(data, np.int32).reshape(SLOTS, WIDTH)


def pull_slot(state: State, label: str, owner: int, cache_id: int, there: int, slot: int) -> str:
    """Pull a slot by the cache's id; the status of the error, or "ok"."""
    manager, key = state.engine.cache_manager, CacheKeyByIdAndIndex(owner, cache_id, there)
    return _status(lambda: manager.pull_cache(key, state.any[label], slot))


def pull_blocks(
    state: State, label: str, owner: int, key: int, source: list[int], target: list[int]
) -> str:
    """Pull blocks by their key; the status of the error, or "ok"."""
    manager = state.engine.cache_manager
    key_of = BlocksCacheKey(owner, key)
    return _status(lambda: manager.pull_blocks(key_of, state.any[label], source, target))


def _status(call: Any) -> str:
    try:
        call()
    except LLMException as error:
        return f"{error.status_code.name}: {text_without_code(error)}"
    return "ok"


def wrong(
    state: State, label: str, seed: int, arrived: Mapping[int, tuple[int, int]]
) -> str | None:
    """How a cache differs from its content with these slots: here -> (seed, there)."""
    cache: Cache = state.any[label]
    for index, array in enumerate(cache.numpy()):
        wanted = _content(seed, index).copy()
        for slot, (source, there) in arrived.items():
            wanted[slot] = _content(source, index)[there]
        text = difference(array.tobytes(), wanted.tobytes())
        if text:
            return f"tensor {index}: {text}"
    return None
