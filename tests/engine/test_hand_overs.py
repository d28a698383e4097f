"""How often the calls that end things wait, which costs a turn of each busy thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from datadist.base.flag import Flag
from tests import nodes
from tests.nodes import Node

Start = Callable[..., Node]
CALL_THREADS = ("datadist-finalize", "datadist-calls")
TRIES = 30
MOST = {"unlink": 2, "finalize": 8}
"""Waits of the caller and of these threads; docs/guide.md names them."""


def _count_waits(here: nodes.Here, what: str, *args: int) -> list[str]:
    """Waits for events and for threads that live, and sleeps, of this thread and those of calls."""
    me, found = threading.current_thread().name, list[str]()
    wait, join, sleep = threading.Condition.wait, threading.Thread.join, time.sleep
    await_flag = Flag.wait

    def count(text: str) -> None:
        name = threading.current_thread().name
        if name == me or name in CALL_THREADS:
            found.append(f"{name}: {text}")

    def counted_flag(flag: Flag, timeout: float | None = None) -> bool:
        if not flag.is_set():
            count("flag")
        return await_flag(flag, timeout)

    def counted_wait(condition: threading.Condition, timeout: float | None = None) -> bool:
        count("wait")
        return wait(condition, timeout)

    def counted_join(thread: threading.Thread, timeout: float | None = None) -> None:
        if thread.is_alive() and timeout != 0:
            count("join")
        join(thread, timeout)

    def counted_sleep(seconds: float) -> None:
        count("sleep")
        sleep(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Condition, "wait", counted_wait)
        patch.setattr(threading.Thread, "join", counted_join)
        patch.setattr(time, "sleep", counted_sleep)
        patch.setattr(Flag, "wait", counted_flag)
        getattr(here.live, what)(*args)
    return found


@pytest.mark.parametrize("what", ["unlink", "finalize"])
@pytest.mark.parametrize("stopped", [False, True], ids=["answers", "stopped"])
def test_the_end_waits_a_few_times_only(start_node: Start, what: str, stopped: bool) -> None:
    """A thread that has done its work may be waited for as well where others run, but not always."""
    peer, node = start_node(1), start_node(2)
    for number in range(TRIES):
        if number and what == "finalize":
            node.do(nodes.init, 2)
        waits = _waits(peer, node, f"pair {number}", what, stopped)
        if len(waits) <= MOST[what]:
            return
    pytest.fail(f"{len(waits)} waits: {waits}")


def _waits(peer: Node, node: Node, name: str, what: str, stopped: bool) -> list[str]:
    _, comm_id = nodes.link_pair(peer, node, name)
    if stopped:
        peer.pause()
    try:
        found: list[str] = node.do(_count_waits, what, *([comm_id] if what == "unlink" else []))
    finally:
        peer.resume()
    return found
