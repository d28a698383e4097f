"""`datadist top`, as a user runs it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

from datadist import CacheKeyByIdAndIndex
from datadist.cli import main, top
from datadist.cli.top import screen
from datadist.diagnosis.activity import Activity, LinkActivity, Look, Rates, activities
from tests import nodes
from tests.nodes import Node

Start = Callable[..., Node]


@pytest.fixture
def linked(
    start_node: Start, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Node, Node]:
    """An owner, and a puller that has pulled, where the command looks and waits for answers."""
    monkeypatch.setattr(top, "ANSWER_SECONDS", nodes.SECONDS)
    monkeypatch.setenv("DATADIST_RUNTIME_DIR", str(runtime_dir))
    owner, puller = start_node(1), start_node(2)
    for node in (owner, puller):
        node.do(nodes.make, "c", "cache", [3, 40], 4)
    nodes.link_pair(owner, puller)
    puller.do(nodes.pull_cache, CacheKeyByIdAndIndex(1, 1, 1), "c")
    return owner, puller


def test_once_shows_engines_and_links(
    linked: tuple[Node, Node], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", "--once", "--interval", "0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"datadist top, [\d:]{8}: 2 engines, 2 links, 2 OK", lines[0])
    pids = [str(node.pid) for node in linked]
    assert [line.split()[:2] for line in lines[4:6]] == [["1", pids[0]], ["2", pids[1]]]
    assert [line.split()[:5] for line in lines[8:10]] == [
        ["pair", "1", "2", "shm", "OK"], ["pair", "2", "1", "shm", "OK"],
    ]  # fmt: skip
    assert max(map(len, lines)) <= 80


def test_json_has_the_whole_report(
    linked: tuple[Node, Node], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", "--json", "--count", "2", "--interval", "0.1"]) == 0
    looks = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(looks) == 2
    puller = looks[1]["engines"][1]
    assert puller["cluster_id"] == 2
    assert puller["report"]["total"]["pull"]["operations"] == 1
    assert puller["links"][0]["state"] == "OK"


def test_nobody_is_there(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DATADIST_RUNTIME_DIR", str(runtime_dir))
    assert main(["top", "--once", "--interval", "0.1"]) == 0
    assert "no engine of this user runs on this host" in capsys.readouterr().out


def test_a_directory_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "open"
    place.mkdir()
    place.chmod(0o777)
    monkeypatch.setenv("DATADIST_RUNTIME_DIR", str(place))
    assert main(["top", "--once"]) == 1
    assert str(place) in capsys.readouterr().err


@pytest.mark.parametrize("interval", ["0", "x", "nan", "1e9"])
def test_intervals_are_checked(interval: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["top", "--interval", interval])
    assert "is not a number of seconds from 0.1 to 3600" in capsys.readouterr().err


def _read_all(terminal: int) -> str:
    """What was written to a terminal whose other side is closed: the kernel then answers EIO."""
    printed = b""
    with open(terminal, "rb", buffering=0) as file, contextlib.suppress(OSError):
        while chunk := file.read(1 << 16):
            printed += chunk
    return printed.decode()


PATIENT = f"""
import sys
from datadist.cli import main, top
top.ANSWER_SECONDS = {nodes.SECONDS}
sys.exit(main(sys.argv[1:]))
"""
"""The command, which waits longer for answers: who gives none is shown in another way."""


def test_a_terminal_is_drawn_anew(linked: tuple[Node, Node]) -> None:
    """As many lines as it has, each cut where it ends; variables of the shell do not say where."""
    ours, theirs = pty.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 5, 40, 0, 0))
        done = subprocess.run(
            [sys.executable, "-c", PATIENT, "top", "--count", "2", "--interval", "0.1"],
            stdin=subprocess.DEVNULL, stdout=theirs, stderr=subprocess.PIPE, text=True, timeout=120,
            env={**os.environ, "COLUMNS": "80", "LINES": "24"}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    finally:
        os.close(theirs)
        printed = _read_all(ours)
    looks = printed.split("\x1b[H")[1:]
    assert len(looks) == 2
    for look in looks:
        lines = re.sub(r"\x1b\[[0-9;]*[JKm]", "", look).splitlines()
        assert len(lines) == 4
        assert "more lines" in lines[-1]
        assert max(map(len, lines)) <= 40


def _link(peer: int, state: str, moved: float) -> LinkActivity:
    return LinkActivity("serving", peer, "shm", state, "", Rates(moved, 0, 3, 0.001), 0)


def test_what_is_urgent_comes_first() -> None:
    links = [_link(2, "OK", 0), _link(3, "OK", 5e9), _link(4, "FAILED", 0), _link(5, "OK", 1)]
    busy = Activity("", 1, 77, "a.py", "shm", Rates(), "-", 0, links, [], {})
    silent = Activity("", 2, 78, "b.py", "-", Rates(), "-", 0, [], ["it is stopped"], None)
    lines = screen([busy, silent])
    assert lines[0].endswith(": 2 engines, 4 links, 3 OK, 1 silent")
    assert [line.split()[3] for line in lines[4:6]] == ["shm", "silent"]
    assert lines[7] == "it is stopped"
    shown = [line.split() for line in lines[10:]]
    assert [(line[2], line[5]) for line in shown] == [
        ("4", "-"), ("3", "5.00"), ("5", "<.01"), ("2", "-"),
    ]  # fmt: skip
    assert max(map(len, lines)) <= 80


def test_nothing_breaks_without_engines() -> None:
    assert screen(activities(Look([]), Look([])))[3].startswith("no engine")
