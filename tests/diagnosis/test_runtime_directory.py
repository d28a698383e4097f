"""What `datadist doctor` says of the runtime directory (runtime_directory.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from datadist.control import default_place
from datadist.control.runtime_dir import Address, RuntimeDir
from datadist.diagnosis import Finding, Level
from datadist.diagnosis.runtime_directory import findings
from tests import hosts

STRANGER = 65_533
CHECK = """
import subprocess, sys
from datadist.diagnosis.runtime_directory import examine
subprocess.run(["sh", "-ec", sys.argv[1]], check=True)  # it may hide the files of this program
for each in examine():
    print(each.level.name, each.name, each.found, sep="; ")
"""


def _by_name(path: Path | None) -> dict[str, Finding]:
    return {each.name: each for each in findings(path)}


def _in_namespace(command: str) -> str:
    """What is said in a mount namespace in which a shell command has been run."""
    environ = {name: text for name, text in os.environ.items() if name != "DATADIST_RUNTIME_DIR"}
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", CHECK, command],
        capture_output=True, text=True, timeout=60, check=False, env=environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@hosts.needed
@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("mount -t tmpfs tmpfs /tmp", ["OK; runtime directory; /tmp/datadist-{uid} can be made"]),
        (
            "mount -t tmpfs -o noexec,nodev,nosuid tmpfs /tmp",
            ["OK; runtime directory; /tmp/datadist-{uid} can be made"],
        ),
        (
            "mount -t tmpfs -o ro tmpfs /tmp; mount -t tmpfs tmpfs /dev/shm",
            [
                "OK; runtime directory; /dev/shm",
                "NOTE; default runtime directory; /tmp cannot be written",
            ],
        ),
        (
            "mount -t tmpfs -o nr_inodes=1 tmpfs /tmp; mount -t tmpfs tmpfs /dev/shm",
            ["OK; runtime directory; /dev/shm", "NOTE; default runtime directory; /tmp is full"],
        ),
        (
            "mount -t tmpfs -o nr_inodes=2 tmpfs /tmp; mkdir -m 700 /tmp/datadist-{uid}",
            ["PROBLEM; runtime directory; no name can be made in /tmp", "No space left"],
        ),
        (
            "mount -t tmpfs -o size=4k tmpfs /tmp; mkdir -m 700 /tmp/datadist-{uid}; "
            "head -c 4096 /dev/zero > /tmp/file",
            ["NOTE; runtime directory; the file system of /tmp/datadist-{uid} is full"],
        ),
        (
            "mount -t tmpfs tmpfs /tmp; mkdir /tmp/datadist-{uid}; chown 65533 /tmp/datadist-{uid}",
            ["OK; runtime directory; /tmp/datadist-{uid}.", "is a directory of user 65533"],
        ),
        (
            "for each in /tmp /dev/shm; do mount -t tmpfs -o ro tmpfs $each; done; "
            "test ! -d /run/user/{uid} || mount -t tmpfs -o ro tmpfs /run/user/{uid}",
            [
                "PROBLEM; runtime directory; no runtime directory can be made",
                "Read-only file system",
            ],
        ),
    ],
)
def test_conditions_of_the_default_place(command: str, expected: list[str]) -> None:
    uid = os.geteuid()
    said = _in_namespace(command.replace("{uid}", str(uid)))
    for text in expected:
        assert text.replace("{uid}", str(uid)) in said


def test_looking_at_the_default_place_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(default_place, "bases", lambda: [tmp_path])
    default_place.usual_place().write_text("in the way")
    found = _by_name(None)
    assert found["runtime directory"].level is Level.OK
    assert "is a file of user" in found["default runtime directory"].found
    assert os.listdir(tmp_path) == [default_place.usual_place().name]


def test_a_path_whose_sockets_cleaners_cannot_see_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATADIST_JOB", "")
    assert _by_name(tmp_path / ("x" * 90))["socket paths"].level is Level.NOTE
    short = Path("/tmp") / f"datadist-doctor-{os.getpid()}"
    assert "socket paths" not in _by_name(short)
    monkeypatch.setenv("DATADIST_JOB", "j" * 64)
    assert _by_name(short)["socket paths"].level is Level.NOTE
    assert not short.exists()


def test_names_of_other_kernels_are_noted(runtime_dir: Path) -> None:
    assert "engines of other kernels" not in _by_name(runtime_dir)
    directory = RuntimeDir(runtime_dir)
    directory.listen(Address(1, "a" * 32, "0badcafe")).close()
    directory.close()
    assert _by_name(runtime_dir)["engines of other kernels"].found.startswith("1 listed in ")
    assert "engines listed: none" in _by_name(runtime_dir)["runtime directory"].found
