"""Names of a live engine that cleaners remove: seen, touched, made again (own_names.py)."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from datadist import BlocksCacheKey
from datadist.control import default_place
from datadist.control.kernel import kernel_id
from datadist.control.own_names import OwnNames
from tests import descriptors, nodes
from tests.nodes import Node, RemoteError
from tests.raw_peer import socket_of
from tests.waiting import until

Start = Callable[..., Node]
OLD = 1_000_000_000.0


def _look_often(_here: nodes.Here) -> None:
    OwnNames.look_seconds = 0.05


def _init(here: nodes.Here, place: str, cluster: int, settings: dict[str, Any]) -> None:
    os.environ["DATADIST_RUNTIME_DIR"] = place
    _look_often(here)
    nodes.init(here, cluster, **settings)


@pytest.fixture
def place() -> Iterator[Path]:
    """A runtime directory with a short path."""
    path = Path(tempfile.mkdtemp(prefix="dd-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def start(start_node: Start, place: Path) -> Callable[..., Node]:
    def begin(cluster: int, where: Path = place, **settings: object) -> Node:
        node = start_node()
        node.do(_init, str(where), cluster, settings)
        return node

    return begin


def _live_sockets() -> set[str]:
    """What a cleaner asks: paths of sockets that live."""
    return {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()}


def _remove(node: Node, place: Path, what: str) -> None:
    """While the engine does nothing, which would make names again in the middle of that."""
    with _paused(node):
        if what == "everything":
            shutil.rmtree(place)
            return
        for path in place.rglob("*"):
            if path.name.endswith(what):
                path.unlink()


@contextlib.contextmanager
def _paused(node: Node) -> Iterator[None]:
    node.pause()
    try:
        yield
    finally:
        node.resume()


def test_a_cleaner_sees_that_the_socket_lives(
    start: Callable[..., Node], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alias = place / "alias"
    (place / "real").mkdir(mode=0o700)
    alias.symlink_to(place / "real")
    start(1)
    start(2, alias / "run")
    assert str(socket_of(place, 1)) in _live_sockets()
    assert str(socket_of(place / "real" / "run", 2)) in _live_sockets()
    monkeypatch.setenv("DATADIST_JOB", "some-job")
    start(3)
    assert str(socket_of(place / ".job-some-job", 3)) in _live_sockets()


@pytest.mark.parametrize("job", ["", "some-job"])
def test_names_that_are_old_are_touched(
    start: Callable[..., Node],
    place: Path,
    job: str,
    monkeypatch: pytest.MonkeyPatch,
    free_ports: Callable[[int], list[int]],
) -> None:
    monkeypatch.setenv("DATADIST_JOB", job)
    node = start(1, listen_ip_info=f"127.0.0.1:{free_ports(1)[0]}")
    node.do(nodes.link, "pair", {1: 0, 2: 1})
    inner = place / f".job-{job}" if job else place
    names = [*inner.iterdir(), inner, place]
    assert len([each for each in inner.iterdir() if not each.name.startswith(".")]) == 3
    for path in names:
        os.utime(path, (OLD, OLD), follow_symlinks=False)
    until(lambda: all(time.time() - path.lstat().st_mtime < 600 for path in names), what=str(names))


def test_a_path_that_is_too_long_to_be_seen_is_touched_too(
    start: Callable[..., Node], place: Path
) -> None:
    long = place / ("x" * 100)
    start(1, long)
    path = next(long.glob("1-*.sock"))
    os.utime(path, (OLD, OLD))
    until(lambda: time.time() - path.stat().st_mtime < 600)


@pytest.mark.parametrize("what", [".sock", "everything"])
@pytest.mark.parametrize("how", ["table", "address"])
def test_an_engine_whose_names_were_removed_can_be_found(
    start: Callable[..., Node],
    place: Path,
    what: str,
    how: str,
    free_ports: Callable[[int], list[int]],
) -> None:
    port, settings = free_ports(1)[0], {"local_comm_res": ""} if how == "address" else {}
    first = start(1, listen_ip_info=f"127.0.0.1:{port}", **settings)
    first.do(nodes.make, "blocks", "blocks", [2, 64], 1, BlocksCacheKey(1, 0))
    before = {path.name for path in place.iterdir()}
    _remove(first, place, what)
    until(lambda: place.exists() and {path.name for path in place.iterdir()} == before)
    second = start(2, **settings)
    second.do(nodes.make, "blocks", "blocks", [2, 64], 1, BlocksCacheKey(2, 0))
    if how == "address":
        assert second.do(nodes.link_clusters, [(1, port)]) == ("LLM_SUCCESS", ["LLM_SUCCESS"])
    else:
        nodes.link_pair(first, second)
    nodes.said(first, "", "somebody removed the socket of this engine")


def test_engines_that_wait_for_each_other_meet_after_a_removal(
    start: Callable[..., Node], start_node: Start, place: Path
) -> None:
    """The one asks before the other is there, and the other while the name of the one is gone."""
    first = start_node()
    first.do(_init_that_looks_late, str(place))
    first.do(nodes.link, "pair", {1: 0, 2: 1})
    _remove(first, place, ".sock")
    second = start(2)
    comm = second.do(nodes.link, "pair", {1: 0, 2: 1})
    second.do(nodes.wait, comm)


def _init_that_looks_late(here: nodes.Here, place: str) -> None:
    os.environ["DATADIST_RUNTIME_DIR"] = place
    OwnNames.look_seconds = 2.0
    nodes.init(here, 1)


@pytest.mark.parametrize("what", [".claim", "everything"])
def test_a_claim_that_was_removed_is_made_again(
    start: Callable[..., Node], place: Path, what: str
) -> None:
    first = start(1)
    first.do(nodes.link, "pair", {1: 0, 2: 1})
    claim = place / f"1@{kernel_id()}.claim"
    _remove(first, place, what)
    until(lambda: claim.exists() and claim.stat().st_size > 0)
    with pytest.raises(RemoteError, match=f"belongs to another live engine .* pid {first.pid}"):
        start(1).do(nodes.link, "pair", {1: 0, 2: 1})
    first.do(nodes.finalize)
    assert not claim.exists()


def test_a_claim_that_was_taken_meanwhile_is_named(start: Callable[..., Node], place: Path) -> None:
    first, second = start(1), start(1)
    first.do(nodes.link, "pair", {1: 0, 2: 1})
    with _paused(first):
        (place / f"1@{kernel_id()}.claim").unlink()
        second.do(nodes.link, "pair", {1: 0, 2: 1})
    nodes.said(first, "", "another engine has taken the id", f"pid {second.pid}")


def test_an_engine_that_ends_leaves_nothing_though_names_were_made_again(
    start: Callable[..., Node], place: Path, free_ports: Callable[[int], list[int]]
) -> None:
    node = start(1, listen_ip_info=f"127.0.0.1:{free_ports(1)[0]}")
    node.do(nodes.link, "pair", {1: 0, 2: 1})
    before = {path.name for path in place.iterdir()}
    open_before = node.do(descriptors.count_in)
    for _ in range(5):
        _remove(node, place, "everything")
        until(lambda: place.exists() and {path.name for path in place.iterdir()} == before)
    assert node.do(descriptors.fall_to_in, open_before + 3)
    node.do(nodes.finalize)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("default", [False, True])
def test_without_descriptors_nothing_is_taken_for_removed(
    start: Callable[..., Node], start_node: Start, place: Path, default: bool
) -> None:
    """And an engine that has its claim can call `link` as before."""
    node = start_node()
    node.do(_init_at_default if default else _init, str(place), 1, {})
    node.do(nodes.link, "before", {1: 0, 2: 1})
    assert node.do(_link_without_descriptors, str(place)) is None
    assert not [line for line in node.do(nodes.log_of, "WARNING") if "removed" in line]
    names = [path.name for path in place.rglob("*") if not path.is_dir()]
    assert sorted(each.rpartition(".")[2] for each in names) == ["claim", "sock"]


def _init_at_default(here: nodes.Here, place: str, cluster: int, settings: dict[str, Any]) -> None:
    del os.environ["DATADIST_RUNTIME_DIR"]
    default_place.bases = lambda: [Path(place) / "tmp", Path(place) / "shm"]
    for path in default_place.bases():
        path.mkdir()
    default_place.usual_place().touch()  # in the way
    _look_often(here)
    nodes.init(here, cluster, **settings)
    default_place.usual_place().unlink()


def _link_without_descriptors(here: nodes.Here, place: str) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limit[1]))
    fds: list[int] = []
    with contextlib.suppress(OSError):
        while True:
            fds.append(os.open("/", os.O_RDONLY))
    time.sleep(0.3)  # some looks
    nodes.link(here, "without", {1: 0, 2: 1})
    for fd in fds:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert not Path(place, "shm").exists() or not os.listdir(Path(place, "shm"))


def test_a_directory_that_cannot_be_made_again_is_said_once(
    start: Callable[..., Node], place: Path
) -> None:
    node = start(1)
    with _paused(node):
        shutil.rmtree(place)
        place.write_text("in the way")
    nodes.said(node, "", "peers may not find this engine", "Not a directory")
    place.unlink()
    until(lambda: place.is_dir() and len(list(place.glob("1-*.sock"))) == 1)
    lines = [line for line in node.do(nodes.log_of) if "peers may not find" in line]
    assert len(lines) == 1
