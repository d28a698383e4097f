"""Blocks of a request that are granted to its reader."""

from __future__ import annotations

import select
from collections.abc import Callable

from two_engines import SECONDS, link, run

from datadist import Cache, CacheDesc, CacheKey, DataType, GrantState, LLMDataDist

DESC = CacheDesc(8, [64, 16, 8], DataType.DT_FLOAT16)
REQUESTS = 7, 8, 9, 10
"""The first is that of the guide, the others are those of the page on grants."""


def prompt(engine: LLMDataDist, meet: Callable[[], object]) -> None:
    """Grant the blocks of each request, and take them back."""
    manager = engine.cache_manager
    cache = manager.allocate_blocks_cache(DESC)
    free = list(range(10, 64))
    req_id = REQUESTS[0]
    # region short
    blocks = [5, 2, 9]
    grant = manager.grant_blocks(cache, CacheKey(1, req_id), blocks, readers=1, lease_millis=30_000)
    # endregion
    link(engine)

    def answer(request: int, length: int, token: bytes) -> None:
        engine.send_message(2, token)

    answer(req_id, 3, grant.token)
    granted = [grant]
    for request in REQUESTS[1:]:
        blocks = [free.pop() for _ in range(3)]
        # region grant
        grant = manager.grant_blocks(cache, CacheKey(1, request), blocks, lease_millis=30_000)
        answer(request, len(blocks), grant.token)  # over a connection of the application
        # endregion
        granted.append(grant)
    meet()
    for grant in granted:
        grant.wait(int(SECONDS * 1000))
    free_blocks = free
    # region ended
    for grant in manager.ended_grants():  # one cheap call; never blocks
        free_blocks += grant.blocks
    # endregion
    assert [each.state for each in granted] == [GrantState.CONSUMED] * len(REQUESTS)
    assert sorted(free_blocks) == sorted([5, 2, 9, *range(10, 64)])


def decoder(engine: LLMDataDist, meet: Callable[[], object]) -> None:
    """Read each of them."""
    manager = engine.cache_manager
    own_cache = manager.allocate_blocks_cache(DESC)
    link(engine)
    meet()
    tokens = _tokens(engine, len(REQUESTS))
    req_id, token = REQUESTS[0], tokens[0]
    # region short-read
    manager.pull_blocks(CacheKey(1, req_id), own_cache, dst_blocks=[0, 1, 2], token=token)
    # endregion
    request, token = REQUESTS[1], tokens[1]
    # region read
    manager.pull_blocks(CacheKey(1, request), own_cache, dst_blocks=[10, 11, 12], token=token)
    # endregion
    request = REQUESTS[2]
    # region part
    manager.pull_blocks(CacheKey(1, request), own_cache, [0, 2], [10, 12])  # the first and third
    # endregion
    manager.release_grant(CacheKey(1, request))
    in_background(engine, own_cache, REQUESTS[3], tokens[3])
    # the owner hears of releases while this engine lives


def _tokens(engine: LLMDataDist, count: int) -> list[bytes]:
    """So many messages, which come at any time after they were sent."""
    tokens: list[bytes] = []
    while len(tokens) < count:
        if not select.select([engine.messages_fileno()], [], [], SECONDS)[0]:
            raise TimeoutError(f"{len(tokens)} of {count} tokens came within {SECONDS:.0f} s")
        tokens += [message.data for message in engine.messages()]
    return tokens


def in_background(engine: LLMDataDist, own_cache: Cache, request: int, token: bytes) -> None:
    """A task that reads a grant."""
    manager = engine.cache_manager
    # region task
    task = manager.pull_blocks_async(
        CacheKey(1, request), own_cache, dst_blocks=[10, 11, 12], token=token,
        notify=b"done with the request", timeout_in_millis=5000,
    )  # fmt: skip
    task.result()
    # endregion


if __name__ == "__main__":
    run(prompt, decoder)
