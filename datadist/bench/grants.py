"""Grants: what one request costs with a grant, and what a live grant costs."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from datadist import BlocksCacheKey, CacheKey, Grant
from datadist.bench.measure import Pair, Progress, pair, pool_for
from datadist.bench.measured_engine import PEER, BenchError, MeasuredEngine, Settings, model_of
from datadist.bench.results import Grants
from datadist.bench.shapes import Shape

SHAPE = Shape("grants", "32 layers x K and V, 64 of 512 blocks of 32 KiB", 64, 512, 32768, 64)
LIVE = 10_000
LEASE_MILLIS = 600_000


class GrantingEngine(MeasuredEngine):
    """An owner whose methods are called by name in its process."""

    def __init__(self, cluster: int, settings: Settings) -> None:
        super().__init__(cluster, settings)
        self._grants: dict[int, Grant] = {}

    def grant(self, label: str, req: int, blocks: list[int]) -> tuple[float, bytes]:
        """Grant blocks of a cache to one reader; the seconds, and the token."""
        manager, cache = self.engine.cache_manager, self.caches[label]
        key = CacheKey(self.cluster, req)
        began = time.perf_counter()
        grant = manager.grant_blocks(cache, key, blocks, lease_millis=LEASE_MILLIS)
        seconds = time.perf_counter() - began
        self._grants[req] = grant
        return seconds, grant.token

    def consumed(self, req: int) -> float:
        """When the grant had been consumed (the clock of the host). Raises :class:`BenchError`."""
        state = self._grants.pop(req).wait(60_000)
        if state.name != "CONSUMED":
            raise BenchError(f"the grant of request {req} is {state.name}")
        return time.perf_counter()

    def revoke(self, req: int) -> float:
        """End a grant; the seconds."""
        began = time.perf_counter()
        self._grants.pop(req).revoke()
        return time.perf_counter() - began

    def live(self, label: str, count: int, blocks: list[int]) -> tuple[float, float, float]:
        """Seconds of granting and of revoking each of ``count``, and bytes of each while all live."""
        manager, cache = self.engine.cache_manager, self.caches[label]
        before, began = _resident(), time.perf_counter()
        grants = [
            manager.grant_blocks(cache, CacheKey(1, req), blocks, lease_millis=LEASE_MILLIS)
            for req in range(count)
        ]
        granted, nbytes = time.perf_counter() - began, _resident() - before
        began = time.perf_counter()
        for grant in grants:
            grant.revoke()
        return granted / count, (time.perf_counter() - began) / count, nbytes / count


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def grants(settings: Settings, repeat: int, quick: bool, progress: Progress) -> Grants:
    """One request after another: granted, pulled by token and by key, and as an open cache."""
    settings = replace(settings, direction="pull")
    shape = SHAPE.quick() if quick else SHAPE
    progress("start two engines")
    with pair(settings, pool_for(settings, shape), GrantingEngine) as both:
        both.peer.begin("make", "cache", shape, True)
        both.own.make("cache", shape, False)
        both.peer.result()
        both.link()
        result = Grants("grants", shape.nbytes, LIVE // 10 if quick else LIVE)
        for number in range(repeat + 1):
            progress(f"request {number} of {repeat}")
            _request(both, shape, number, result if number else Grants("grants", 0, 0))
        result.problems = both.own.problems("cache", shape, shape.lists(repeat))
        progress(f"{result.live} live grants")
        result.grant_each, result.revoke_each, result.bytes_each = both.peer.call(
            "live", "cache", result.live, shape.lists(0)[0]
        )
        return result


def _request(both: Pair, shape: Shape, number: int, result: Grants) -> None:
    """The ways to read the same blocks, each once."""
    source, target = shape.lists(number)
    manager, cache = both.own.engine.cache_manager, both.own.caches["cache"]
    both.own.clear("cache")
    key = CacheKey(PEER, number)

    def timed(pull: Callable[[], None]) -> tuple[float, float]:
        began = time.perf_counter()
        pull()
        return began, time.perf_counter() - began

    blocks_key = BlocksCacheKey(PEER, model_of(shape))
    _, seconds = timed(lambda: manager.pull_blocks(blocks_key, cache, source, target))
    result.open.add(seconds)
    for by_token, series in ((True, result.by_token), (False, result.by_key)):
        granted, token = both.peer.call("grant", "cache", number, source)
        options = {"token": token} if by_token else {}
        both.peer.begin("consumed", number)
        began, seconds = timed(
            lambda options=options: manager.pull_blocks(key, cache, (), target, **options)  # type: ignore[misc]
        )
        series.add(seconds)
        result.grant.add(granted)
        if by_token:
            result.request.add(both.peer.result() - began)
        else:
            both.peer.result()
    both.peer.call("grant", "cache", number, source)
    result.revoke.add(both.peer.call("revoke", number))
