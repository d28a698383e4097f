"""The soak: clean on a healthy library, the same steps from the same seed, and not blind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.soak import work
from tests.soak.__main__ import main
from tests.soak.world import World


def _run(tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int) -> tuple[int, str, str]:
    status = main(["--steps", "12", "--seed", str(seed), "--plot", str(tmp_path / "soak.png")])
    out = capsys.readouterr().out
    return status, out.partition("(digest ")[2].partition(")")[0], out


def test_equal_seeds_make_equal_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (_run(tmp_path, capsys, 5) for _ in range(2))
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert first[1] == second[1] != ""
    assert " 0 wrong" in first[2]


def test_wrong_bytes_are_counted(tmp_path: Path) -> None:
    from tests.nodes import Here, fill

    here: Any = Here()
    import numpy as np

    shape = (work.SLOTS, work.WIDTH)
    here.arrays["into"] = [np.zeros(shape, np.int32) for _ in range(work.TENSORS)]
    fill(here, "into", work.GUARD)
    here.arrays["into"][2][3, 7] ^= 1
    compared, wrong = work._difference(here, "into", 1, {})
    assert compared == work.TENSORS * shape[0] * shape[1] * 4
    assert wrong == 1
    world = World(1, tmp_path)
    world._verified(compared, wrong)
    assert world.totals.wrong == 1
