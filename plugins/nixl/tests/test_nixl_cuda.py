"""Calls of the driver of CUDA, which a substitute records: it never ran on a GPU."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
from datadist_nixl.cuda import DEVICE_ORDINAL, MEMORY_TYPE, TYPE_DEVICE, Cuda
from datadist_nixl.memory import NixlRegion

from datadist.transport import RegistrationError, TransportError

MEMORY = 0x7F0000000000


class Driver:
    """Device 1 has memory from :data:`MEMORY` on; ``fail`` names a call that fails, and how."""

    def __init__(self, fail: dict[str, int] | None = None) -> None:
        self.fail = fail or {}
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            self.called.append(name)
            if name == "cuMemAlloc_v2":
                args[0]._obj.value = MEMORY
            if name == "cuPointerGetAttribute":
                known = {MEMORY_TYPE: TYPE_DEVICE, DEVICE_ORDINAL: 1}
                args[0]._obj.value = known[args[1]] if args[2].value >= MEMORY else 1
            return self.fail.get(name, 0)

        return call


def test_memory_of_a_device_is_freed_with_its_last_user() -> None:
    driver = Driver()
    region: NixlRegion = Cuda(1, driver).allocate(4096)
    assert (region.address, region.kind) == (MEMORY, ("VRAM", 1))
    assert "cuMemsetD8_v2" in driver.called
    assert "cuMemFree_v2" not in driver.called
    region.keeper = None
    assert driver.called[-3:] == ["cuCtxPushCurrent_v2", "cuMemFree_v2", "cuCtxPopCurrent_v2"]


def test_memory_of_the_user_is_on_the_device_that_the_driver_says() -> None:
    assert Cuda(0, Driver()).region(MEMORY, 8).kind == ("VRAM", 1)


def test_memory_that_is_not_of_a_device_is_refused() -> None:
    for driver in (Driver(), Driver({"cuPointerGetAttribute": 1})):
        with pytest.raises(RegistrationError, match="0x1000"):
            Cuda(0, driver).region(0x1000, 8)
    with pytest.raises(RegistrationError, match="not memory of one device"):
        Cuda(0, Driver()).region(MEMORY - 8, 16)


def test_errors_of_the_driver_say_which_call_failed() -> None:
    with pytest.raises(TransportError, match="cuInit failed: error 100"):
        Cuda(0, Driver({"cuInit": 100}))
    with pytest.raises(MemoryError, match="cuMemAlloc_v2"):
        Cuda(0, Driver({"cuMemAlloc_v2": 2})).allocate(8)


def test_contexts_are_given_back_once() -> None:
    driver = Driver()
    cuda = Cuda(3, driver)
    cuda.copy([(MEMORY, ctypes.sizeof(ctypes.c_int), 4)])
    cuda.close()
    cuda.close()
    assert driver.called.count("cuDevicePrimaryCtxRetain") == 1
    assert driver.called.count("cuDevicePrimaryCtxRelease_v2") == 1
