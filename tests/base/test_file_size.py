"""Files beyond `ulimit -f`: an error, and never the signal that ends a process (file_size.py)."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable

import pytest

from datadist.base.file_size import LEAST, check_size, set_size
from tests import nodes
from tests.nodes import Node, RemoteError

Start = Callable[..., Node]
MIB = 1 << 20


def _limit(_here: nodes.Here, size: int) -> None:
    """A program that has not told the kernel to ignore the signal, as Python does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_size_within_the_limit_is_set() -> None:
    fd = os.memfd_create("small")
    set_size(fd, LEAST)
    assert os.fstat(fd).st_size == LEAST
    os.close(fd)


def _grow(_here: nodes.Here, limit: int, size: int) -> tuple[int, str, int]:
    _limit(_here, limit)
    fd = os.memfd_create("large")
    number, text = 0, ""
    try:
        set_size(fd, size)
    except OSError as error:
        number, text = error.errno or 0, str(error)
    return number, text, os.fstat(fd).st_size


@pytest.mark.parametrize("size", [LEAST, LEAST + 1, 1 << 40])
def test_a_size_beyond_the_limit_is_an_error(start_node: Start, size: int) -> None:
    number, text, got = start_node().do(_grow, LEAST, size)
    assert (number, got) == ((0, size) if size == LEAST else (errno.EFBIG, 0))
    assert size == LEAST or f"{LEAST} bytes at most, and {size} are needed" in text


def test_the_limit_is_asked_each_time(start_node: Start) -> None:
    node = start_node()
    node.do(_limit, MIB)
    node.do(_check, MIB)
    node.do(_limit, MIB // 2)
    with pytest.raises(RemoteError, match="ulimit -f"):
        node.do(_check, MIB)


def _check(_here: nodes.Here, size: int) -> None:
    check_size(size)


@pytest.mark.parametrize(
    ("limit", "status"), [(0, "LLM_FAILED"), (LEAST - 1, "LLM_FAILED"), (MIB, "LLM_OUT_OF_MEMORY")]
)
def test_an_engine_that_needs_larger_files_is_refused(
    start_node: Start, limit: int, status: str
) -> None:
    node = start_node()
    node.do(_limit, limit)
    with pytest.raises(RemoteError, match="ulimit -f") as caught:
        node.do(nodes.init, 1, 8 * MIB)
    assert caught.value.status == status
    assert f"{limit} bytes" in caught.value.text
    assert node.is_alive
    node.do(_limit, resource.RLIM_INFINITY)
    node.do(nodes.init, 1, 8 * MIB)


@pytest.mark.parametrize("when", ["before init", "before the link"])
def test_engines_whose_files_are_within_the_limit_work(start_node: Start, when: str) -> None:
    """Both write into the other's memory: each link has files of its own."""
    first, second = start_node(), start_node()
    for number, node in enumerate((first, second), start=1):
        if when == "before init":
            node.do(_limit, 8 * MIB)
        node.do(nodes.init, number, 8 * MIB, enable_remote_cache_accessible=True)
        if when == "before the link":
            node.do(_limit, LEAST)
    nodes.link_pair(first, second)


def test_a_limit_that_is_lowered_after_init_fails_links_in_words(start_node: Start) -> None:
    first, second = start_node(), start_node()
    for number, node in enumerate((first, second), start=1):
        node.do(nodes.init, number, 8 * MIB, enable_remote_cache_accessible=True)
        node.do(_limit, 0)
    with pytest.raises(RemoteError, match=r"cannot claim cluster id 2 .*ulimit -f") as caught:
        second.do(nodes.link, "pair", {1: 0, 2: 1})
    assert caught.value.status == "LLM_FAILED"


def test_a_limit_that_is_lowered_between_links_fails_the_next_in_words(start_node: Start) -> None:
    first, second = start_node(), start_node()
    for number, node in enumerate((first, second), start=1):
        node.do(nodes.init, number, 8 * MIB, enable_remote_cache_accessible=True)
    for name in ("one", "two"):
        comm = first.do(nodes.link, name, {1: 0, 2: 1})
        second.do(nodes.link, name, {1: 0, 2: 1})
        if name == "one":
            first.do(nodes.wait, comm)
            first.do(_limit, 0)
    with pytest.raises(RemoteError):
        first.do(nodes.wait, comm)
    assert "ulimit -f" in first.do(nodes.link_error, comm)
