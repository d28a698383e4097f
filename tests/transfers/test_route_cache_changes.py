"""What an engine learns of the owner while a small pull reads, and that the pull goes by it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from datadist import BlocksCacheKey, LLMStatusCode
from datadist.transfers.route_cache import RouteCache
from tests import core_ways, nodes
from tests.nodes import Node, RemoteError
from tests.quiet import until_quiet
from tests.waiting import until

Start = Callable[..., Node]
SHAPE, TENSORS = (8, 64), 3
KEY = BlocksCacheKey(1)
SECONDS = 20.0


@pytest.fixture
def linked(start_node: Start) -> tuple[Node, Node]:
    """An owner with a blocks cache, and a puller that knows the way to it."""
    owner, puller = start_node(1), start_node(2)
    owner.do(nodes.make, "old", "blocks", list(SHAPE), TENSORS, KEY)
    owner.do(nodes.fill, "old", 1)
    puller.do(nodes.make, "target", "blocks", list(SHAPE), TENSORS)
    nodes.link_pair(owner, puller)
    for _ in range(2):
        puller.do(nodes.pull_blocks, KEY, "target", [5], [6])
    until_quiet(owner, puller)
    return owner, puller


def _pull_slowly(here: nodes.Here, has_read: str, handled: bool) -> None:
    """Read, make a file, return from the read once a message was handled, or is being handled.

    In the second case that ends after the small pull.
    """
    (cached,) = here.live._live(LLMStatusCode.LLM_FAILED).route_cache._routes.values()
    link, session, over, pull = (
        cached.attempt.link,
        cached.session,
        threading.Event(),
        RouteCache.pull,
    )
    core_ways.take(here)
    assert link is not None
    assert session.on_message is not None
    read, handle = link.read, session.on_message
    if handled:
        over.set()

    def read_slowly(*args: Any) -> Any:
        heard = read(*args)
        Path(has_read).touch()
        until(
            lambda: cached.view.version != cached.version if handled else session.dispatching,
            SECONDS,
        )
        return heard

    def handle_late(*args: Any) -> None:
        over.wait(SECONDS)
        handle(*args)

    def pull_few(*args: Any) -> bool:
        try:
            return pull(*args)
        finally:
            over.set()

    with (
        mock.patch.object(link, "read", read_slowly),
        mock.patch.object(session, "on_message", handle_late),
        mock.patch.object(RouteCache, "pull", pull_few),
    ):
        nodes.pull_blocks(here, KEY, "target", [5], [6])


@pytest.mark.parametrize("handled", [True, False])
def test_a_key_that_is_taken_away_meanwhile_is_not_there(
    linked: tuple[Node, Node], tmp_path: Path, handled: bool
) -> None:
    owner, puller = linked
    has_read = tmp_path / "has read"
    puller.begin(_pull_slowly, str(has_read), handled)
    until(has_read.exists, SECONDS)
    owner.do(nodes.deallocate, "old")
    with pytest.raises(RemoteError) as caught:
        puller.result()
    assert caught.value.status == "LLM_KV_CACHE_NOT_EXIST"
