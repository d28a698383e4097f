"""What a sweep leaves: names of other kernels, and of engines that just start (stale_files.py)."""

from __future__ import annotations

import ctypes
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from datadist.control import own_directory
from datadist.control.kernel import BOOT_ID, UNKNOWN, kernel_id
from datadist.control.runtime_dir import Address, RuntimeDir
from datadist.control.stale_files import remove_stale_files
from tests import hosts, nodes
from tests.nodes import Node

Start = Callable[..., Node]
CLONE_NEWNS = 0x00020000
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
OTHER = "0badcafe"
OURS = Address(1, "a" * 32)
DEAD = "d" * 32
libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def directory(runtime_dir: Path) -> Iterator[RuntimeDir]:
    made = RuntimeDir(runtime_dir)
    yield made
    made.close()


def _leave_everything(directory: RuntimeDir, kernel: str) -> set[str]:
    """What a crashed engine can leave; all of it is old."""
    engine = Address(1, DEAD, kernel)
    directory.listen(engine).close()
    names = [f"1@{kernel}.claim", f"{engine.full_name}.refused", f".{engine.full_name}-26000"]
    for name in names:
        (directory.place / name).touch()
    names.append(f"{kernel}-4026531840@127.0.0.1:26000")
    (directory.place / names[-1]).symlink_to("1-gone.sock")
    found = {*names, engine.file_name}
    for name in found:
        os.utime(name, (1.0, 1.0), dir_fd=directory.fd, follow_symlinks=False)
    return found


def test_names_of_our_kernel_go(directory: RuntimeDir) -> None:
    _leave_everything(directory, kernel_id())
    for _ in range(2):  # what points to a socket goes after the socket
        remove_stale_files(directory)
    assert os.listdir(directory.place) == []


@pytest.mark.parametrize("kernel", [OTHER, UNKNOWN])
def test_names_of_another_kernel_stay_and_mean_nobody(directory: RuntimeDir, kernel: str) -> None:
    left = _leave_everything(directory, kernel)
    for _ in range(2):
        remove_stale_files(directory)
    engine = Address(1, DEAD, kernel)
    assert directory.connect(engine) is None
    assert set(os.listdir(directory.place)) == left
    assert list(directory.engines()) == []
    assert directory.listening(26000) == []


def test_where_the_kernel_is_unknown_nothing_is_removed(
    directory: RuntimeDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("kernel", "runtime_dir"):
        monkeypatch.setattr(f"datadist.control.{module}.kernel_id", lambda: UNKNOWN)
    left = _leave_everything(directory, UNKNOWN)
    remove_stale_files(directory)
    assert set(os.listdir(directory.place)) == left
    assert list(directory.engines()) == [Address(1, DEAD, UNKNOWN)], "it can be tried"


def test_the_name_of_an_engine_that_does_not_listen_yet_stays(directory: RuntimeDir) -> None:
    """Between bind and listen an engine holds the lock, and a connection to it is refused."""
    with socket.socket(socket.AF_UNIX) as starting:
        with directory.locked():
            starting.bind(directory.socket_path(OURS))
            assert directory.connect(OURS) is None
            assert directory.has(OURS.file_name)
            starting.listen()
        found = directory.connect(OURS)
        assert found is not None
        found.close()


def test_a_lock_that_is_not_had_removes_nothing(
    directory: RuntimeDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = _leave_everything(directory, kernel_id())
    monkeypatch.setattr("datadist.control.runtime_dir.LOCK_SECONDS", 0.0)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with own_directory.locked(directory.fd) as mine:
            assert mine
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(30)
        remove_stale_files(directory)
        assert set(os.listdir(directory.place)) == left
    finally:
        done.set()
        thread.join()


def _be_another_kernel(_here: nodes.Here, boot_id: str) -> None:
    """See another boot id, in a mount namespace of our own."""
    _check(libc.unshare(CLONE_NEWNS))
    _check(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))
    _check(libc.mount(boot_id.encode(), str(BOOT_ID).encode(), None, MS_BIND, None))
    kernel_id.cache_clear()


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@hosts.needed
def test_engines_of_two_kernels_leave_each_other_alone(
    start_node: Start, runtime_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "boot_id").write_text(f"{OTHER}-1111-2222-3333-444444444444\n")
    far, near = start_node(), start_node()
    far.do(_be_another_kernel, str(tmp_path / "boot_id"))
    far.do(nodes.init, 1)
    far.do(nodes.link, "pair", {1: 0, 2: 1})
    names = {path.name for path in runtime_dir.iterdir()}
    assert all(OTHER in name for name in names)
    assert len(names) == 2, "socket and claim"
    far.kill()
    near.do(nodes.init, 1)
    near.do(nodes.link, "pair", {1: 0, 2: 1})
    assert names < {path.name for path in runtime_dir.iterdir()}
    near.do(nodes.finalize)
    assert {path.name for path in runtime_dir.iterdir()} == names


def test_a_claim_that_is_removed_as_it_is_taken_is_taken_anew(
    start_node: Start, runtime_dir: Path
) -> None:
    """Also where somebody removes files without holding the lock of the directory."""
    node = start_node(1)
    stop = threading.Event()

    def remove_always() -> None:
        while not stop.is_set():
            (runtime_dir / f"1@{kernel_id()}.claim").unlink(missing_ok=True)
            time.sleep(0.0005)

    thread = threading.Thread(target=remove_always)
    thread.start()
    try:
        node.do(nodes.link, "pair", {1: 0, 2: 1})
    finally:
        stop.set()
        thread.join()
