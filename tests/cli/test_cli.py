"""The commands, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from datadist.cli import main
from tests.nodes import table_for


def test_backends_lists_shm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backends"]) == 0
    out = capsys.readouterr().out
    assert "datadist-shm" in out
    assert "auto chooses shm" in out


def test_check_prints_the_domain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rank_table.json"
    path.write_text(table_for({1: 0, 2: 1}))
    assert main(["check", str(path), "--mapping", '{"7": 0, "9": 1}', "--backend", "shm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["RANK", "CLUSTER", "SERVER", "DEVICE"]
    assert lines[2].split() == ["1", "9", "host", "1"]


def test_check_names_every_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = json.loads(table_for({1: 0, 2: 1}))
    table["version"] = "3"
    table["server_list"][0]["device"][1]["rank_id"] = "x"
    path = tmp_path / "rank_table.json"
    path.write_text(json.dumps(table))
    assert main(["check", str(path)]) == 1
    err = capsys.readouterr().err
    assert "version:" in err
    assert "server_list[0].device[1].rank_id:" in err
    assert main(["check", str(tmp_path / "none.json")]) == 2
    assert "cannot read" in capsys.readouterr().err


@pytest.mark.parametrize("pad", [0, 5000])
def test_check_is_given_the_table_itself(pad: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", table_for({1: 0, 2: 1}) + " " * pad]) == 2
    err = capsys.readouterr().err
    assert err.endswith("it is JSON, give the name of the file that holds it, or - and the JSON "
                        "as input\n")  # fmt: skip
    assert len(err) < 400
    assert main(["check", "no\0such"]) == 2
    assert "cannot read 'no\\x00such': embedded null byte" in capsys.readouterr().err


def test_demo_verifies_every_cluster() -> None:
    command = [sys.executable, "-m", "datadist", "demo", "--clusters", "3", "--tokens", "100"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "linked with cluster 1 (rank 0), cluster 2 (rank 1) over shm" in done.stdout
    assert "every byte arrived" in done.stdout


def test_demo_says_why_it_cannot_run() -> None:
    command = [sys.executable, "-m", "datadist", "demo", "--backend", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "'nonsense' is not installed" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("devices", "shared"),
    [
        ([{"device_id": "3"}, {"device_id": "3"}], True),
        ([{"device_id": "3", "device_port": "7"}, {"device_id": "3", "device_port": 7}], True),
        ([{"device_id": "3", "device_port": "7"}, {"device_id": "3", "device_port": "8"}], False),
        ([{"device_id": "3", "device_port": "7"}, {"device_id": "3"}], True),
        ([{"device_id": "3"}, {"device_id": "3", "device_port": "7"}], True),
        ([{"device_id": "3"}, {"device_id": "4"}], False),
    ],
)
@pytest.mark.parametrize("servers", [1, 2])
def test_check_finds_two_ranks_on_one_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], devices: list[dict[str, Any]], shared: bool,
    servers: int,
) -> None:  # fmt: skip
    ranked = [{**device, "rank_id": str(rank)} for rank, device in enumerate(devices)]
    groups = [ranked] if servers == 1 else [[device] for device in ranked]
    table = {
        "version": "1.0", "status": "completed", "server_count": str(servers),
        "server_list": [{"server_id": "one", "device": group} for group in groups],
    }  # fmt: skip
    path = tmp_path / "rank_table.json"
    path.write_text(json.dumps(table))
    assert main(["check", str(path)]) == (1 if shared else 0)
    said = capsys.readouterr().err
    assert ("ranks 0 and 1 use device 3 of server one: give each a device_port" in said) is shared
