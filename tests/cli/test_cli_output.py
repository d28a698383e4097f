"""What the command line prints for programs: rank tables, JSON, versions; and how it ends quietly."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import datadist
from datadist.cli import main
from datadist.cli.tables import render
from datadist.rank_table import parse_rank_table


def _table(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str]:
    assert main(["table", *arguments]) == 0
    captured = capsys.readouterr()
    parse_rank_table(captured.out)
    return json.loads(captured.out), captured.err


def test_table_of_one_host(capsys: pytest.CaptureFixture[str]) -> None:
    table, said = _table(capsys, "--ranks", "2")
    assert said == ""
    assert table["server_count"] == "1"
    assert table["server_list"][0]["device"] == [
        {"device_id": "0", "rank_id": "0"},
        {"device_id": "1", "rank_id": "1"},
    ]


def test_table_of_several_hosts(capsys: pytest.CaptureFixture[str]) -> None:
    table, said = _table(
        capsys, "--ranks", "3", "--hosts", "10.0.0.1, 10.0.0.2", "--version", "1.2"
    )
    assert said == ""
    servers = table["server_list"]
    assert [server["host_ip"] for server in servers] == ["10.0.0.1", "10.0.0.2"]
    ranks = [[device["rank_id"] for device in server["device"]] for server in servers]
    assert ranks == [["0", "1"], ["2"]]


def test_table_says_what_names_need(capsys: pytest.CaptureFixture[str]) -> None:
    table, said = _table(capsys, "--ranks", "2", "--hosts", "one,two")
    assert "host_ip" not in table["server_list"][0]
    assert "one is no address: set DATADIST_RENDEZVOUS" in said


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--ranks", "2", "--hosts", "a,a"], "--hosts names 'a' 2 times"),
        (["--ranks", "2", "--hosts", "a,"], "--hosts has an empty name"),
        (["--ranks", "1", "--hosts", "a,b"], "--hosts names 2 hosts for 1 ranks"),
        (["--ranks", "2", "--hosts", "10.0.0.999"], "server_id of rank 0 is '10.0.0.999'"),
    ],
)
def test_table_refuses_in_words(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert text in captured.err


def test_backends_as_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATADIST_BACKEND", "shm")
    assert main(["backends", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (shm,) = [each for each in found["backends"] if each["name"] == "shm"]
    assert found["chosen"] == "shm"
    assert shm["usable"] is True
    assert "populate" in shm["options"]


def test_backends_as_json_where_none_can_be_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATADIST_BACKEND", "nothing")
    assert main(["backends", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"] is None
    assert "nothing" in found["why"]


def test_check_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ranks.json"
    main(["table", "--ranks", "2"])
    path.write_text(capsys.readouterr().out)
    assert main(["check", str(path), "--json", "--mapping", '{"5": 0, "6": 1}']) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert [(each["rank"], each["cluster"]) for each in found["ranks"]] == [(0, 5), (1, 6)]
    path.write_text('{"version": "1.0"}')
    assert main(["check", str(path), "--json"]) == 1
    assert any("server_list" in each for each in json.loads(capsys.readouterr().out)["problems"])


def test_the_last_column_is_wrapped_to_the_width() -> None:
    rows = [("shm", "processes of one host that share memory"), ("x", "")]
    lines = render(("NAME", "REASON"), rows, 30).splitlines()
    assert lines == ["NAME  REASON", "shm   processes of one host", "      that share memory", "x"]
    assert render(("NAME", "REASON"), rows).splitlines()[1] == "shm   " + rows[0][1]
    assert render(("NAME", "REASON"), rows, 12).splitlines() == [
        "NAME: shm", "REASON:", "  processes", "  of one", "  host that", "  share", "  memory",
        "", "NAME: x",
    ]  # fmt: skip


def test_a_last_column_that_would_be_narrow_stands_under_its_row() -> None:
    rows = [("shm", "datadist-shm", "12", "shared memory of this host"), ("x", "y", "-", "")]
    lines = render(("NAME", "DISTRIBUTION", "NUMBER", "REASON"), rows, 32).splitlines()
    assert lines == [
        "NAME  DISTRIBUTION  NUMBER", "shm   datadist-shm      12", "      shared memory of this host",
        "x     y                  -",
    ]  # fmt: skip


def test_a_closed_pipe_ends_quietly() -> None:
    command = f"{sys.executable} -m datadist backends | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stderr == ""
    assert done.stdout == "141\n"


def test_ctrl_c_ends_quietly() -> None:
    code = (
        "import os, signal, sys; from datadist import cli; from datadist.cli import check\n"
        "check.run = lambda args: os.kill(os.getpid(), signal.SIGINT) or 0\n"
        "sys.exit(cli.main(['check', '-']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_the_version_is_that_of_the_installation(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"datadist {datadist.__version__}\n"
    assert datadist.__version__.startswith("0.")
    unknown = "nothing"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        getattr(datadist, unknown)
