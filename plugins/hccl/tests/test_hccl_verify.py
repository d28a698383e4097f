"""The checklist for people with NPUs, on the simulator."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hccl_sim
import pytest
from datadist_hccl.libraries import OVERRIDE
from datadist_hccl.verify import checks
from datadist_hccl.verify.command import _parser
from datadist_hccl.verify.facts import driver

from datadist.transport import TransferTimeout

TITLES = (
    "libraries and device", "link 'first'", "pull: scattered", "push: scattered", "exchange of blobs",
    "pull: rates", "push: rates", "timeout", "link 'second'", "after the timeout", "fence",
    "memory that is not the device's: refused: pinned, ordinary, unmapped",
)  # fmt: skip


def _environ(sim_directory: str, **settings: str) -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if k != OVERRIDE}
    return own | hccl_sim.environment(sim_directory, **settings)


def _verify(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "datadist_hccl.verify", "--mib", "16", *arguments],
        env=environ, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("soc", "addresses"),
    [
        ("Ascend910B3", ()),
        ("Ascend910B3", ("--device-ips", "192.168.0.1,192.168.0.2")),
        ("Ascend910_9391", ()),
    ],
)
def test_one_machine(sim_directory: str, soc: str, addresses: tuple[str, ...]) -> None:
    done = _verify(_environ(sim_directory, soc=soc), "--devices", "2,5", *addresses)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in (0, 1):
        lines = [x for x in done.stdout.splitlines() if x.startswith(f"[rank {rank}]")]
        for title in TITLES:
            assert any(f"- [x] {title}" in line for line in lines), (rank, title)
        assert any("- [x] pull from host memory" in line for line in lines) is bool(addresses)
        assert lines[-1].endswith("all checks passed")
    assert "a write failed after" in done.stdout
    assert "- [x] a rank that never comes" in done.stdout
    assert "- driver: unknown" in done.stdout
    assert f"of 35 functions, loaded from {hccl_sim.build()}" in done.stdout
    assert "- HcclGetCommConfigCapability: 12 " in done.stdout


def test_two_machines(sim_directory: str, tmp_path: Path) -> None:
    table = tmp_path / "ranks.json"
    table.write_text(hccl_sim.table(2))
    environ = _environ(sim_directory)
    arguments = [sys.executable, "-m", "datadist_hccl.verify", "--mib", "16", "--table", str(table)]
    with subprocess.Popen(
        [*arguments, "--rank", "1"], env=environ, stdout=subprocess.PIPE
    ) as other:
        done = _verify(environ, "--table", str(table), "--rank", "0")
        output, _ = other.communicate(timeout=60)
    assert (done.returncode, other.returncode) == (0, 0), done.stdout + output.decode()


def test_the_release_of_the_driver(tmp_path: Path) -> None:
    file = tmp_path / "version.info"
    assert "No such file" in driver(file)
    file.write_text("package_version=1\nVersion=25.5.0\n")
    assert driver(file) == "25.5.0"
    file.write_text("")
    assert driver(file) == f"unknown ({file} names none)"


def test_without_cann_it_says_why() -> None:
    environ = {k: v for k, v in os.environ.items() if k != OVERRIDE}
    done = _verify(environ)
    assert done.returncode == 2
    assert "libhcomm.so: cannot open shared object file" in done.stderr


def test_a_fault_is_a_failed_line(sim_directory: str) -> None:
    environ = _environ(sim_directory) | {"ASCEND_SIM_PHYSICAL": "0,0"}
    done = _verify(environ, "--device-ips", "192.168.0.1,192.168.0.2")
    assert done.returncode == 1
    assert "device_port of its own" in done.stdout
    assert "FAILED" in done.stdout


@pytest.mark.parametrize("name", ["--rank", "--device", "--mib", "--devices"])
@pytest.mark.parametrize("text", [" 1", "0_1", "+1", "\u0661", "-1", "1.0", "x", ""])
def test_numbers_of_verify(name: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [text] if name != "--devices" else [text, f"0,{text}"]
    for each in given:
        with pytest.raises(SystemExit):
            _parser().parse_args([f"{name}={each}"])
        assert f"argument {name}: {text!r} is not a number in [" in capsys.readouterr().err
    assert _parser().parse_args([]).devices == [0, 1]


@pytest.mark.parametrize("looks", [1, 3, 1 << 30])
def test_what_goes_on_after_a_timeout_is_waited_for_or_forced(
    monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    """Else it could write into what the next check compares."""
    monkeypatch.setattr(checks, "FORCE_SECONDS", 0.05)
    left, forced = itertools.count(looks - 1, -1), list[int]()
    flight = SimpleNamespace(settled=lambda: next(left) <= 0)
    error = TransferTimeout("late", link_usable=True)
    linked: Any = SimpleNamespace(link=SimpleNamespace(force=forced.append), other=1)
    assert checks._settle(linked, error) == ""
    error.in_flight = flight
    text = checks._settle(linked, error)
    assert ("by force" in text) == (looks > 3)
    assert forced == ([1] if looks > 3 else [])
