"""Functions of nodes that grant blocks, and that read them: for owners, readers and both."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from datadist import CacheKey, Grant, GrantState, LLMStatusCode
from tests import nodes
from tests.nodes import MIB, Here, Node, RemoteError, pattern

WIDTH, TENSORS, BLOCKS = 64, 6, 32
SHAPE = [BLOCKS, WIDTH]
KEY = CacheKey(1, 7)
GRANTED = [5, 2, 9, 30]
LONG = 600_000
"""ms of a lease that does not end during a test."""

Start = Callable[..., Node]


def grant(
    here: Here, blocks: Sequence[int] = GRANTED, req: int = 7, label: str = "src", **options: Any
) -> bytes:
    """Grant blocks of a cache; the token."""
    options = {"lease_millis": LONG, **options}
    made = here.live.cache_manager.grant_blocks(
        here.caches[label], CacheKey(1, req), blocks, **options
    )
    here.any.setdefault("grants", {})[req] = made
    return made.token


def grant_of(here: Here, req: int = 7) -> Grant:
    """The last grant of a request."""
    made: Grant = here.any["grants"][req]
    return made


def state(here: Here, req: int = 7) -> str:
    """The state of a grant."""
    return grant_of(here, req).state.name


def wait(here: Here, req: int = 7, millis: int = 40_000) -> str:
    """The state of a grant once it has ended."""
    return grant_of(here, req).wait(millis).name


def revoke(here: Here, req: int = 7) -> str:
    """Revoke a grant; its state."""
    return grant_of(here, req).revoke().name


def renew(here: Here, req: int = 7, millis: int | None = None) -> None:
    """Renew a grant."""
    grant_of(here, req).renew(millis)


def reuse(here: Here, blocks: Sequence[int] = GRANTED, seed: int = 77, label: str = "src") -> None:
    """Other bytes in blocks whose grant has ended."""
    for index, array in enumerate(here.arrays[label]):
        array[list(blocks)] = pattern(seed, index, array.shape)[list(blocks)]


def order(here: Here) -> list[int]:
    """The requests of grants in the order in which their leases end."""
    made = here.any["grants"].values()
    return [each.key.req_id for each in sorted(made, key=lambda each: each._record.deadline)]


def ended(here: Here, count: int) -> list[tuple[int, str]]:
    """The first ``count`` grants that end, in order: request and state."""
    manager = here.live.cache_manager
    found: list[tuple[int, str]] = []
    deadline = time.monotonic() + nodes.SECONDS
    while len(found) < count and time.monotonic() < deadline:
        select.select([manager.ended_grants_fileno()], [], [], 1)
        found += [(each.key.req_id, each.state.name) for each in manager.ended_grants()]
    return found


def pull(
    here: Here,
    dst: Sequence[int] = (0, 1, 2, 3),
    src: Sequence[int] = (),
    req: int = 7,
    **options: Any,
) -> None:
    """Pull granted blocks of cluster 1."""
    here.live.cache_manager.pull_blocks(CacheKey(1, req), here.caches["dst"], src, dst, **options)


def release(here: Here, req: int = 7, **options: Any) -> None:
    """Finish with a grant of cluster 1."""
    here.live.cache_manager.release_grant(CacheKey(1, req), **options)


def settle(here: Here) -> None:
    """Wait until each peer has handled all that this engine has sent."""
    engine = here.live._live(LLMStatusCode.LLM_FAILED)
    engine._reactor.call(lambda: None, 30)  # what waits to be sent in batches
    assert all(view.synchronize(30) for view in list(engine.views.values()))


def failed(node: Node, *args: Any, **options: Any) -> str:
    """The status of a pull that must fail."""
    with pytest.raises(RemoteError) as caught:
        node.do(pull, *args, **options)
    return str(caught.value.status)


GONE = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST.name
FINAL = [state.name for state in GrantState if state is not GrantState.GRANTED]


def check(
    node: Node, source: Sequence[int] = GRANTED, target: Sequence[int] = (0, 1, 2, 3), seed: int = 1
) -> None:
    """These blocks have arrived there, and nothing else was written."""
    for index, array in enumerate(node.do(nodes.read, "dst")):
        expected = np.zeros(SHAPE, np.int32)
        expected[list(target)] = pattern(seed, index, (BLOCKS, WIDTH))[list(source)]
        np.testing.assert_array_equal(array, expected, f"tensor {index}")


def prepare(owner: Node, *readers: Node, memory: str = "pool", **options: Any) -> None:
    """Caches for an owner and its readers."""
    owner.do(nodes.make, "src", "blocks", SHAPE, TENSORS, memory=memory, **options)
    owner.do(nodes.fill, "src", 1)
    for reader in readers:
        reader.do(nodes.make, "dst", "blocks", SHAPE, TENSORS, memory=memory, **options)
        reader.do(nodes.clear, "dst")


def link(*group: Node, name: str = "grants") -> None:
    """Link the nodes of clusters 1, 2, ..."""
    mapping = {cluster: cluster - 1 for cluster in range(1, len(group) + 1)}
    for node in group:
        node.begin(nodes.link_and_wait, name, mapping)
    for node in group:
        node.result()


def linked(start: Start, readers: int = 1, memory: str = "pool", **settings: Any) -> list[Node]:
    """An owner, cluster 1, and readers, with caches and links."""
    if memory != "pool":
        settings = {"pool": 0, **settings}
    group = [start(cluster, **settings) for cluster in range(1, readers + 2)]
    options: dict[str, Any] = {}
    if memory != "pool" and settings.get("enable_remote_cache_accessible"):
        options["remote_accessible"] = True
    prepare(*group, memory=memory, **options)
    link(*group)
    return group


__all__ = ["MIB"]
