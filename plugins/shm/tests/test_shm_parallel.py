"""The threads of one large copy: they do not change where the program's threads may run."""

from __future__ import annotations

import os
import subprocess
import sys
from array import array
from pathlib import Path

import numpy as np
import pytest
from datadist_shm import _native

BYTES = 16 << 20
COPIES = 300


def _copy_often(processors: int) -> bool:
    """With the first processors; whether all that this thread could use, it still can."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:processors])
    before = os.sched_getaffinity(0)
    source, target = np.ones(BYTES, np.uint8), np.zeros(BYTES, np.uint8)
    to, frm, size = (array("q", [n]) for n in (target.ctypes.data, source.ctypes.data, BYTES))
    for _ in range(COPIES):
        _native.copy(to, frm, size, 64, _native.AUTO)
    return bool(target.all()) and os.sched_getaffinity(0) == before


@pytest.mark.parametrize("processors", [1, 2, 1024])
def test_who_copies_with_helpers_may_run_where_it_could_before(processors: int) -> None:
    """Also where helpers have ended before they were given a processor, as with more than are of use."""
    root = Path(__file__).parents[3]
    code = f"import runpy; print(runpy.run_path({__file__!r})['_copy_often']({processors}))"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=root, check=True, stdout=subprocess.PIPE, timeout=300,
        env={**os.environ, "DATADIST_ALWAYS_HELP": "1", "PYTHONPATH": str(root)},
    ).stdout  # fmt: skip
    assert said.strip() == b"True"
