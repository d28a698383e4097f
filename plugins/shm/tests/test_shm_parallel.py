"""The threads of one large copy: they do not change where the program's threads may run."""

from __future__ import annotations

import os
from array import array

import numpy as np
import pytest
from datadist_shm import _native

BYTES = 16 << 20
COPIES = 200
THREADS = 64


@pytest.mark.parametrize("processors", [1, 2, 1024])
def test_who_copies_with_helpers_may_run_where_it_could_before(processors: int) -> None:
    """Also where helpers have ended before they were given a processor, as with more than are of use."""
    source, target = np.ones(BYTES, np.uint8), np.zeros(BYTES, np.uint8)
    to, frm, size = (array("q", [n]) for n in (target.ctypes.data, source.ctypes.data, BYTES))
    ours = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, sorted(ours)[:processors])
        before = os.sched_getaffinity(0)
        for _ in range(COPIES):
            _native.copy(to, frm, size, THREADS, _native.AUTO)
        assert os.sched_getaffinity(0) == before
    finally:
        os.sched_setaffinity(0, ours)
    assert target.all()
