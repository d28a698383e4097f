"""`datadist doctor`: what it finds on machines of many kinds, made of files."""

from __future__ import annotations

import json
import resource
from collections.abc import Mapping
from pathlib import Path

import pytest

from datadist.cli import main
from datadist.control.runtime_dir import Address, RuntimeDir
from datadist.diagnosis import Finding, Level, ascend, host, rdma, runtime_directory, worst
from datadist.diagnosis.finding import on
from datadist.testing import installed

UNLIMITED = resource.RLIM_INFINITY


def _write(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def _directory(path: Path) -> Finding:
    """The finding about the directory itself."""
    return next(iter(list(runtime_directory.findings(path))))


def _levels(findings: object) -> dict[str, Level]:
    assert isinstance(findings, list)
    return {finding.name: finding.level for finding in findings}


def test_this_machine_runs_shm(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setenv("DATADIST_RUNTIME_DIR", str(runtime_dir))
    assert main(["doctor", "--backend", "shm"]) == 0
    out = capsys.readouterr().out
    for name in ("backend shm", "kernel", "memory cgroup", "ptrace scope", "runtime directory"):
        assert name in out
    assert out.splitlines()[-1].startswith("shm: works here")


def test_two_together(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch,
                      capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setenv("DATADIST_RUNTIME_DIR", str(runtime_dir))
    with installed({"other": "tests.netcopy:NetCopy"}):
        assert main(["doctor", "--backend", "shm+other"]) == 0
        out = capsys.readouterr().out
        assert "backend shm" in out
        assert out.splitlines()[-1].startswith("shm, other: works here")
        monkeypatch.setenv("DATADIST_BACKEND", "shm+other")
        assert main(["doctor"]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith("shm, other: works here")
    for wrong, said in (("shm+shm", "named twice"), ("shm+", "expected the names of two"),
                        ("shm+nowhere", "'nowhere' is not installed")):  # fmt: skip
        assert main(["doctor", "--backend", wrong]) == 1
        assert said in capsys.readouterr().out.splitlines()[-1]


def test_json_and_the_exit_status(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setenv("DATADIST_RUNTIME_DIR", str(runtime_dir))
    runtime_dir.chmod(0o755)
    assert main(["doctor", "--backend", "shm", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["works"] is False
    (finding,) = [f for f in report["findings"] if f["name"] == "runtime directory"]
    assert finding["level"] == "problem"
    assert "mode 0755" in finding["found"]


def test_a_backend_that_is_not_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--backend", "nonsense"]) == 1
    assert "not installed: nonsense" in capsys.readouterr().out


def test_looking_leaves_no_directory_behind(tmp_path: Path) -> None:
    assert _directory(tmp_path / "run").level is Level.OK
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("release", "level"),
    [
        ("4.18.0-el8", Level.PROBLEM),
        ("5.0.9", Level.PROBLEM),
        ("5.1.0", Level.OK),
        ("6.18-x", Level.OK),
    ],
)
def test_kernels(release: str, level: Level) -> None:
    assert host.kernel(release).level is level


@pytest.mark.parametrize(("scope", "level"), [(0, Level.OK), (1, Level.OK), (2, Level.NOTE)])
def test_ptrace_scope(tmp_path: Path, scope: int, level: Level) -> None:
    finding = host.ptrace(_write(tmp_path, {"scope": str(scope)}) / "scope")
    assert finding.level is level
    assert ("sysctl" in finding.remedy) == (level is Level.NOTE)


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert host.memlock(8 << 20, 8 << 20).level is Level.NOTE
    assert host.memlock(UNLIMITED, UNLIMITED).level is Level.OK
    assert host.descriptors(256, 4096).remedy.startswith("ulimit -n 4096")
    assert host.descriptors(20000, 20000).level is Level.OK
    assert host.address_space(1 << 30).level is Level.NOTE
    assert host.file_size(UNLIMITED).level is Level.OK
    assert host.file_size(1 << 30).level is Level.NOTE
    assert host.file_size(4095).level is Level.PROBLEM


@pytest.mark.parametrize("own", ["4:memory:/outer/inner", "0::/outer/inner"])
def test_the_lowest_limit_of_the_cgroups_above_counts(tmp_path: Path, own: str) -> None:
    v1 = "memory" in own
    top, name = ("memory/", "memory.limit_in_bytes") if v1 else ("", "memory.max")
    root = _write(
        tmp_path,
        {
            "self": own,
            "meminfo": "MemAvailable: 8388608 kB\nShmem: 0 kB\nHugePages_Free: 3\nHugepagesize: 2048 kB",
            f"{top}outer/{name}": str(1 << 30),
            f"{top}outer/inner/{name}": str(1 << 63) if v1 else "max",
        },
    )
    files = host.cgroup_files(root, root / "self")
    findings = list(host.memory(root / "meminfo", files))
    assert [f.name for f in findings] == ["memory", "huge pages", "memory cgroup"]
    assert findings[2].level is Level.NOTE
    assert "1024 MiB" in findings[2].found
    assert "3 free of 2 MiB" in findings[1].found


def _port(state: str, layer: str, kind: str) -> dict[str, str]:
    port = "devices/rxe0/ports/1"
    return {
        "nodes/uverbs0": "",
        f"{port}/state": state,
        f"{port}/link_layer": layer,
        f"{port}/gids/0": "fe80:0000:0000:0000:0000:0000:0000:0001",
        f"{port}/gids/1": rdma.NOTHING,
        f"{port}/gid_attrs/types/0": kind,
    }


@pytest.mark.parametrize(
    ("state", "kind", "level", "remedy"),
    [
        ("4: ACTIVE", "RoCE v2", Level.OK, ""),
        ("1: DOWN", "RoCE v2", Level.PROBLEM, "ip link set"),
        ("4: ACTIVE", "IB/RoCE v1", Level.PROBLEM, "IP address"),
    ],
)
def test_rdma_ports(tmp_path: Path, state: str, kind: str, level: Level, remedy: str) -> None:
    root = _write(tmp_path, _port(state, "Ethernet", kind))
    findings = list(rdma.examine(root / "devices", root / "nodes"))
    (port,) = [f for f in findings if f.name == "RDMA port rxe0/1"]
    assert port.level is level
    assert remedy in port.remedy
    if level is Level.OK:
        assert "0: fe80" in port.found
        assert "1: " not in port.found.split("GIDs")[1]


def test_no_rdma_at_all(tmp_path: Path) -> None:
    levels = _levels(list(rdma.examine(tmp_path / "none", tmp_path / "none")))
    assert levels["RDMA devices"] is Level.PROBLEM


def test_ascend(tmp_path: Path) -> None:
    root = _write(tmp_path, {"dev/davinci0": "", "lib/libascendcl.so": "", "lib/libhccl.so": ""})
    environ = {"LD_LIBRARY_PATH": f"/nowhere:{root / 'lib'}"}
    assert set(_levels(list(ascend.examine(root / "dev", environ))).values()) == {Level.OK}
    bare = _levels(list(ascend.examine(root / "none", {})))
    assert bare["Ascend devices"] is Level.PROBLEM


def test_only_what_concerns_a_backend_counts() -> None:
    findings = [
        Finding("a", Level.PROBLEM, "", backends=on("hccl")),
        Finding("b", Level.NOTE, "", backends=on("shm")),
        Finding("c", Level.OK, ""),
    ]
    assert worst(findings, ["shm"]) is Level.NOTE
    assert worst(findings, ["hccl"]) is Level.PROBLEM
    assert worst(findings, ["rdma"]) is Level.OK


def test_engines_are_counted_by_job(tmp_path: Path) -> None:
    place = tmp_path / "run"
    assert _directory(place).found == f"{place} can be made"
    assert not place.exists()
    directories = [RuntimeDir(place, job) for job in ("", "blue", "empty")]
    sockets = [d.listen(Address(7, "a" * 32)) for d in directories[:2]]
    text = _directory(place).found
    assert "1 in the job without a name" in text
    assert "1 in job 'blue'" in text
    assert "empty" not in text
    for sock in sockets:
        sock.close()
    for directory in directories:
        directory.close()
