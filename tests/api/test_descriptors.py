"""Descriptors of ended grants, messages and events of links: refused alike, and of one process."""

from __future__ import annotations

import os
import resource
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from datadist import CacheKey, LLMException
from tests import background, nodes
from tests.nodes import Here, Node

Start = Callable[..., Node]
NAMES = ("ended_grants", "messages", "link_events")
EVERY = pytest.mark.parametrize("name", NAMES)


def _call(here: Here, name: str) -> Callable[[], object]:
    owner = here.live.cache_manager if name.startswith("ended_grants") else here.live
    method: Callable[[], object] = getattr(owner, name)
    return method


def _number(here: Here, name: str) -> int:
    fd = _call(here, f"{name}_fileno")()
    assert isinstance(fd, int)
    return fd


def _both(here: Here, name: str) -> list[str]:
    return [background.outcome(_call(here, each)) for each in (name, f"{name}_fileno")]


@contextmanager
def _no_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def _without_descriptors(here: Here, name: str) -> tuple[str, str]:
    with _no_descriptors(), pytest.raises(LLMException) as caught:
        _number(here, name)
    return caught.value.status_code.name, str(caught.value)


@EVERY
def test_where_no_descriptor_is_left(start_node: Start, name: str) -> None:
    node = start_node(1)
    status, text = node.do(_without_descriptors, name)
    assert status == "LLM_FAILED"
    assert text.startswith("there is no descriptor for ")
    assert "ulimit" in text or "descriptors" in text
    assert node.do(_number, name) > 2


def _from_threads(here: Here, name: str) -> int:
    """How many numbers threads get that ask at the same time."""
    barrier, found = threading.Barrier(8), list[int]()

    def ask() -> None:
        barrier.wait()
        found.append(_number(here, name))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    return len(set(found))


@EVERY
def test_there_is_one_that_closes_with_the_engine(start_node: Start, name: str) -> None:
    node = start_node(1)
    assert node.do(_from_threads, name) == 1
    before, after = node.do(_ended, name)
    assert before == ["OK", "OK"]
    gone = "LLM_ENGINE_FINALIZED" if name == "ended_grants" else "RuntimeError"
    assert after == [gone, gone, "closed"]


def _ended(here: Here, name: str) -> tuple[list[str], list[str]]:
    fd, both = _number(here, name), [_call(here, each) for each in (name, f"{name}_fileno")]
    before = _both(here, name)
    here.live.finalize()
    try:
        os.fstat(fd)
    except OSError:
        state = "closed"
    else:
        state = "open"
    return before, [*map(background.outcome, both), state]


def _event(here: Here) -> None:
    """An event of each kind."""
    nodes.make(here, "src", "blocks", [4, 4], 2)
    here.live.cache_manager.grant_blocks(here.caches["src"], CacheKey(1, 7), [0]).revoke()


def _in_a_child(here: Here, name: str) -> tuple[list[str], bool]:
    """What a forked child gets; whether what waits here still does."""
    fd, both = _number(here, name), [_call(here, each) for each in (name, f"{name}_fileno")]
    _event(here)
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            found = [*map(background.outcome, both)]
            try:
                os.fstat(fd)
            except OSError:
                found.append("closed")
            os.write(writing, " ".join(found).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    text = os.read(reading, 1000).decode()
    os.close(reading)
    return text.split(), bool(select.select([fd], [], [], 0)[0])


@EVERY
def test_a_forked_child_has_none(start_node: Start, name: str) -> None:
    node = start_node(1)
    found, waits = node.do(_in_a_child, name)
    gone = "LLM_ENGINE_FINALIZED" if name == "ended_grants" else "RuntimeError"
    assert found == [gone, gone, "closed"]
    assert waits == (name == "ended_grants")


def _inside(here: Here, name: str) -> list[str]:
    """What they raise inside of another call of the same thread."""
    found: list[str] = []

    class Key(CacheKey):
        @property
        def req_id(self) -> int:
            if not found:
                found.extend(_both(here, name))
            return 7

    nodes.make(here, "src", "blocks", [4, 4], 2)
    here.live.cache_manager.grant_blocks(here.caches["src"], Key(1, 7), [0])
    return found


@EVERY
def test_inside_of_another_call_both_are_refused(start_node: Start, name: str) -> None:
    assert start_node(1).do(_inside, name) == ["RuntimeError", "RuntimeError"]
