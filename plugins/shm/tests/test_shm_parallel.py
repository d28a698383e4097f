"""The threads of one large copy: where they run."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from array import array
from pathlib import Path

import numpy as np
from datadist_shm import _native

from tests.privileges import in_child
from tests.waiting import until

BYTES = 64 << 20


def _allowed() -> set[frozenset[int]]:
    """The sets of processors of all threads of this process, as far as they still live."""
    found = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            found.add(frozenset(os.sched_getaffinity(int(task))))
    return found


def _copy(source: np.ndarray, target: np.ndarray, threads: int) -> None:
    to, frm, size = (array("q", [n]) for n in (target.ctypes.data, source.ctypes.data, BYTES))
    _native.copy(to, frm, size, threads, _native.AUTO)


def _sets_while_copying(enough: int) -> set[frozenset[int]]:
    """What is seen until there are so many, in as many copies as that takes."""
    source, target = np.ones(BYTES, np.uint8), np.zeros(BYTES, np.uint8)
    over, seen = threading.Event(), set[frozenset[int]]()

    def go_on() -> None:
        while not over.is_set():
            _copy(source, target, 2)

    def look() -> bool:
        seen.update(_allowed())
        return len(seen) >= enough

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        until(look)
    finally:
        over.set()
        thread.join()
    return seen


def _tell(enough: int) -> None:
    print(json.dumps([sorted(each) for each in _sets_while_copying(enough)]))


def test_a_helper_runs_on_another_processor_than_the_thread_that_it_helps() -> None:
    """Which the kernel may not see to by itself, for some milliseconds after a pause."""
    root, ours = Path(__file__).parents[3], set(os.sched_getaffinity(0))
    code = f"import runpy; runpy.run_path({__file__!r})['_tell'](2 if {len(ours)} > 1 else 1)"
    seen = subprocess.run(
        [sys.executable, "-c", code], cwd=root, check=True, stdout=subprocess.PIPE, timeout=300,
        env={**os.environ, "DATADIST_ALWAYS_HELP": "1", "PYTHONPATH": str(root)},
    ).stdout  # fmt: skip
    helpers = [set(each) for each in json.loads(seen) if set(each) != ours]
    assert bool(helpers) == (len(ours) > 1)
    assert all(len(ours - each) == 1 and each < ours for each in helpers)


def test_a_program_with_one_processor_copies_with_helpers_there() -> None:
    def look() -> object:
        one = {min(os.sched_getaffinity(0))}
        os.sched_setaffinity(0, one)
        source, target = np.ones(BYTES, np.uint8), np.zeros(BYTES, np.uint8)
        _copy(source, target, 2)
        return bool(target.all()), _allowed() == {frozenset(one)}

    assert in_child(look) == "(True, True)"
