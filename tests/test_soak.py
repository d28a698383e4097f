"""The soak: clean on a healthy library, the same steps from the same seed, and not blind."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.nodes import Here
from tests.soak import __main__ as program
from tests.soak import work, world
from tests.soak.__main__ import main
from tests.soak.resources import ALLOWED, ENOUGH, Usage, growth, usage
from tests.soak.world import World


def _run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int, steps: int = 12
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


def test_wrong_bytes_are_counted(tmp_path: Path) -> None:
    from tests.nodes import fill

    here: Any = Here()
    import numpy as np

    shape = (work.SLOTS, work.WIDTH)
    here.arrays["into"] = [np.zeros(shape, np.int32) for _ in range(work.TENSORS)]
    fill(here, "into", work.GUARD)
    here.arrays["into"][2][3, 7] ^= 1
    compared, wrong = work._difference(here, "into", 1, {})
    assert compared == work.TENSORS * shape[0] * shape[1] * 4
    assert wrong == 1
    made = World(1, tmp_path)
    made._verified(compared, wrong)
    assert made.totals.wrong == 1


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
    gc.collect()  # what earlier tests left may close descriptors at any moment
    before = usage(os.getpid())
    reader, writer = os.pipe()
    after = usage(os.getpid())
    os.close(reader)
    os.close(writer)
    assert after.descriptors == before.descriptors + 2
    assert after.resident > 1 << 20
    assert after.threads >= 1
    assert after.mappings > 10


class _Murdered(World):
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
    monkeypatch.setattr(program, "World", _Murdered)
    status, _, out = _run(tmp_path, capsys, 7)
    assert status == 1
    assert "ended by itself: cluster" in out
    assert "FAILED, again with --seed 7" in out


def _leaking_link(here: Here, name: str, mapping: dict[int, int]) -> float:
    """Link, and forget to close something."""
    here.any.setdefault("forgotten", []).append(os.dup(0))
    return work.link(here, name, mapping)


def test_a_descriptor_lost_with_each_link_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Leaking(World):
        link_work = staticmethod(_leaking_link)

    monkeypatch.setattr(program, "World", Leaking)
    monkeypatch.setattr(world, "REST_EVERY", 6)
    weights = {"start": 4, "link": 10, "pull": 2, "unlink": 1}
    monkeypatch.setattr(world, "WEIGHTS", weights)
    status, _, out = _run(tmp_path, capsys, 5, steps=80)
    assert status == 1
    assert "descriptors grew by" in out
    assert "mappings grew" not in out
