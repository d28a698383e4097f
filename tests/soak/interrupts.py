"""What the processes of a soak do while signal handlers raise, and while the garbage collector frees."""

from __future__ import annotations

import contextlib
import gc
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from datadist import Cache, CacheDesc, DataType, LLMException, Placement
from datadist.api.cache_manager import CacheManager
from tests import nodes
from tests.soak import work
from tests.soak.comparing import Difference

SMALL = CacheDesc(2, [4, 64], DataType.DT_INT32, Placement.DEVICE)
ROUNDS = 40
"""Interrupted calls of one step, where a call is short."""
HANDLED = {None, "RuntimeError"}
"""How a call may end that a signal handler makes: it works, or its thread is inside a call already."""


OURS = str(Path(nodes.__file__).parent)


class WatchdogError(Exception):
    """As task queues raise from a signal handler where a task takes too long."""


KINDS: list[type[BaseException]] = [KeyboardInterrupt, WatchdogError, SystemExit]


class _Dropped:
    """Frees a cache when the garbage collector finds it: it is part of a cycle."""

    def __init__(self, manager: CacheManager, cache: Cache) -> None:
        self.manager, self.cache, self.itself = manager, cache, self

    def __del__(self) -> None:
        self.manager.deallocate_cache(self.cache)


@contextlib.contextmanager
def _collecting_often() -> Iterator[None]:
    usual = gc.get_threshold()
    gc.set_threshold(5, 1, 1)
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def _interrupted(
    act: Callable[[], object], seconds: float, handler: Callable[[int, FrameType | None], object]
) -> BaseException | None:
    """Run ``act``, with a signal in so many seconds; what ended it, if it did not return."""
    armed = [True]

    def if_armed(number: int, frame: FrameType | None) -> None:
        if armed:
            handler(number, frame)

    before = signal.signal(signal.SIGALRM, if_armed)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
            act()
        finally:
            armed.clear()  # a handler may start the timer again
            signal.setitimer(signal.ITIMER_REAL, 0)
    except BaseException as error:
        return error
    finally:
        signal.signal(signal.SIGALRM, before)
    return None


def _raising(kind: type[BaseException]) -> Callable[[int, FrameType | None], object]:
    """A handler that raises inside a call; what is lost between calls would be our own loss."""

    def handler(_signal: int, frame: FrameType | None) -> None:
        if frame is None or frame.f_code.co_filename.startswith(OURS) or _in_collector(frame):
            signal.setitimer(signal.ITIMER_REAL, 2e-4)
            return
        raise kind

    return handler


def _in_collector(frame: FrameType | None) -> bool:
    """Whether an exception would be dropped, with the call that it ends."""
    while frame is not None:
        if frame.f_code is _Dropped.__del__.__code__:
            return True
        frame = frame.f_back
    return False


def _expect(error: BaseException | None, kind: type[BaseException]) -> None:
    """An exception of the caller's passes unchanged, and there is no other one."""
    if error is not None and type(error) is not kind:
        raise AssertionError(f"a {kind.__name__} of a signal handler became {error!r}")


def pull(
    here: nodes.Here, owner: int, seed: int, slot: int, seconds: float, kind: int
) -> tuple[Difference, Difference]:
    """A pull that a signal handler ends, and a whole one after it: what differs after each."""
    error = _interrupted(
        lambda: nodes.pull_cache(here, work.key_of(owner, slot), "into", 1),
        seconds,
        _raising(KINDS[kind]),
    )
    _expect(error, KINDS[kind])
    torn = work.difference(here, "into", seed, {1: slot}, whole=error is None)
    return torn, work.pull(here, owner, seed, slot)[1]


def push(here: nodes.Here, target: int, slot: int, seconds: float, kind: int) -> None:
    """A push that a signal handler ends, and a whole one after it."""
    error = _interrupted(lambda: work.push(here, target, slot), seconds, _raising(KINDS[kind]))
    _expect(error, KINDS[kind])
    work.push(here, target, slot)


def allocate(here: nodes.Here, seed: int) -> int:
    """Allocate and free with exceptions and frees at random moments; pages that did not return."""
    manager, chance, before = here.live.cache_manager, random.Random(seed), work.pages_used(here)

    def act() -> None:
        cache = manager.allocate_cache(SMALL)
        dropped = _Dropped(manager, cache)
        if chance.random() < 0.5:
            manager.deallocate_cache(cache)
        del dropped

    with _collecting_often():
        for _ in range(ROUNDS):
            kind = chance.choice(KINDS)
            _expect(_interrupted(act, chance.random() * 3e-4, _raising(kind)), kind)
    gc.collect()
    act()
    return _kept(here, before)


def _kept(here: nodes.Here, before: int) -> int:
    """Pages beyond so many; what another thread is in the middle of freeing has 10 seconds.

    While another thread collects garbage, ``gc.collect`` does nothing: once is not enough.
    """
    deadline = time.monotonic() + 10
    while True:
        gc.collect()
        kept = max(work.pages_used(here) - before, 0)
        if kept == 0 or time.monotonic() > deadline:
            return kept
        time.sleep(0.01)


def link(here: nodes.Here, name: str, mapping: dict[int, int], seconds: float, kind: int) -> None:
    """Begin to link, once more where a signal handler ended the call.

    The other members come later: those that are quicker than the handler would be linked with a domain
    that is given up.
    """
    error = _interrupted(
        lambda: here.any.__setitem__(name, nodes.link(here, name, mapping)),
        seconds,
        _raising(KINDS[kind]),
    )
    _expect(error, KINDS[kind])
    if error is not None:
        here.any[name] = nodes.link(here, name, mapping)


def wait(here: nodes.Here, name: str) -> float:
    """Wait until the link is complete; seconds."""
    started = time.perf_counter()
    here.live.wait_link(here.any[name])
    return time.perf_counter() - started


def handled(
    here: nodes.Here, owner: int, seed: int, slot: int, seconds: float
) -> tuple[Difference, list[str]]:
    """A pull during which a signal handler makes calls: what differs, and how the calls ended badly."""
    ended: dict[str, str | None] = {}
    manager, unused = here.live.cache_manager, here.live.cache_manager.allocate_cache(SMALL)

    def attempt(what: str, act: Callable[[], object]) -> None:
        ended[what] = None
        try:
            act()
        except (LLMException, RuntimeError) as error:
            ended[what] = type(error).__name__

    def handler(_signal: int, _frame: FrameType | None) -> None:
        attempt("stats", here.live.stats)
        attempt("deallocate", lambda: manager.deallocate_cache(unused))
        attempt("allocate", lambda: manager.deallocate_cache(manager.allocate_cache(SMALL)))
        attempt("pull", lambda: nodes.pull_cache(here, work.key_of(owner, 0), "inbox", 0))

    error = _interrupted(
        lambda: nodes.pull_cache(here, work.key_of(owner, slot), "into", 1), seconds, handler
    )
    manager.deallocate_cache(unused)
    nodes.fill(here, "inbox", work.GUARD)
    bad = [f"{what}: {how}" for what, how in ended.items() if how not in HANDLED]
    bad += [
        f"{what}: {how}" for what, how in ended.items() if how and what in ("stats", "deallocate")
    ]
    if error is not None:
        bad.append(f"the pull that was interrupted: {error!r}")
    return work.difference(here, "into", seed, {1: slot}), bad
