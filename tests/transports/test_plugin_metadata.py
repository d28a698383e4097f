"""Metadata of installed packages that is damaged or missing, and transports named without it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datadist.cli import main
from datadist.diagnosis import Level, installed
from datadist.transport import ENTRY_POINT_GROUP
from datadist.transports import loader
from datadist.transports.loader import BackendError, choose_backend, list_backends
from datadist.transports.plugin_metadata import named_directly, scan

HEADER = "Metadata-Version: 2.1\nName: unrelated\nVersion: 1.0\n"
POINTS = "[console_scripts]\nunrelated = unrelated:main\n"
OURS = f"[{ENTRY_POINT_GROUP}]\n"
DAMAGE: dict[str, tuple[str, dict[str, bytes], str]] = {
    "no equals sign": ("unrelated-1.0.dist-info", {"entry_points.txt": b"[a]\nb\n"}, "no '='"),
    "no equals sign, ours": (
        "unrelated-1.0.dist-info", {"entry_points.txt": f"{OURS}shm\n".encode()}, "no '='",
    ),
    "not UTF-8": ("unrelated-1.0.dist-info", {"entry_points.txt": b"[a]\nb = \xff:c\n"}, "not UTF-8"),
    "binary": ("unrelated-1.0.dist-info", {"entry_points.txt": bytes(range(256))}, "not UTF-8"),
    "no target": (
        "unrelated-1.0.dist-info", {"entry_points.txt": f"{OURS}x =\n".encode()}, "module:Class",
    ),
    "no metadata": ("unrelated-1.0.dist-info", {"METADATA": b""}, "no METADATA"),
    "no metadata, no version in the name": ("unrelated.dist-info", {"METADATA": b""}, "no METADATA"),
    "no name": ("unrelated.dist-info", {"METADATA": b"Version: 1.0\n"}, "no Name"),
    "an empty name": ("unrelated-1.0.dist-info", {"METADATA": b"Name:\nVersion: 1\n"}, "no Name"),
    "metadata not UTF-8": ("unrelated.dist-info", {"METADATA": b"Name: \xe4\n"}, "not UTF-8"),
    "no version of a plugin": (
        "unrelated.dist-info",
        {"METADATA": b"Name: a\n", "entry_points.txt": f"{OURS}x = a:B\n".encode()},
        "no Version",
    ),
    "an old egg": ("unrelated.egg-info", {"METADATA": b"", "entry_points.txt": b""}, "no METADATA"),
}  # fmt: skip


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts metadata of a package on ``sys.path``."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(loader, "_reported", set())

    def write(name: str, files: dict[str, bytes]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for each, data in {
            "METADATA": HEADER.encode(), "entry_points.txt": POINTS.encode(), **files,
        }.items():  # fmt: skip
            if data:
                (folder / each).write_bytes(data)
        return folder

    return write


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_metadata_is_skipped_and_named_once(
    kind: str, put: Callable[..., Path], caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    name, files, words = DAMAGE[kind]
    folder = put(name, files)
    with caplog.at_level(logging.WARNING, "datadist.backend"):
        choice = choose_backend("shm", {})
        choose_backend(None, {})
    assert choice.name == "shm"
    (line,) = [text for text in caplog.messages if str(folder) in text]
    assert words in line
    assert main(["backends"]) == 0
    (line,) = [text for text in capsys.readouterr().out.splitlines() if str(folder) in text]
    assert words in line
    (finding,) = [each for each in installed.examine() if str(folder) in each.found]
    assert finding.level is Level.NOTE
    assert words in finding.found


def test_a_damaged_plugin_is_named_where_it_is_missed(
    put: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put("acme-1.0.dist-info", {"entry_points.txt": f"{OURS}acme acme:Acme\n".encode()})
    with pytest.raises(BackendError, match="'acme' is not installed") as caught:
        choose_backend("acme", {})
    assert str(folder) in str(caught.value)
    monkeypatch.setattr(sys, "path", [str(folder.parent)])
    with pytest.raises(BackendError, match="no transport is installed") as caught:
        choose_backend(None, {})
    assert str(folder) in str(caught.value)


def test_a_file_that_cannot_be_read_is_no_reason_to_stop(put: Callable[..., Path]) -> None:
    folder = put("unrelated-1.0.dist-info", {"entry_points.txt": b""})
    (folder / "entry_points.txt").symlink_to("entry_points.txt")
    assert any(str(folder) == each.place for each in scan().broken)
    assert "shm" in [each.name for each in list_backends()]


def test_a_finder_that_raises_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    class Finder:
        @staticmethod
        def find_distributions(_context: object) -> Iterator[object]:
            raise OSError("no such archive")

        find_spec = staticmethod(lambda *_: None)

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    found = scan()
    assert "shm" in [each.name for each in found.backends]
    assert {each.problem for each in found.broken} == {"OSError: no such archive"}


@pytest.mark.parametrize("part", [b"bytes", None, 3, "a\0b"])
def test_what_is_no_path_hides_no_other_path(monkeypatch: pytest.MonkeyPatch, part: object) -> None:
    monkeypatch.setattr(sys, "path", [part, *sys.path])
    found = scan()
    assert "shm" in [each.name for each in found.backends]
    assert [each for each in found.broken if repr(part) in each.place]


def test_a_name_that_is_no_text_can_be_printed(put: Callable[..., Path]) -> None:
    put(os.fsdecode(b"\xff-1.0.dist-info"), {"METADATA": b""})
    (broken,) = [each for each in scan().broken if "xff-1.0" in each.place]
    assert str(broken).encode()


@settings(max_examples=20)
@given(data=st.binary(max_size=60), where=st.sampled_from(["METADATA", "entry_points.txt"]))
def test_no_bytes_raise(data: bytes, where: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("path")
    info = folder / "some-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(HEADER)
    (info / where).write_bytes(data)
    with ExitStack() as stack:
        sys.path.insert(0, str(folder))
        stack.callback(sys.path.remove, str(folder))
        assert "shm" in [each.name for each in scan().backends]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("datadist_shm:ShmTransport", "shm"),
        ("acme.transports:Outer.Inner", "acme"),
        ("acme : Acme", "acme"),
        ("shm", None), ("auto", None), ("acme:", None), (":Acme", None), ("a b:C", None), ("1a:B", None),
    ],
)  # fmt: skip
def test_names_of_classes(text: str, name: str | None) -> None:
    found = named_directly(text)
    assert (found and found.name) == name


def test_programs_start_beside_every_damage(tmp_path: Path, runtime_dir: Path) -> None:
    """Also what we import reads metadata: pydantic does when the first model is defined."""
    for number, (name, files, _) in enumerate(DAMAGE.values()):
        folder = tmp_path / name.replace("unrelated", f"unrelated{number}")
        folder.mkdir()
        for each, data in {"METADATA": HEADER.encode(), **files}.items():
            if data:
                (folder / each).write_bytes(data)
    environ = {
        **os.environ, "PYTHONPATH": str(tmp_path), "DATADIST_RUNTIME_DIR": str(runtime_dir),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", PROGRAM, "shm"], capture_output=True, text=True,
                          check=False, env=environ)  # fmt: skip
    assert (done.stdout, done.returncode) == ("shm\n", 0), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count(str(tmp_path)) == len(DAMAGE)
    for command in ("--version", "backends", "doctor", "check --help"):
        done = subprocess.run([sys.executable, "-m", "datadist", *command.split()], env=environ,
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert (done.stderr, done.returncode) == ("", 0), done.stdout


PROGRAM = """
import sys
from datadist import *
config = LLMConfig()
config.enable_cache_manager = True
config.mem_pool_cfg = '{"memory_size": 1048576}'
if sys.argv[1:]:
    config.transfer_backend = sys.argv[1]
engine = LLMDataDist(LLMRole.MIX, 1)
engine.init(config.generate_options())
print(engine.backend)
engine.finalize()
"""


@pytest.fixture
def bare(tmp_path: Path, runtime_dir: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program whose packages have no metadata, as in an archive or a frozen program."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for each in Path(numpy.__file__).parents[1].iterdir():
        if each.suffix not in (".dist-info", ".egg-info", ".pth"):
            (folder / each.name).symlink_to(each)
    for name in ("datadist", "datadist_shm"):
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(Path(sys.modules[name].__file__ or "").parent)

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-S", *arguments], capture_output=True, text=True, check=False,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder), "DATADIST_RUNTIME_DIR": str(runtime_dir)},
        )  # fmt: skip

    return start


def test_without_metadata_the_error_says_what_to_do(
    bare: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    for arguments in ((), ("shm",)):
        done = bare("-c", PROGRAM, *arguments)
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("datadist.status.LLMException: "), done.stderr
        assert "datadist_shm can be imported, but the metadata of no installed package" in last
        assert "name its class, transfer_backend or DATADIST_BACKEND = " in last
        assert "datadist_shm:ShmTransport" in last


def test_a_class_can_be_named_without_metadata(
    bare: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = bare("-c", PROGRAM, "datadist_shm:ShmTransport")
    assert (done.stdout, done.stderr, done.returncode) == ("shm\n", "", 0)
    done = bare("-c", PROGRAM, "datadist_shm:NoTransport")
    assert "has no attribute 'NoTransport'" in done.stderr.splitlines()[-1]
    done = bare("-c", PROGRAM, "nowhere_here:Transport")
    assert "No folder of sys.path has nowhere_here" in done.stderr.splitlines()[-1]
    doctor = bare("-m", "datadist", "doctor", "--backend", "datadist_shm:ShmTransport")
    assert doctor.stdout.splitlines()[-1].startswith("shm: works here"), (
        doctor.stdout + doctor.stderr
    )
    assert bare("-m", "datadist", "doctor", "--backend", "datadist_shm:NoTransport").returncode == 1
    version = bare("-m", "datadist", "--version")
    assert "no package metadata" in version.stdout
