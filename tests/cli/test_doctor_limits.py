"""`datadist doctor`: limits of threads, descriptors, memory and processors."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from datadist.base.memory_room import Room
from datadist.cli import main
from datadist.diagnosis import Level, limits
from tests import descriptors, groups
from tests.nodes import MIB


def _doctor(*arguments: str, before: str = "") -> dict[str, dict[str, str]]:
    """Findings by name, of a process that first runs some code."""
    code = f"{before}; from datadist.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    run = subprocess.run(
        [sys.executable, "-c", code.removeprefix("; "), "doctor", "--json", *arguments],
        check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.stdout, run.stderr
    return {each["name"]: each for each in json.loads(run.stdout)["findings"]}


def test_this_machine_has_enough(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--pool", "1048576"])
    out = capsys.readouterr().out
    for name in ("limit of threads", "free descriptors", "room for pools", "processors"):
        assert f" {name}" in out


def test_few_threads() -> None:
    with groups.group("pids", {"pids.max": 12}) as path:
        found = _doctor(
            before=f"import os; open('{path}/cgroup.procs', 'w').write(str(os.getpid()))"
        )
    assert found["limit of threads"]["level"] == "problem"
    assert f"{path} may have 12" in found["limit of threads"]["found"]
    assert "ulimit -u" in found["limit of threads"]["remedy"]


def test_few_descriptors() -> None:
    found = _doctor(before="import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (16, 16))")
    assert found["free descriptors"]["level"] == "problem"
    assert "ulimit -n" in found["free descriptors"]["remedy"]


def test_little_address_space() -> None:
    before = f"import resource as r; r.setrlimit(r.RLIMIT_AS, ({300 * MIB}, {300 * MIB}))"
    found = _doctor(before=before)
    assert found["address space"]["level"] == "note"


def test_a_wanted_pool_beside_the_room_of_the_cgroup() -> None:
    limit = 256 * MIB
    first, second = {"memory.limit_in_bytes": limit}, {"memory.max": limit, "memory.swap.max": 0}
    with groups.group("memory", first, second) as path:
        enter = f"import os; open('{path}/cgroup.procs', 'w').write(str(os.getpid()))"
        large = _doctor("--pool", str(2 * limit), before=enter)["room for pools"]
        small = _doctor("--pool", str(limit // 4), before=enter)["room for pools"]
    assert (large["level"], small["level"]) == ("problem", "ok")
    assert f"the memory cgroup {path}" in large["found"]


def test_the_room_counts_what_others_will_take() -> None:
    finding = limits.room(Room(10 * MIB, "this host", 5 * MIB), 12 * MIB)
    assert finding.level is Level.PROBLEM
    assert f"beside {5 * MIB} that pools of engines here will take" in finding.found
    assert limits.room(None, 1).level is Level.NOTE


def test_processors_by_quota() -> None:
    assert limits.processors(2, 8).level is Level.NOTE
    assert "2 of 8" in limits.processors(2, 8).found
    assert limits.processors(8, 8).level is Level.OK


def test_looking_leaves_nothing() -> None:
    before = descriptors.count()
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert limits.threads().level is Level.OK
    assert limits.descriptors_left(min(soft, 20)).level is Level.OK
    assert descriptors.falls_to(before)
    assert Path("/proc/self").exists()
