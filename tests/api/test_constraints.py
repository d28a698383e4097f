"""Every documented constraint, broken: the documented exception, with a text that helps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    DataType,
    LayerSynchronizer,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
    TransferConfig,
)
from datadist.engine.engine import comm_ids
from datadist.transport import Capabilities
from tests.nodes import table_for

PAIR = {1: 0, 2: 1}
TABLE = table_for(PAIR)
INVALID = LLMStatusCode.LLM_PARAM_INVALID
FINALIZED = LLMStatusCode.LLM_ENGINE_FINALIZED


def _options(**settings: Any) -> dict[str, str]:
    config = LLMConfig()
    config.enable_cache_manager = True
    config.mem_pool_cfg = '{"memory_size": 1048576, "page_shift": 12}'
    for name, value in settings.items():
        setattr(config, name, value)
    return config.generate_options()


@pytest.fixture
def engine(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLMDataDist]:
    """An initialised engine in this process, cluster 1."""
    monkeypatch.setenv("DATADIST_RUNTIME_DIR", str(runtime_dir))
    with LLMDataDist(LLMRole.PROMPT, 1) as instance:
        instance.init(_options())
        yield instance


def _raises(status: LLMStatusCode, match: str, function: Any, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(LLMException, match=match) as caught:
        function(*args, **kwargs)
    assert caught.value.status_code is status


def test_cache_manager_mode_must_be_on() -> None:
    with pytest.raises(ModuleNotFoundError, match="enable_cache_manager"):
        LLMDataDist(LLMRole.PROMPT, 1).init({"llm.MemPoolConfig": '{"memory_size": 1048576}'})


def test_one_engine_per_process(engine: LLMDataDist) -> None:
    other = LLMDataDist(LLMRole.DECODER, 2)
    _raises(LLMStatusCode.LLM_FAILED, "only one can be", other.init, _options())
    engine.init({})  # a second init of the same object does nothing


def test_methods_before_init() -> None:
    fresh = LLMDataDist(LLMRole.PROMPT, 1)
    with pytest.raises(RuntimeError, match="call init first"):
        fresh.link("name", PAIR, TABLE)
    with pytest.raises(RuntimeError, match="call init first"):
        _ = fresh.cache_manager
    fresh.finalize()


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ((None, PAIR, TABLE), TypeError, "comm_name"),
        (("a", None, TABLE), AttributeError, "cluster_rank_info"),
        (("a", [1, 2], TABLE), TypeError, "only support dict"),
        (("a", {"1": 0, "2": 1}, TABLE), TypeError, "only support int"),
        (("a", {-1: 0, 1: 1}, TABLE), ValueError, "cluster id"),
        (("a", {1: 0, 2: 2**32}, TABLE), ValueError, "rank of cluster 2"),
        (("a", PAIR, 5), TypeError, "only support str"),
        (("a", PAIR, None), TypeError, "rank_table"),
    ],
)
def test_link_arguments(
    engine: LLMDataDist, args: tuple[Any, ...], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        engine.link(*args)


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (("", PAIR, TABLE), "empty"),
        (("a" * 128, PAIR, TABLE), "fewer than 128"),
        (("ä" * 64, PAIR, TABLE), "128 bytes"),
        (("a", {n: n for n in range(5)}, TABLE), "at most 4"),
        (("a", {1: 0}, TABLE), "at least 2"),
        (("a", {1: 1, 2: 0}, TABLE), "ascending order"),
        (("a", {2: 0, 3: 1}, TABLE), "own|does not contain"),
    ],
)
def test_link_constraints(engine: LLMDataDist, args: tuple[Any, ...], match: str) -> None:
    _raises(INVALID, match, engine.link, *args)


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ("{", "not valid JSON"),
        (TABLE.replace('"1.0"', '"2.0"'), "version"),
        (
            TABLE.replace('"rank_id": "1"', '"rank_id": "x"'),
            r"server_list\[0\].device\[1\].rank_id",
        ),
        (TABLE.replace('"rank_id": "1"', '"rank_id": "0"'), "rank"),
        (table_for({1: 0, 2: 1, 3: 2}), "rank_id 2"),
        (TABLE.replace("completed", "initializing"), "status"),
    ],
)
def test_rank_tables_that_cannot_be_used(engine: LLMDataDist, table: str, match: str) -> None:
    _raises(LLMStatusCode.LLM_LINK_FAILED, match, engine.link, "a", PAIR, table)


def test_link_needs_memory(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATADIST_RUNTIME_DIR", str(runtime_dir))
    options = _options()
    del options["llm.MemPoolConfig"]
    with LLMDataDist(LLMRole.PROMPT, 1) as engine:
        engine.init(options)
        _raises(INVALID, "mem_pool_cfg.*register", engine.link, "a", PAIR, TABLE)
        memory = (b"x" * 4096)[:]
        array = bytearray(memory)
        import ctypes

        address = ctypes.addressof((ctypes.c_char * len(array)).from_buffer(array))
        desc = CacheDesc(1, [1, 4096], DataType.DT_INT8, Placement.HOST)
        engine.cache_manager.register_cache(desc, [address])
        assert engine.link("a", PAIR, TABLE) == 1
        manager = engine.cache_manager
        cache = manager.register_cache(desc, [address])
        feature = LLMStatusCode.LLM_FEATURE_NOT_ENABLED
        _raises(feature, "pool", manager.deallocate_cache, cache)
        _raises(INVALID, "after link", manager.register_cache, desc, [address], (), True)
        _raises(
            INVALID, "no DEVICE pool", manager.allocate_cache, CacheDesc(1, [1], DataType.DT_INT8)
        )


def test_unknown_comm_ids(engine: LLMDataDist) -> None:
    for method in (
        engine.unlink,
        engine.query_register_mem_status,
        engine.wait_link,
        engine.link_error,
    ):
        _raises(LLMStatusCode.LLM_NOT_YET_LINK, "7", method, 7)
        with pytest.raises(TypeError):
            method("7")  # type: ignore[arg-type]


def test_comm_ids_are_no_status_codes() -> None:
    numbers = comm_ids()
    first = [next(numbers) for _ in range(600_000)]
    assert first[0] == 1
    assert not set(first) & {int(code) for code in LLMStatusCode}


def test_hixl_keeps_its_conditions(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATADIST_RUNTIME_DIR", str(runtime_dir))
    engine = LLMDataDist(LLMRole.PROMPT, 1)
    _raises(INVALID, "listen", engine.init, _options(transfer_backend="hixl"))
    with engine:
        engine.init(_options(transfer_backend="hixl", listen_ip_info="127.0.0.1:0"))
        feature = LLMStatusCode.LLM_FEATURE_NOT_ENABLED
        _raises(feature, "hixl", engine.link, "a", PAIR, TABLE)


def test_backends_that_do_not_exist(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATADIST_RUNTIME_DIR", str(runtime_dir))
    engine = LLMDataDist(LLMRole.PROMPT, 1)
    _raises(INVALID, "shm", engine.init, _options(transfer_backend="nonsense"))
    _raises(INVALID, "empty", engine.init, _options(transfer_backend=""))
    monkeypatch.setenv("DATADIST_BACKEND", "nonsense")
    _raises(INVALID, "nonsense", engine.init, _options())


def test_a_backend_that_is_named_counts_whatever_the_environment_says(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATADIST_RUNTIME_DIR", str(runtime_dir))
    monkeypatch.setenv("DATADIST_BACKEND", "nonsense")
    with LLMDataDist(LLMRole.PROMPT, 1) as engine:
        engine.init(_options(transfer_backend="shm"))
        assert engine.backend == "shm"


def test_pool_rules(engine: LLMDataDist) -> None:
    manager = engine.cache_manager
    desc = CacheDesc(2, [2, 256], DataType.DT_INT32)
    with manager.allocate_cache(desc, [CacheKey(1, 5)]) as cache:
        assert cache.cache_id == 1
        _raises(INVALID, "bound", manager.allocate_cache, desc, [CacheKey(1, 5)])
        _raises(INVALID, "identical", manager.allocate_cache, desc, [CacheKey(1, 6)] * 2)
        _raises(
            INVALID,
            "3 cache keys",
            manager.allocate_cache,
            desc,
            [CacheKey(1, n) for n in (7, 8, 9)],
        )
        _raises(INVALID, "deallocate_cache", manager.deallocate_blocks_cache, cache)
        _raises(
            INVALID,
            "HOST pool",
            manager.allocate_cache,
            CacheDesc(1, [1], DataType.DT_INT8, Placement.HOST),
        )
        _raises(INVALID, "positive", manager.allocate_cache, CacheDesc(1, [0], DataType.DT_INT8))
        _raises(INVALID, "num_tensors", manager.allocate_cache, CacheDesc(0, [1], DataType.DT_INT8))
    assert cache.tensor_addrs == []
    manager.deallocate_cache(cache)
    oom = LLMStatusCode.LLM_OUT_OF_MEMORY
    manager.remove_cache_key(CacheKey(1, 5))
    _raises(oom, "exhausted", manager.allocate_cache, CacheDesc(1, [1 << 21], DataType.DT_INT8))
    whole = manager.allocate_cache(CacheDesc(1, [1 << 20], DataType.DT_INT8))
    manager.unregister_cache(whole.cache_id)
    manager.allocate_blocks_cache(
        CacheDesc(1, [1 << 10, 1 << 10], DataType.DT_INT8), BlocksCacheKey(1)
    )


def test_registration_rules(engine: LLMDataDist) -> None:
    import numpy as np

    manager = engine.cache_manager
    array = np.zeros(8192, np.int8)
    address = int(array.ctypes.data)
    desc = CacheDesc(1, [1, 4096], DataType.DT_INT8)
    first = manager.register_cache(desc, [address])
    manager.register_cache(desc, [address])
    manager.unregister_cache(manager.register_cache(desc, [address + 64]).cache_id)
    _raises(INVALID, "valid address", manager.register_cache, desc, [0])
    _raises(INVALID, "as many addrs", manager.register_cache, desc, [address, address])
    _raises(LLMStatusCode.LLM_FAILED, "not memory", manager.register_cache, desc, [4096])
    with pytest.raises(TypeError):
        manager.register_cache(desc, (address,))  # type: ignore[arg-type]
    manager.unregister_cache(first.cache_id)
    manager.unregister_cache(first.cache_id)


def test_registered_bytes_are_limited_where_the_transport_says_so(
    engine: LLMDataDist, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datadist_shm import ShmTransport

    both = frozenset(Placement)
    limited = Capabilities(both, True, True, max_registered={Placement.DEVICE: (1 << 20) + 4096})
    monkeypatch.setattr(ShmTransport, "capabilities", limited)
    import numpy as np

    arrays = [np.zeros(4096, np.int8) for _ in range(2)]
    desc = CacheDesc(1, [1, 4096], DataType.DT_INT8)
    engine.cache_manager.register_cache(desc, [int(arrays[0].ctypes.data)])
    register = engine.cache_manager.register_cache
    _raises(INVALID, "at most 1052672 bytes", register, desc, [int(arrays[1].ctypes.data)])


def test_a_finalized_engine_says_so(engine: LLMDataDist) -> None:
    manager = engine.cache_manager
    engine.finalize()
    desc = CacheDesc(1, [1], DataType.DT_INT8)
    _raises(FINALIZED, "finalized", manager.allocate_cache, desc)
    assert "not initialized" in repr(engine)


def test_an_old_manager_does_not_act_on_the_next_engine(engine: LLMDataDist) -> None:
    old, desc = engine.cache_manager, CacheDesc(1, [2, 8], DataType.DT_INT8)
    engine.finalize()
    engine.init(_options())
    new = engine.cache_manager
    kept = new.allocate_cache(desc, [CacheKey(1, 7)])
    _raises(FINALIZED, "finalized", old.allocate_cache, desc)
    _raises(FINALIZED, "finalized", old.unregister_cache, kept.cache_id)
    _raises(FINALIZED, "finalized", old.remove_cache_key, CacheKey(1, 7))
    _raises(FINALIZED, "finalized", old.deallocate_cache, kept)
    _raises(FINALIZED, "finalized", old.copy_cache, kept, kept)
    assert new.allocate_cache(desc).cache_id == kept.cache_id + 1


def test_an_old_cache_does_not_mean_one_of_the_next_engine(engine: LLMDataDist) -> None:
    desc = CacheDesc(2, [2, 8], DataType.DT_INT8)
    host = CacheDesc(2, [2, 8], DataType.DT_INT8, Placement.HOST)
    old = engine.cache_manager.allocate_cache(desc)
    old_blocks = engine.cache_manager.allocate_blocks_cache(desc)
    with engine.cache_manager.allocate_cache(desc):
        engine.finalize()
        engine.init(_options())
        manager = engine.cache_manager
        new = [manager.allocate_cache(desc), manager.allocate_blocks_cache(desc)]
        new += [manager.allocate_cache(desc)]  # with the id of the cache that ends now
    cpu = Cache.create_cpu_cache(host, [1, 2])
    unknown = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    assert old.cache_id == new[0].cache_id
    _raises(unknown, "engine was finalized", manager.copy_cache, old, new[0])
    _raises(unknown, "engine was finalized", manager.copy_blocks, old_blocks, {0: [1]})
    _raises(unknown, "engine was finalized", manager.pull_cache, CacheKey(2, 1), old)
    blocks = BlocksCacheKey(2, 0), old_blocks, [0], [0]
    _raises(unknown, "engine was finalized", manager.pull_blocks, *blocks)
    _raises(INVALID, "no tensors any more", manager.swap_blocks, cpu, old_blocks, {})
    sent = old, _Final(), [TransferConfig(2, [4096, 8192])]
    _raises(unknown, "engine was finalized", manager.transfer_cache_async, *sent)
    manager.deallocate_cache(old)
    assert old.tensor_addrs == []
    for made in new:
        assert engine._live(INVALID).owned.get(made.cache_id) is not None


class _Final(LayerSynchronizer):
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        raise AssertionError(layer_index, timeout_in_millis)


def test_views_share_the_memory(engine: LLMDataDist) -> None:
    import numpy as np

    cache = engine.cache_manager.allocate_cache(CacheDesc(2, [2, 3], DataType.DT_FLOAT16))
    cache.numpy()[1][1, 2] = 2.5
    assert float(np.from_dlpack(cache.tensors[1])[1, 2]) == 2.5
    view = cache.numpy()[1]
    assert view.ctypes.data == cache.tensor_addrs[1]
    engine.finalize()
    assert float(view[1, 2]) == 2.5  # the view keeps the memory


def test_bfloat16_views(engine: LLMDataDist) -> None:
    cache = engine.cache_manager.allocate_cache(CacheDesc(1, [4], DataType.DT_BF16))
    assert str(cache.numpy()[0].dtype) == "bfloat16"
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensor = torch.from_dlpack(cache.tensors[0])
    assert tensor.dtype is torch.bfloat16
    tensor[2] = 1.5
    assert float(cache.numpy()[0][2]) == 1.5


def test_the_runtime_directory_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir(mode=0o777)
    open_to_all.chmod(0o777)
    monkeypatch.setenv("DATADIST_RUNTIME_DIR", str(open_to_all))
    failed = LLMStatusCode.LLM_FAILED
    _raises(failed, "mode 0777, expected", LLMDataDist(LLMRole.PROMPT, 1).init, _options())
