"""What memory of an owner holds that core has given to another cache, over links of the base class."""

from __future__ import annotations

import contextlib
import gc
import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from datadist.messaging import pieces
from datadist.messaging.loop import Loop
from tests import nodes
from tests.links.test_in_flight import KEY, POOL, _drop, _link, _make, _move, _set, _values
from tests.nodes import Here, Node, RemoteError
from tests.pair_engine import PairEndpoint
from tests.waiting import until

PAIR = "tests.pair_engine:PairTransport"
FAR = 60.0
LATE_MS = 1500


def _stick(here: Here, stick: bool) -> None:
    """Let the thread of the engine of a node do nothing, or go on."""
    if not stick:
        here.any["go on"].set()
        return
    go_on = here.any["go on"] = threading.Event()
    for loop in [each for each in gc.get_objects() if isinstance(each, Loop)]:
        reached = threading.Event()
        loop.call(partial(_wait, reached, go_on))
        assert reached.wait(FAR)


def _wait(reached: threading.Event, go_on: threading.Event) -> None:
    reached.set()
    go_on.wait(FAR)


def _is_made(node: Node, label: str) -> bool:
    try:
        node.do(_make, label, "pool", 5)
    except RemoteError:
        return False
    return True


def _hold_copies(here: Here, hold: bool) -> None:
    """Large copies of the base stop in the middle, as for a page that does not come, or go on."""
    if not hold:
        here.any["go on"].set()
        return
    go_on = here.any["go on"] = threading.Event()
    inside = here.any["inside"] = threading.Event()
    copy = pieces._copy

    def held(length: int) -> Any:
        def in_parts(to: int, source: int, size: int) -> None:
            copy(size)(to, source, size // 2)
            inside.set()
            go_on.wait(FAR)
            copy(size)(to + size // 2, source + size // 2, size - size // 2)

        return in_parts if length >= 4096 else copy(length)

    pieces._copy = held


def _is_inside(here: Here) -> bool:
    return bool(here.any["inside"].wait(FAR))


def _linked(start_node: Callable[..., Node]) -> tuple[Node, Node, int]:
    """An owner, one that has pushed into its cache, which fills a third of its pool, and their link."""
    settings: dict[str, Any] = {
        "pool": POOL, "transfer_backend": PAIR, "enable_remote_cache_accessible": True,
        "sync_kv_timeout": 20_000,
    }  # fmt: skip
    owner = start_node(1, **settings)
    pusher = start_node(2, **settings)
    owner.do(_make, "theirs", "pool", 1, KEY)
    pusher.do(_make, "mine", "pool", 2)
    link = _link("link", {1: owner, 2: pusher})
    assert pusher.do(_move, "mine", "push") == "done"
    return owner, pusher, link


def _push_late(pusher: Node) -> str:
    """What a push says that has begun, and does not end: a slow machine begins it in time, too."""
    return str(pusher.do(_move, "mine", "push", millis=LATE_MS))


def _check_pages(owner: Node, go_on: Callable[[], object]) -> None:
    """The freed pages are in no other cache before the engine goes on, and unchanged afterwards."""
    owner.do(_drop, "theirs")
    made = [label for label in ("first", "second", "third") if _is_made(owner, label)]
    assert made == ["first", "second"]
    go_on()
    until(lambda: _is_made(owner, "third"))
    assert [owner.do(_values, label) for label in (*made, "third")] == [[5]] * 3


@pytest.mark.parametrize("end", ["kill", "finalize"])
def test_what_a_pusher_that_has_ended_had_sent_is_in_no_other_cache(
    start_node: Callable[..., Node], end: str
) -> None:
    """The owner's own thread is in the middle of the copy when the pusher ends."""
    owner, pusher, _ = _linked(start_node)
    owner.do(_hold_copies, True)
    _push_late(pusher)
    assert owner.do(_is_inside)
    if end == "kill":
        pusher.kill()
    else:
        pusher.do(nodes.finalize)
    nodes.said(owner, "", "cluster 2 is gone")
    _check_pages(owner, lambda: owner.do(_hold_copies, False))


def test_late_bytes_of_a_push_are_in_no_other_cache(start_node: Callable[..., Node]) -> None:
    """The owner takes them when its engine goes on: until then it keeps the pages."""
    owner, pusher, _ = _linked(start_node)
    owner.do(_stick, True)
    assert "the transfer goes on" in _push_late(pusher)
    _check_pages(owner, lambda: owner.do(_stick, False))


def _cut(here: Here) -> None:
    """The connections that the engine of a node has made."""
    for endpoint in [each for each in gc.get_objects() if isinstance(each, PairEndpoint)]:
        with contextlib.suppress(OSError):
            endpoint.sock.shutdown(socket.SHUT_RDWR)


def test_memory_is_free_again_after_the_connections_were_cut_in_a_push(
    start_node: Callable[..., Node],
) -> None:
    """At both ends, while both processes live: the pages of the pools can be given to other caches."""
    owner, pusher, link = _linked(start_node)
    owner.do(_stick, True)
    assert "the transfer goes on" in _push_late(pusher)
    pusher.do(_cut)
    owner.do(_cut)
    owner.do(_stick, False)
    pusher.do(nodes.unlink, link)
    owner.do(nodes.unlink, 1)
    for node, label in ((pusher, "mine"), (owner, "theirs")):
        node.do(_drop, label)
        for other in ("first", "second", "third"):
            until(partial(_is_made, node, other))


def test_a_link_whose_owner_did_not_confirm_is_given_up(start_node: Callable[..., Node]) -> None:
    """Core knows that it moves nothing any more; the memory comes back when the owner goes on."""
    owner, pusher, link = _linked(start_node)
    pusher.do(_set, "FORCE_SECONDS", 0.1)
    owner.do(_stick, True)
    assert "the transfer goes on" in _push_late(pusher)
    nodes.said(pusher, "WARNING", "did not settle", "has not confirmed")
    until(lambda: "given up" in (pusher.do(nodes.link_error, link) or ""))
    assert "LLM_NOT_YET_LINK" in pusher.do(_move, "mine", "push")
    owner.do(_stick, False)
    pusher.do(_drop, "mine")
    for other in ("first", "second", "third"):
        until(partial(_is_made, pusher, other))
