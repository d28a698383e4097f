"""The soak: clean on a healthy library, the same steps from the same seed, and not blind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datadist import LLMException, LLMStatusCode
from tests import nodes
from tests.nodes import Here
from tests.soak import __main__ as program
from tests.soak import work, world
from tests.soak.__main__ import main
from tests.soak.comparing import EACH, SOME, Compared, Difference, missing, uncompared
from tests.soak.plot import plot
from tests.soak.resources import ALLOWED, ENOUGH, Usage, growth, usage
from tests.soak.world import FIRST, Sample, Totals, World


def _run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int, steps: int = 20
) -> tuple[int, str, str]:
    status = main(
        ["--steps", str(steps), "--seed", str(seed), "--plot", str(tmp_path / "soak.png")]
    )
    out = capsys.readouterr().out
    return status, out.partition("(digest ")[2].partition(")")[0], out


def test_equal_seeds_make_equal_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (_run(tmp_path, capsys, 5) for _ in range(2))
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert first[1] == second[1] != ""
    assert " 0 lost or wrong" in first[2]
    for kind in (*EACH, *SOME):
        assert re.search(rf"^  {kind} +[1-9]\d* +[1-9]", first[2], re.MULTILINE)


def test_wrong_bytes_are_counted(tmp_path: Path) -> None:
    from tests.nodes import fill

    here: Any = Here()
    import numpy as np

    shape = (work.SLOTS, work.WIDTH)
    here.arrays["into"] = [np.zeros(shape, np.int32) for _ in range(work.TENSORS)]
    fill(here, "into", work.GUARD)
    here.arrays["into"][2][3, 7] ^= 1
    found = work.difference(here, "into", 1, {})
    assert found == (0, work.TENSORS * shape[0] * shape[1] * 4, 1)
    made = World(1, tmp_path)
    made._compared("pull", found)
    assert made.totals.wrong == 1
    assert made.totals.failed
    assert made.totals.compared["pull"].transfers == 0
    found = work.difference(here, "into", 1, {1: 3})  # nothing came
    assert found.moved == work.TENSORS * shape[1] * 4
    assert found.wrong > found.moved / 2


def _blind_pull(here: Here, owner: int, seed: int, slot: int) -> tuple[float, Difference]:
    """Pull, and compare nothing."""
    from datadist import CacheKeyByIdAndIndex

    nodes.pull_cache(here, CacheKeyByIdAndIndex(owner, work.OWN, slot), "into", 1)
    nodes.fill(here, "into", work.GUARD)
    return 0.0, Difference(0, 0, 0)


def _idle_pull(here: Here, owner: int, seed: int, slot: int) -> tuple[float, Difference]:
    """Claim to have pulled."""
    return 0.0, work.difference(here, "into", seed, {1: slot})


def _failing_pull(here: Here, owner: int, seed: int, slot: int) -> tuple[float, Difference]:
    """Fail in a way that is documented."""
    raise LLMException("on purpose", status_code=LLMStatusCode.LLM_TIMEOUT)


def _failing_torn(here: Here, owner: int, seed: int, slot: int) -> tuple[str, Difference]:
    """End always as a pull may end whose owner is harmed."""
    return "LLM_TIMEOUT", Difference(0, 0, 0)


@pytest.mark.parametrize(
    ("what", "instead", "says"),
    [
        ("pull", _blind_pull, "pull: 0 transfers of "),
        ("pull", _idle_pull, "bytes moved, 0 lost or wrong"),
        ("pull", _failing_pull, "on purpose"),
        ("torn", _failing_torn, "stop_in_pull: 0 transfers of "),
    ],
)
def test_a_soak_that_verifies_nothing_of_a_kind_fails(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    instead: Callable[..., object],
    says: str,
) -> None:
    monkeypatch.setattr(work, what, instead)
    status, _, out = _run(tmp_path, capsys, 5, len(FIRST))
    assert status == 1, out
    assert (says in out) == (instead is not _idle_pull), out


def test_steps_that_move_nothing_are_no_transfers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(World, "_push", lambda _self, _pair: None)
    status, _, out = _run(tmp_path, capsys, 5, len(FIRST))
    assert status == 1
    assert "push: 0 transfers of 1 steps were compared" in out


def test_each_transfer_counts_where_each_is_to_be_compared() -> None:
    compared = {"pull": Compared(), "stop_in_pull": Compared()}
    claimed = {"pull": 20, "stop_in_pull": 2, "link": 10}
    steps = {"pull": 2, "stop_in_pull": 2, "link": 5}
    assert len(missing(claimed, steps, compared)) == 2
    compared["pull"].add(Difference(4, 0, 0))
    compared["stop_in_pull"].add(Difference(4, 0, 0))
    assert missing(claimed, steps, compared) == ["pull: 1 transfers of 2 steps were compared"]
    compared["pull"].add(Difference(0, 4, 0))
    assert len(missing(claimed, steps, compared)) == 1
    compared["pull"].add(Difference(4, 4, 0))
    assert missing(claimed, steps, compared) == []
    assert len(missing(claimed, {}, {})) == 2


def test_it_says_what_could_not_be_compared() -> None:
    compared = {"pull": Compared(2), "kill_in_push": Compared(), "stop_in_pull": Compared(1)}
    found = uncompared({"pull": 2, "kill_in_push": 3, "stop_in_pull": 2, "link": 9}, compared)
    assert [line.partition(",")[0] for line in found] == [
        "stop_in_pull: 1 of 2",
        "kill_in_push: 3 of 3",
    ]
    assert "its memory with it" in found[1]


def test_a_plot_marks_the_faults(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib (extra soak) is not installed")
    totals = Totals(moments=[(1.0, "killed"), (2.0, "interrupted in a pull")])
    totals.samples.append(Sample(0.5, [Usage(1 << 20, 9, 3, 70, 2)]))
    totals.latencies.append((0.7, "pull", 0.001))
    plot(totals, tmp_path / "soak.svg")
    text = (tmp_path / "soak.svg").read_text()
    for part in ("Soak, passed: 0 steps", "Faults", "killed", "interrupted in a pull"):
        assert part in text


def _uses(**changes: list[int]) -> list[Usage]:
    """Measurements that wobble, and ``changes`` on top of them."""
    rests = []
    for number in range(12):
        wobble = number % 3
        base = {"resident": (80 + 20 * wobble) << 20, "descriptors": 20 + wobble, "threads": 9}
        base |= {"mappings": 400 + 50 * wobble, "pools": 1}
        for name, values in changes.items():
            base[name] += values[number]
        rests.append(Usage(**base))
    return rests


@pytest.mark.parametrize("name", ALLOWED)
def test_growth_is_seen_through_wobbling(name: str) -> None:
    step = ALLOWED[name] // 8 + 1
    leaking = _uses(**{name: [step * number for number in range(12)]})
    assert list(growth(leaking)) == [name]
    assert growth(leaking[: ENOUGH - 1]) == {}
    assert growth(_uses()) == {}


def test_usage_counts_what_a_process_has() -> None:
    reader, writer = os.pipe()
    try:
        few, more = _usage_of_a_program(), _usage_of_a_program(reader, writer)
    finally:
        os.close(reader)
        os.close(writer)
    assert more.descriptors == few.descriptors + 2
    assert few.resident > 1 << 20
    assert few.threads == 1
    assert few.mappings > 10


def _usage_of_a_program(*descriptors: int) -> Usage:
    """Of one that does nothing, and has these descriptors besides its own."""
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=descriptors,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        return usage(process.pid)


class _KilledInStep(World):
    """The third step finds that a process has ended by itself."""

    def step(self) -> None:
        if self.totals.steps.total() == 2:
            node = next(iter(self._live.values())).node
            os.kill(node.pid, signal.SIGKILL)
            node._process.join(20)
        super().step()


def test_a_process_that_ends_by_itself_is_a_failure_with_the_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "World", _KilledInStep)
    status, _, out = _run(tmp_path, capsys, 7)
    assert status == 1
    assert "ended by itself: cluster" in out
    assert "FAILED, again with --seed 7" in out


def _leaking_link(here: Here, name: str, mapping: dict[int, int]) -> float:
    """Link, and forget to close something; in a process whose ``work.link`` nobody replaced."""
    here.any.setdefault("forgotten", []).append(os.dup(0))
    return work.link(here, name, mapping)


def test_a_descriptor_lost_with_each_link_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "link", _leaking_link)
    monkeypatch.setattr(world, "REST_EVERY", 6)
    weights = {"start": 4, "link": 10, "pull": 2, "unlink": 1}
    monkeypatch.setattr(world, "WEIGHTS", weights)
    status, _, out = _run(tmp_path, capsys, 5, steps=80)
    assert status == 1
    assert "descriptors grew by" in out
    assert "mappings grew" not in out
