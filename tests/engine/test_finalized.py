"""Cache managers whose engine was finalized: every operation, and what hangs on them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    CacheTask,
    DataType,
    LayerSynchronizer,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    MemInfo,
    Memtype,
    Placement,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from datadist.api.cache_manager import CacheManager
from datadist.control.messages import Left
from datadist.engine import engine as engine_module
from datadist.engine.engine import Engine
from datadist.links.domain import Attempt
from datadist.transfers.verify import Verification
from tests import in_process_engine
from tests.forming import GOOD, TOKEN, complete, rank_0, until_synced
from tests.raw_peer import RawPeer

POOL = '{"memory_size": 262144, "page_shift": 12}'
DESC = CacheDesc(2, [2, 256], DataType.DT_INT32)
FINALIZED = LLMStatusCode.LLM_ENGINE_FINALIZED


def _options(one_sided: bool) -> dict[str, str]:
    return {
        "llm.EnableCacheManager": "1",
        "llm.MemPoolConfig": POOL,
        "llm.TransferBackend": "shm",
        "llm.EnableRemoteCacheAccessible": str(int(one_sided)),
    }


class Old:
    """A manager of an engine, with what its operations need."""

    def __init__(self, engine: LLMDataDist, one_sided: bool) -> None:
        self.engine, self.one_sided = engine, one_sided
        engine.init(_options(one_sided))
        self.manager: CacheManager = engine.cache_manager
        self.slots = self.manager.allocate_cache(DESC)
        self.blocks = self.manager.allocate_blocks_cache(DESC)
        self.arrays = [np.zeros([2, 256], np.int32) for _ in range(4)]
        self.addresses = [int(array.ctypes.data) for array in self.arrays]
        host = CacheDesc(2, [2, 256], DataType.DT_INT32, Placement.HOST)
        self.cpu = Cache.create_cpu_cache(host, self.addresses[:2])

    def operations(self) -> dict[str, Callable[[], object]]:
        """All 17, each with valid arguments."""
        m, slots, blocks = self.manager, self.slots, self.blocks
        by_id, model = CacheKeyByIdAndIndex(2, 1), BlocksCacheKey(2)
        keyed = TransferWithCacheKeyConfig(by_id, range(1), range(1))
        config = keyed if self.one_sided else TransferConfig(2, [4096, 8192])
        return {
            "allocate_cache": lambda: m.allocate_cache(DESC, [CacheKey(1, 1)]),
            "allocate_blocks_cache": lambda: m.allocate_blocks_cache(DESC, BlocksCacheKey(1)),
            "deallocate_cache": lambda: m.deallocate_cache(slots),
            "deallocate_blocks_cache": lambda: m.deallocate_blocks_cache(blocks),
            "remove_cache_key": lambda: m.remove_cache_key(CacheKey(1, 1)),
            "register_cache": lambda: m.register_cache(DESC, self.addresses[2:]),
            "register_blocks_cache": lambda: m.register_blocks_cache(
                DESC, self.addresses[2:], remote_accessible=True
            ),
            "unregister_cache": lambda: m.unregister_cache(1),
            "pull_cache": lambda: m.pull_cache(by_id, slots),
            "pull_blocks": lambda: m.pull_blocks(model, blocks, [0], [1]),
            "push_cache": lambda: m.push_cache(by_id, slots),
            "push_blocks": lambda: m.push_blocks(model, blocks, [0], [1]),
            "transfer_cache_async": lambda: m.transfer_cache_async(slots, Waiting(), [config]),  # type: ignore[arg-type]
            "copy_cache": lambda: m.copy_cache(slots, slots, 0, 1),
            "copy_blocks": lambda: m.copy_blocks(blocks, {0: [1]}),
            "swap_blocks": lambda: m.swap_blocks(self.cpu, blocks, {0: 1}),
            "remap_registered_memory": lambda: m.remap_registered_memory(
                MemInfo(Memtype.MEM_TYPE_DEVICE, 4096, 1)
            ),
        }


class Waiting(LayerSynchronizer):
    """A layer that is final when it is said to be."""

    def __init__(self) -> None:
        self.final, self.asked = threading.Event(), threading.Event()

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int) -> bool:
        """Wait."""
        self.asked.set()
        return self.final.wait(20)


@pytest.fixture(params=[False, True], ids=["two-sided", "one-sided"])
def old(
    request: pytest.FixtureRequest, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Old]:
    """The manager of an engine that is still to be finalized."""
    monkeypatch.setenv("DATADIST_RUNTIME_DIR", str(runtime_dir))
    engine = LLMDataDist(LLMRole.MIX, 1)
    try:
        yield Old(engine, request.param)
    finally:
        engine.finalize()


def _refused(old: Old) -> dict[str, str]:
    """What did not raise LLM_ENGINE_FINALIZED."""
    wrong = {}
    operations = old.operations()
    assert len(operations) == 17
    for name, operation in operations.items():
        try:
            operation()
        except LLMException as error:
            if error.status_code is not FINALIZED:
                wrong[name] = repr(error.status_code)
        except Exception as error:
            wrong[name] = repr(error)
        else:
            wrong[name] = "returned"
    return wrong


def test_after_finalize(old: Old) -> None:
    before = [list(cache.tensor_addrs) for cache in (old.slots, old.blocks)]
    old.engine.finalize()
    assert _refused(old) == {}
    assert [cache.tensor_addrs for cache in (old.slots, old.blocks)] == before


def test_after_a_link_and_finalize(old: Old) -> None:
    old.manager.set_is_call_linked()
    old.engine.finalize()
    assert _refused(old) == {}


def test_beside_the_next_engine_of_the_same_object(old: Old) -> None:
    old.engine.finalize()
    old.engine.init(_options(old.one_sided))
    new = old.engine.cache_manager
    assert new is not old.manager
    kept = new.allocate_cache(DESC)
    assert _refused(old) == {}
    new.copy_cache(kept, kept, 0, 1)
    new.deallocate_cache(kept)
    assert kept.tensor_addrs == []


def test_beside_the_engine_of_another_object(old: Old) -> None:
    old.engine.finalize()
    with LLMDataDist(LLMRole.MIX, 7) as other:
        other.init(_options(old.one_sided))
        kept = other.cache_manager.allocate_cache(DESC)
        assert _refused(old) == {}
        assert other.cache_manager.allocate_cache(DESC).cache_id == kept.cache_id + 1


def _ending(
    engine: in_process_engine.Engine, monkeypatch: pytest.MonkeyPatch
) -> tuple[RawPeer, threading.Thread, Left]:
    """A member that never answers, while the engine that it is linked with is being finalized."""
    monkeypatch.setattr(engine_module, "FLUSH_SECONDS", 300.0)
    peer = rank_0(engine)
    in_process_engine.Sent(peer, GOOD, TOKEN)
    complete(engine, peer)
    ending = threading.Thread(target=engine.api.finalize)
    ending.start()
    left = peer.hear("left")
    assert isinstance(left, Left)
    return peer, ending, left


def test_finalize_waits_until_its_peers_write_its_memory_no_more(
    engine: in_process_engine.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = Attempt.shut_down

    def inside(attempt: Attempt, *args: Any) -> frozenset[int]:
        return closed(attempt, *args) | {0}

    monkeypatch.setattr(Attempt, "shut_down", inside)
    peer, ending, left = _ending(engine, monkeypatch)
    for _ in range(20):
        until_synced(peer)  # which fails where the engine has hung up
        time.sleep(0.005)
    assert ending.is_alive()
    assert peer.say({"kind": "ack", "seq": left.seq})
    assert peer.hear("goodbye") is not None
    ending.join(30)
    assert not ending.is_alive()


def test_finalize_does_not_wait_for_the_answers_of_readers(
    engine: in_process_engine.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer, ending, _ = _ending(engine, monkeypatch)
    ending.join(60)
    assert not ending.is_alive()
    assert peer.hear("goodbye") is not None


def test_finalize_drops_the_requests_that_wait(
    engine: in_process_engine.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[int] = []
    begun, go_on = threading.Event(), threading.Event()

    def serve(_self: Verification, _view: Any, message: Any, _deadline: float) -> None:
        served.append(message.id)
        begun.set()
        go_on.wait(60)

    monkeypatch.setattr(Verification, "_serve", serve)
    peer = engine.raw_peer(1)
    for number in range(100):
        peer.say({"kind": "verify", "id": number, "address": "", "length": "", "seconds": 100.0})
    until_synced(peer)
    assert begun.wait(60)
    parts = engine.api._engine
    assert parts is not None
    ending = threading.Thread(target=engine.api.finalize)
    ending.start()
    while not parts.verification._service._workers._stopping:
        time.sleep(0.005)
    go_on.set()
    ending.join(60)
    assert not ending.is_alive()
    assert len(served) < 10


def test_finalizing_twice_ends_the_engine_once(old: Old, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Engine] = []
    whole = Engine.finalize

    def finalize(engine: Engine) -> Any:
        ended.append(engine)
        return whole(engine)

    monkeypatch.setattr(Engine, "finalize", finalize)
    threads = [threading.Thread(target=old.engine.finalize) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    old.engine.finalize()
    assert len(ended) == 1


@pytest.mark.parametrize("again", [False, True])
def test_the_end_of_with_is_quiet(old: Old, again: bool) -> None:
    m = old.manager
    made: list[Callable[[], Cache]] = [
        lambda: m.allocate_cache(DESC),
        lambda: m.allocate_blocks_cache(DESC),
        lambda: m.register_cache(DESC, old.addresses[2:]),
        lambda: m.register_blocks_cache(DESC, old.addresses[2:]),
    ]
    with made[0](), made[1](), made[2](), made[3]():
        old.engine.finalize()
        if again:
            old.engine.init(_options(old.one_sided))


def _task(old: Old) -> tuple[CacheTask, Waiting]:
    synchronizer = Waiting()
    keyed = TransferWithCacheKeyConfig(CacheKeyByIdAndIndex(2, 1), range(1), range(1))
    config = keyed if old.one_sided else TransferConfig(2, [4096, 8192])
    task = old.manager.transfer_cache_async(old.slots, synchronizer, [config])  # type: ignore[arg-type]
    assert synchronizer.asked.wait(20)
    return task, synchronizer


def test_a_task_of_a_finalized_engine_says_so(old: Old) -> None:
    task, synchronizer = _task(old)
    old.engine.finalize()
    assert task.synchronize(20_000) is FINALIZED  # though its layer is not final
    assert task.get_results() == [FINALIZED]
    synchronizer.final.set()


def test_in_a_forked_child(old: Old) -> None:
    task, synchronizer = _task(old)
    ended, waiting = _task(old)
    waiting.final.set()
    before = ended.get_results(20_000)
    cache = old.manager.allocate_cache(DESC)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with cache:
                said: list[object] = [
                    _refused(old),
                    task.get_results(),
                    task.synchronize(),
                    "running" in repr(task),
                ]
            said.append(ended.get_results() == before)
        except BaseException as error:
            said = [repr(error)]
        os.write(writing, repr(said).encode())
        os._exit(0)
    os.close(writing)
    synchronizer.final.set()
    with os.fdopen(reading) as pipe:
        heard = pipe.read()
    os.waitpid(pid, 0)
    assert heard == repr([{}, [FINALIZED], FINALIZED, False, True])
    assert cache.tensor_addrs
    old.manager.deallocate_cache(cache)
