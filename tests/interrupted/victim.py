"""An engine whose calls are interrupted, in a process of its own: what was raised, and what is left.

Handlers raise at random moments, or call the engine themselves; their signals come from a timer, or from
another thread. Caches are freed by `__del__` meanwhile, wherever the collector of garbage finds them, and
another thread makes and frees caches all the time.
"""

from __future__ import annotations

import faulthandler
import gc
import itertools
import logging
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import numpy as np

from datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LayerSynchronizer,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
    TransferWithCacheKeyConfig,
)
from datadist.api.cache_manager import CacheManager
from tests import nodes

SHAPE = [16, 256]
SMALL = CacheDesc(2, SHAPE, DataType.DT_INT32)
HOST = CacheDesc(2, SHAPE, DataType.DT_INT32, Placement.HOST)
PEER = 1
SEED = 9
"""Of what the peer's caches hold."""
LONELY = {2: 0, 9: 1}
"""A domain whose other member never comes."""
GRANTED = 77
"""A request whose blocks the peer grants."""
ENDINGS = 50
"""So many interrupted calls, on average, come between two `finalize`."""
REST_SECONDS = 60.0
LOGGING = logging.__file__
PAGES = 2 * 2 * 4
"""Pages of the two caches that stay: 2 tensors of 16 KiB each."""


HANG_SECONDS = 120.0
"""So long one round never takes; then the stacks of all threads are written, and the process ends."""


class Stop(BaseException):
    """As a shutdown raises it."""


class SoftLimit(Exception):
    """As a task queue raises it."""


class Late(TimeoutError):
    """As a watchdog raises it."""


class Ctrl(KeyboardInterrupt):
    """As a terminal raises it."""


KINDS: tuple[type[BaseException], ...] = (Stop, SoftLimit, Late, Ctrl)


class _Final(LayerSynchronizer):
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int) -> bool:
        return True


class _Dropped:
    """Does something, which frees, when the collector finds it."""

    owed: ClassVar[dict[int, Callable[[], object]]] = {}
    """What has not been done, since a handler interrupted `__del__`, or the object still lives."""
    _numbers = itertools.count()

    def __init__(self, free: Callable[[], object]) -> None:
        self.circle = self
        self._number = next(self._numbers)
        self.owed[self._number] = free

    def __del__(self) -> None:
        if hasattr(self, "_number"):  # else a handler interrupted `__init__`, and the caller frees
            self._free(self._number)

    @classmethod
    def _free(cls, number: int) -> None:
        with _unless_finalized():
            cls.owed[number]()
        del cls.owed[number]

    @classmethod
    def free_rest(cls) -> None:
        """Do what was interrupted, once the collector has run."""
        for number in list(cls.owed):
            cls._free(number)


@contextmanager
def _unless_finalized() -> Iterator[None]:
    try:
        yield
    except LLMException as error:
        if error.status_code is not LLMStatusCode.LLM_ENGINE_FINALIZED:
            raise


class _Beside:
    """A thread that makes and frees caches while others do what they do."""

    def __init__(self, manager: CacheManager) -> None:
        self._manager = manager
        self._over = threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        memory = [np.zeros(SHAPE, np.int32) for _ in range(2)]
        addresses = [int(each.ctypes.data) for each in memory]
        try:
            while not self._over.wait(0.001):
                kept = self._manager.allocate_blocks_cache(SMALL)
                _Dropped(partial(self._manager.deallocate_blocks_cache, kept))
                made = self._manager.register_cache(SMALL, addresses)
                self._manager.unregister_cache(made.cache_id)
        except BaseException as error:
            self.error = error

    def stop(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join()


def options() -> LLMConfig:
    """The configuration of both engines."""
    config = LLMConfig()
    config.enable_cache_manager = True
    config.enable_remote_cache_accessible = True
    config.local_comm_res = ""
    config.transfer_backend = "shm"
    config.mem_pool_cfg = '{"memory_size": 4194304, "page_shift": 12}'
    config.sync_kv_timeout = 20_000
    config.link_total_time = 300
    return config


def serve(here: nodes.Here, port: int) -> None:
    """Be the peer, which listens: caches 1 and 2 have blocks, cache 3 has slots."""
    config = options()
    config.listen_ip_info = f"127.0.0.1:{port}"
    here.engine = LLMDataDist(LLMRole.MIX, PEER)
    here.engine.init(config.generate_options())
    manager = here.engine.cache_manager
    source = manager.allocate_blocks_cache(SMALL, BlocksCacheKey(PEER, 1))
    here.caches = {
        "source": source,
        "target": manager.allocate_blocks_cache(SMALL, BlocksCacheKey(PEER, 2)),
        "slots": manager.allocate_cache(SMALL),
    }
    for tensor, each in enumerate(source.numpy()):
        each[:] = nodes.pattern(SEED, tensor, (16, 256))
    manager.grant_blocks(
        source, CacheKey(PEER, GRANTED), [5, 6, 7], readers=1 << 31, lease_millis=1 << 31
    )


class Victim:
    """The engine of cluster 2, and what its calls did."""

    def __init__(self, here: nodes.Here, port: int, seed: int) -> None:
        self.here, self.port = here, port
        self.random = random.Random(seed)
        self.raised: Counter[str] = Counter()
        """Exceptions of handlers, by the call that they left."""
        self.nested: Counter[str] = Counter()
        """Calls of handlers, by what came of them."""
        self.faults: list[str] = []
        self._armed: Callable[[], None] | None = None
        self._pending: BaseException | None = None
        self._where = ""
        """The stack that a handler has interrupted last."""
        self._comm_id = 0
        self._comm_ids: list[int] = []
        self._made: list[Cache] = []
        self._keys: list[CacheKey] = []
        self._memory = [np.zeros(SHAPE, np.int32) for _ in range(2)]
        self._host = [np.zeros(SHAPE, np.int32) for _ in range(2)]
        signal.signal(signal.SIGALRM, self._handle)
        sys.unraisablehook = self._unraisable
        self.calls: dict[str, Callable[[], object]] = {
            "allocate_blocks_cache": self._allocate,
            "allocate_cache": self._allocate_with_keys,
            "register_cache": self._register,
            "pull_blocks": lambda: self.pull([3]),
            "pull_blocks, many": lambda: self.pull(list(range(12))),
            "pull_blocks, granted": lambda: self.manager.pull_blocks(
                CacheKey(PEER, GRANTED), self.blocks, [0, 2], [5, 7]
            ),
            "grant_blocks": lambda: self.manager.grant_blocks(
                self.blocks, CacheKey(2, GRANTED), [8, 9]
            ).revoke(),
            "release_grant": lambda: self.manager.release_grant(CacheKey(PEER, GRANTED + 1)),
            "ended_grants": lambda: list(self.manager.ended_grants()),
            "pull_cache": lambda: self.manager.pull_cache(self._slot(2), self.slots, 1),
            "push_blocks": lambda: self.manager.push_blocks(
                BlocksCacheKey(PEER, 2), self.blocks, [4, 5], [4, 5]
            ),
            "push_cache": lambda: self.manager.push_cache(self._slot(1), self.slots, 2),
            "copy_cache": lambda: self.manager.copy_cache(self.slots, self.slots, 3, 2),
            "copy_blocks": lambda: self.manager.copy_blocks(self.blocks, {8: [9, 10]}),
            "swap_blocks": lambda: self.manager.swap_blocks(self.blocks, self.cpu, {8: 1}),
            "transfer_cache_async": self._transfer,
            "link": self._link,
            "unlink": self._unlink,
            "wait_link": lambda: self.engine.wait_link(self._comm_id, 2),
            "query_register_mem_status": lambda: self.engine.query_register_mem_status(
                self._comm_id
            ),
            "link_error": lambda: self.engine.link_error(self._comm_id),
            "link_clusters": self.link_peer,
            "unlink_clusters": self._unlink_peer,
            "stats": self._stats,
            "switch_role": lambda: self.engine.switch_role(LLMRole.DECODER),
            "init": self._init,
            "finalize": self._finalize,
        }
        self.actions: dict[str, Callable[[], object]] = {
            "stats": self._stats,
            "pull": lambda: self.pull([3]),
            "allocate": self._allocate,
            "link": self._link,
            "finalize": self._finalize,
            "free": self._free_spare,
            "free by __del__": gc.collect,
            "remove a key": lambda: self.manager.remove_cache_key(CacheKey(2, 1 << 61)),
            "unregister": self._unregister_spare,
        }
        self._spare: list[Cache] = []
        """What handlers may free: the first of the pool, the second registered."""
        here.engine = LLMDataDist(LLMRole.MIX, 2)
        self._settle()

    # -- calls -------------------------------------------------------------------------------

    @property
    def engine(self) -> Any:
        return self.here.live

    @property
    def manager(self) -> CacheManager:
        manager: CacheManager = self.engine.cache_manager
        return manager

    def leave_out(self, name: str) -> None:
        """Interrupt no call with this in its name."""
        for calls in (self.calls, self.actions):
            for each in [each for each in calls if name in each]:
                del calls[each]

    def _init(self) -> None:
        self.engine.init(options().generate_options())

    def _finalize(self) -> None:
        self.engine.finalize()

    def _stats(self) -> None:
        self.engine.stats()

    @staticmethod
    def _slot(place: int) -> CacheKeyByIdAndIndex:
        """A slot of the peer's third cache."""
        return CacheKeyByIdAndIndex(PEER, 3, place)

    def pull(self, blocks: list[int]) -> None:
        """Blocks of the peer's first cache into ours."""
        self.manager.pull_blocks(BlocksCacheKey(PEER, 1), self.blocks, blocks, blocks)

    def _allocate(self) -> None:
        self._made += map(self.manager.allocate_blocks_cache, [SMALL])  # noted in C: it is ours
        for made in self._made[-1:]:  # not what a handler has freed meanwhile
            _Dropped(partial(self.manager.deallocate_blocks_cache, made))

    def _make_spare(self) -> None:
        """Caches that handlers and the collector free."""
        manager = self.manager
        addresses = [int(each.ctypes.data) for each in self._memory]
        pooled = manager.allocate_cache(SMALL, [CacheKey(2, 1 << 61)])
        self._spare = [pooled, manager.register_cache(SMALL, addresses)]
        _Dropped(partial(manager.deallocate_blocks_cache, manager.allocate_blocks_cache(SMALL)))
        cache_id = manager.register_cache(SMALL, addresses).cache_id
        _Dropped(partial(manager.unregister_cache, cache_id))

    def _free_spare(self) -> None:
        self.manager.deallocate_cache(self._spare[0])

    def _unregister_spare(self) -> None:
        self.manager.unregister_cache(self._spare[1].cache_id)

    def _free_spares(self) -> None:
        if self._spare:
            self._free_spare()
            self.manager.remove_cache_key(CacheKey(2, 1 << 61))
            self._unregister_spare()
            self._spare = []

    def _allocate_with_keys(self) -> None:
        key = CacheKey(2, next(self._requests))
        self._keys.append(key)
        self._made += map(self.manager.allocate_cache, [SMALL], [[key]])
        self._free_made()

    def _register(self) -> None:
        addresses = [int(each.ctypes.data) for each in self._memory]
        self._made += map(self.manager.register_cache, [SMALL], [addresses])
        self._free_made()

    def _free_made(self) -> None:
        """What was made, where an exception came before it was freed."""
        for key in list(self._keys):
            self.manager.remove_cache_key(key)
            self._keys = [each for each in self._keys if each is not key]
        for cache in list(self._made):
            self.manager.unregister_cache(cache.cache_id)
            self._made = [each for each in self._made if each is not cache]

    def _transfer(self) -> None:
        config = TransferWithCacheKeyConfig(BlocksCacheKey(PEER, 2), range(1), range(1))
        task = self.manager.transfer_cache_async(self.blocks, _Final(), [config])
        task.synchronize(5000)
        task.get_results()

    def _link(self) -> None:
        table = nodes.table_for(LONELY)
        self._comm_ids += map(self.engine.link, ["lonely"], [LONELY], [table])
        self._comm_id = max([self._comm_id, *self._comm_ids])
        self._unlink_all()

    def _unlink_all(self) -> None:
        for comm_id in list(self._comm_ids):
            with suppress(LLMException):
                self.engine.unlink(comm_id)
            self._comm_ids = [each for each in self._comm_ids if each != comm_id]

    def _unlink(self) -> None:
        self.engine.unlink(self._comm_id)

    def link_peer(self) -> None:
        """Link with the peer, which listens."""
        self.engine.link_clusters([nodes.cluster_info(PEER, self.port)], 30_000)

    def _unlink_peer(self) -> None:
        self.engine.unlink_clusters([nodes.cluster_info(PEER, self.port)], 30_000)

    # -- interrupting ------------------------------------------------------------------------

    def _handle(self, _number: int, frame: FrameType | None) -> None:
        action, self._armed = self._armed, None
        if action is not None:
            self._where = "".join(traceback.format_stack(frame, 12))
            action()

    def _unraisable(self, unraisable: Any) -> None:
        """An exception that came while `__del__` ran, from which nothing can be raised."""
        if unraisable.exc_value is self._pending:
            self._pending = None
            self.raised["__del__"] += 1
        else:
            self.faults.append(f"__del__ raised {unraisable.exc_value!r}")

    def interrupt(self, name: str) -> None:
        """Make a call until a handler has raised, at a moment as good as any."""
        kind = self.random.choice(KINDS)

        def strike() -> None:
            self._pending = kind(name)
            raise self._pending

        self._meanwhile(name, strike)

    def nest(self, name: str, action: str) -> None:
        """Make a call until a handler has made another one."""

        def act() -> None:
            try:
                self.actions[action]()
                outcome = "done"
            except RuntimeError as error:
                outcome = type(error).__name__
            self.nested[f"{action}: {outcome}"] += 1

        self._meanwhile(name, act)

    def _meanwhile(self, name: str, action: Callable[[], None]) -> None:
        call, caught, sender = self.calls[name], None, None
        self._pending = None
        try:
            self._armed = action
            sender = self._send_soon(self.random.choice((1, 1, 20)) * self._moment())
            while self._armed is not None:
                try:
                    call()
                except (LLMException, RuntimeError):
                    if self._pending is not None:
                        raise
        except KINDS as error:
            caught = error
        signal.setitimer(signal.ITIMER_REAL, 0)
        if sender is not None:
            sender.join()
        pending, self._pending = self._pending, None
        dropped = caught is None and pending is not None
        if dropped and LOGGING in self._where:  # it drops what is raised in some places
            self.raised["logging"] += 1
        elif caught is not pending:
            self.faults.append(
                f"{name}: a handler raised {pending!r}, and {caught!r} came out, at\n{self._where}"
            )
        elif caught is not None:
            self.raised[name] += 1

    def _send_soon(self, seconds: float) -> threading.Thread | None:
        """Have the signal come: from a timer, or from a thread, which is returned."""
        if self.random.randrange(3):
            signal.setitimer(signal.ITIMER_REAL, seconds)
            return None

        def send() -> None:
            time.sleep(seconds)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        return sender

    def _moment(self) -> float:
        return self.random.uniform(20e-6, 1000e-6)

    # -- at rest -----------------------------------------------------------------------------

    def _settle(self) -> None:
        """Make what calls need, in an engine that may have ended."""
        before = self.engine._engine
        self._init()
        fresh = self.engine._engine is not before
        if fresh:
            self._made, self._keys, self._comm_ids, self._spare = [], [], [], []
        self._free_made()
        self._free_spares()
        self._unlink_all()
        if fresh or not hasattr(self, "blocks"):
            self._requests = iter(range(1, 1 << 60))
            self.blocks = self.manager.allocate_blocks_cache(SMALL, BlocksCacheKey(2, 1))
            self.slots = self.manager.allocate_cache(SMALL)
            self.cpu = Cache.create_cpu_cache(HOST, [int(a.ctypes.data) for a in self._host])
        self.link_peer()
        self._make_spare()

    def run(self, rounds: int, nested: int) -> None:
        """Interrupt every kind of call at random; after each some things have to work."""
        gc.set_threshold(20, 2, 2)
        seldom = ("init", "finalize")
        often = [name for name in self.calls if name not in seldom]
        for number in range(rounds + nested):
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
            ends = self.random.randrange(ENDINGS) == 0
            name = self.random.choice(seldom if ends else often)
            if number and number % 1000 == 0:
                print(f"{number} rounds", flush=True)
            beside = None if ends or self.random.randrange(4) else _Beside(self.manager)
            if number < rounds:
                self.interrupt(name)
            else:
                self.nest(name, self.random.choice(list(self.actions)))
            self._stop(beside)
            if ends and name == "init":
                self.engine.finalize()
            self._settle()
            self._check_pull()
            if self.random.randrange(ENDINGS) == 0:
                self.check_rest()
            if self.faults:
                return
        self.check_rest()

    def _stop(self, beside: _Beside | None) -> None:
        if beside is None:
            return
        beside.stop()
        finalized = self.engine._engine is None or self.engine._engine.over
        if beside.error is not None and not (finalized and isinstance(beside.error, LLMException)):
            self.faults.append(f"beside: {beside.error!r}")

    def _check_pull(self) -> None:
        for each in self.blocks.numpy():
            each[:] = 0
        self.pull([3, 5])
        for tensor, each in enumerate(self.blocks.numpy()):
            expected = nodes.pattern(SEED, tensor, (16, 256))
            if not (each[[3, 5]] == expected[[3, 5]]).all() or each[[0, 15]].any():
                self.faults.append("a pull has brought other bytes")

    def check_rest(self) -> None:
        """Nothing is taken but what the program has."""
        self._free_spares()
        gc.collect()
        _Dropped.free_rest()
        self._unlink_peer()
        engine = self.engine._engine
        deadline = time.monotonic() + REST_SECONDS
        while left := self._left(engine):
            if time.monotonic() > deadline:
                self.faults.append(f"left behind: {left}")
                return
            time.sleep(0.01)
        self.link_peer()
        self._make_spare()

    def _left(self, engine: Any) -> dict[str, Any]:
        caches = dict(engine.owned._caches)
        known = {self.blocks.cache_id, self.slots.cache_id}
        pools = self.engine.stats()["pools"]["DEVICE"]
        found = {
            "links": engine.linked(),
            "caches": sorted(set(caches) - known),
            "pins": [c.cache_id for c in caches.values() if c.pins],
            "pulls": [view for view in engine.views.values() if view.pulls],
            "pages": pools["pages_used"] - PAGES,
            "returning": pools["allocations_returning"],
        }
        return {name: value for name, value in found.items() if value}


def _descriptors() -> list[str]:
    """What each descriptor of this process is of."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # it is the one that was listing them
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return found


def use() -> dict[str, int]:
    """Descriptors, threads and mappings of pools of this process."""
    return {
        "descriptors": len(_descriptors()),
        "threads": threading.active_count(),
        "pools": Path("/proc/self/maps").read_text().count("memfd:datadist"),
    }


def play(
    here: nodes.Here, port: int, seed: int, rounds: int, nested: int, skip: str = ""
) -> dict[str, Any]:
    """One run; what it counted and found."""
    victim = Victim(here, port, seed)
    if skip:
        victim.leave_out(skip)
    here.live.finalize()
    before = use()
    victim._settle()
    victim.run(rounds, nested)
    gc.collect()
    here.live.finalize()
    after, deadline = use(), time.monotonic() + REST_SECONDS
    while any(after[name] > before[name] for name in before) and time.monotonic() < deadline:
        time.sleep(
            0.05
        )  # a thread of the library that looks at pages unmaps what it has looked at last
        after = use()
    faulthandler.cancel_dump_traceback_later()
    if any(after[name] > before[name] for name in before):
        victim.faults.append(f"leaked: {before} became {after}: {_descriptors()}")
    return {"raised": victim.raised, "nested": victim.nested, "faults": victim.faults}
