"""The default runtime directory: one rule for all engines of a user (default_place.py)."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from datadist.control import default_place as module
from datadist.control.default_place import default_place, existing_place, obstacle, usual_place
from datadist.control.own_directory import RuntimeDirError
from datadist.control.runtime_dir import Address, RuntimeDir
from tests import nodes
from tests.nodes import Node

Start = Callable[..., Node]
STRANGER = 65_533
ENGINE = Address(1, "a" * 32)
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")


@pytest.fixture
def bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two directories in place of /tmp and /dev/shm."""
    made = [tmp_path / "tmp", tmp_path / "shm"]
    for path in made:
        path.mkdir()
        path.chmod(0o1777)
    monkeypatch.setattr(module, "bases", lambda: made)
    return made


def _occupy(path: Path, kind: str) -> None:
    if kind == "directory":
        path.mkdir()
    elif kind == "file":
        path.touch()
    else:
        path.symlink_to("/nowhere")
    os.chown(path, STRANGER, STRANGER, follow_symlinks=False)


def test_the_usual_place_is_made_and_found(bases: list[Path]) -> None:
    assert existing_place() is None
    assert obstacle() == ""
    found = default_place()
    assert found == usual_place() == bases[0] / f"datadist-{os.geteuid()}"
    assert existing_place() == default_place() == found
    assert found.stat().st_mode & 0o7777 == 0o700


@root
@pytest.mark.parametrize("kind", ["directory", "file", "symbolic link"])
def test_a_name_that_a_stranger_has_is_avoided_by_all(bases: list[Path], kind: str) -> None:
    _occupy(usual_place(), kind)
    found = default_place()
    assert found.parent == bases[0]
    assert found != usual_place()
    assert found.stat().st_uid == os.geteuid()
    assert default_place() == existing_place() == found
    assert obstacle() == f"{usual_place()} is a {kind} of user {STRANGER}"
    _occupy(found.with_name(f"{usual_place().name}.0"), kind)  # before ours, by name
    assert default_place() == found
    usual_place().unlink() if kind != "directory" else usual_place().rmdir()
    assert default_place() == found, "engines are there"


@root
def test_a_stranger_cannot_have_the_next_names_too(bases: list[Path]) -> None:
    _occupy(usual_place(), "directory")
    found = default_place()
    shutil.rmtree(found)
    _occupy(found, "directory")
    for number in range(100):
        _occupy(bases[0] / f"{usual_place().name}.{number}", "directory")
    again = default_place()
    assert again.stat().st_uid == os.geteuid()
    assert again == default_place()


@root
def test_engines_that_start_at_once_make_one_place(bases: list[Path]) -> None:
    _occupy(usual_place(), "directory")
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(default_place())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOENT])
def test_a_base_where_nothing_can_be_made_is_left_out(
    bases: list[Path], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = os.mkdir

    def mkdir(path: Path, *rest: int, **options: int) -> None:
        if bases[0] in Path(path).parents:
            raise OSError(number, os.strerror(number))
        make(path, *rest, **options)

    monkeypatch.setattr(os, "mkdir", mkdir)
    found = default_place()
    assert found.parent == bases[1]
    monkeypatch.undo()
    monkeypatch.setattr(module, "bases", lambda: bases)
    assert default_place() == found, "engines are there"
    bases.pop()
    bases[0].rmdir()
    with pytest.raises(RuntimeDirError, match=r"no runtime directory can be made .* No such file"):
        default_place()


@pytest.mark.parametrize("mode", [0o000, 0o500, 0o400, 0o755, 0o750, 0o2700])
def test_a_directory_of_ours_with_a_broken_mode_is_mended(bases: list[Path], mode: int) -> None:
    usual_place().mkdir()
    usual_place().chmod(mode)
    directory = RuntimeDir(None, "job")
    assert directory.path == usual_place()
    assert directory.path.stat().st_mode & 0o777 == 0o700
    directory.close()


def test_a_directory_that_others_could_write_to_is_not_used(bases: list[Path]) -> None:
    usual_place().mkdir()
    usual_place().chmod(0o777)
    assert default_place() != usual_place()
    assert "has mode 0777" in obstacle()


@root
def test_the_last_engine_removes_an_unusual_place(bases: list[Path]) -> None:
    _occupy(usual_place(), "directory")
    first, second = RuntimeDir(None), RuntimeDir(None, "job")
    assert first.path == second.path
    first.leave()
    assert second.place.is_dir()
    second.leave()
    assert os.listdir(bases[0]) == [usual_place().name]
    usual_place().rmdir()
    last = RuntimeDir(None)
    assert last.path == usual_place()
    last.leave()
    assert usual_place().is_dir()


@root
def test_an_engine_moves_where_the_rule_leads_by_now(bases: list[Path]) -> None:
    """Those that started at an unlucky moment come together, and leave nothing behind."""
    _occupy(usual_place(), "directory")
    directory = RuntimeDir(None)
    before, number = directory.path, directory.fd
    with directory.listen(ENGINE) as sock:
        assert directory.is_current()
        usual_place().rmdir()
        usual_place().mkdir(mode=0o700)  # by another engine of ours
        assert not directory.is_current()
        assert directory.renew([ENGINE.file_name])
        assert (directory.path, directory.fd) == (usual_place(), number)
        assert os.listdir(before) == []
        assert sock.fileno() != directory.fd
        assert not directory.renew()
    directory.close()


def _become(here: nodes.Here, uid: int, umask: int) -> None:
    """Another user, who need not be able to read our modules: an engine has imported them."""
    nodes.init(here, 9)
    nodes.finalize(here)
    here.log.clear()
    os.environ.pop("DATADIST_RUNTIME_DIR")
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    os.umask(umask)


@pytest.fixture
def uid() -> Iterator[int]:
    """A user that has nothing in /tmp."""
    chosen = 100_000 + secrets.randbelow(1 << 30)
    yield chosen
    _clear(Path("/tmp").glob(f"datadist-{chosen}*"))


def _clear(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)


@root
@pytest.mark.parametrize(
    ("kind", "umask"),
    [("directory", 0o022), ("symbolic link", 0o022), ("file", 0o077), (None, 0o777), (None, 0o277)],
)
def test_engines_of_a_user_find_each_other(
    start_node: Start, uid: int, kind: str | None, umask: int
) -> None:
    """Linked with real engines, whatever a stranger has made and whatever the umask is."""
    if kind:
        _occupy(Path(f"/tmp/datadist-{uid}"), kind)
    first, second = start_node(), start_node()
    for number, node in enumerate((first, second), start=1):
        node.do(_become, uid, umask)
        node.do(nodes.init, number)
    nodes.link_pair(first, second)
    lines = [
        line for line in first.do(nodes.log_of, "WARNING") if "use the runtime directory" in line
    ]
    assert len(lines) == (1 if kind else 0)
    if kind:
        assert f"is a {kind} of user {STRANGER}" in lines[0]
    for node in (second, first):
        node.do(nodes.finalize)
