"""The choice of a copy kernel and of threads, which is measured in the background."""

from __future__ import annotations

import os
import re
from array import array
from pathlib import Path

import numpy as np
import pytest
from datadist_shm import ShmTransport, _native

from tests import tasks
from tests.nodes import Here

MIB = 1 << 20


def test_each_kernel_and_each_number_of_threads_is_measured() -> None:
    (kernel, threads), kernels, together, scaling = _native.tune(3)
    assert kernels.keys() == _native.KERNELS.keys()
    assert all(speed > 0 for speed in kernels.values())
    assert kernel in kernels
    assert threads >= 1
    assert 1 <= together <= 3
    assert [count for count, _ in scaling][:1] == [1]
    assert all(speed > 0 for _, speed in scaling)


def test_helpers_of_the_measurement_end() -> None:
    before = tasks.count()
    for _ in range(3):
        _native.tune(8)
    assert tasks.falls_to(before)


@pytest.mark.parametrize("threads", [0, -1, 65])
def test_a_number_of_threads_is_checked(threads: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        _native.tune(threads)


def test_the_doctor_shows_every_kernel_and_the_choice() -> None:
    figures = ShmTransport.measure()
    chosen = figures["copy kernel"].partition(" ")[0]
    assert chosen in _native.KERNELS
    for kernel in _native.KERNELS:
        assert re.search(rf"{kernel} \d+\.\d", figures["copy kernel"])
    assert re.search(r"\d+\.\d by 1", figures["copy threads"])


def _copy(nbytes: int, kernel: int) -> None:
    source, target = np.full(nbytes, 7, np.uint8), np.zeros(nbytes, np.uint8)
    to, frm, size = (array("q", [n]) for n in (target.ctypes.data, source.ctypes.data, nbytes))
    _native.copy(to, frm, size, -2, kernel)
    assert target.min() == 7


def _mapped_without_children() -> int:
    """Mappings that children do not inherit: no other code of this process makes such."""
    return Path("/proc/self/smaps").read_text().count(" dc")


def _measures_once(_here: Here) -> None:
    before = tasks.count()
    mapped = _mapped_without_children()
    _copy(32 * MIB, _native.AUTO)
    assert tasks.falls_to(before)
    assert _mapped_without_children() == mapped, "memory of the measurement is left"
    pid = os.fork()
    if pid == 0:
        _copy(32 * MIB, _native.AUTO)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_the_first_large_copy_has_it_measured_and_leaves_nothing() -> None:
    tasks.with_helpers(_measures_once)
