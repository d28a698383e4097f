"""Memory of CUDA devices, through the driver's library. It was never run on a GPU.

Only what a transport needs: where memory is, allocating it, and copies. All is done in the primary
context of the device, which is that of PyTorch too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from datadist.transport import Placement, RegistrationError, TransportError
from datadist_nixl.library import Kind
from datadist_nixl.memory import NixlRegion

LIBRARY = "libcuda.so.1"
OUT_OF_MEMORY = 2
MEMORY_TYPE, DEVICE_ORDINAL = 2, 9
"""Attributes of a pointer."""
TYPE_DEVICE = 2


class Cuda:
    """The driver, and one device for memory of our own."""

    def __init__(self, device: int, library: Any = None) -> None:
        """Raises :class:`TransportError` where there is no driver, or no such device."""
        try:
            self._library = library or ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise TransportError(f"the driver of CUDA cannot be loaded: {error}") from None
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self._device = device
        self._call("cuInit", 0)
        self._context(device)

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self._library, name)(*args)
        if status == OUT_OF_MEMORY:
            raise MemoryError(f"{name}: the device has not enough memory")
        if status:
            raise TransportError(f"{name} failed: error {status} of CUDA")

    def _context(self, ordinal: int) -> ctypes.c_void_p:
        """The primary context of a device, retained once."""
        if ordinal not in self._contexts:
            device, context = ctypes.c_int(), ctypes.c_void_p()
            self._call("cuDeviceGet", ctypes.byref(device), ordinal)
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            self._contexts[ordinal] = context
        return self._contexts[ordinal]

    @contextmanager
    def current(self, ordinal: int) -> Iterator[None]:
        """Use a device on this thread."""
        before = ctypes.c_void_p()
        self._call("cuCtxPushCurrent_v2", self._context(ordinal))
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(before))

    def region(self, address: int, size: int) -> NixlRegion:
        """Memory of the user, on the device that it is on. Raises :class:`RegistrationError`."""
        try:
            places = {self._place(at) for at in (address, address + size - 1)}
        except TransportError as error:
            raise RegistrationError(f"the {size} bytes at {address:#x}: {error}") from None
        kind, ordinal = places.pop()
        if places or kind != TYPE_DEVICE:
            raise RegistrationError(
                f"the {size} bytes at {address:#x} are not memory of one device"
            )
        self._context(ordinal)
        return NixlRegion(address, size, Placement.DEVICE, Kind(("VRAM", ordinal)))

    def _place(self, address: int) -> tuple[int, int]:
        """Type of memory and device of an address."""
        found = []
        for attribute in (MEMORY_TYPE, DEVICE_ORDINAL):
            value = ctypes.c_int()
            pointer = ctypes.c_uint64(address)
            self._call("cuPointerGetAttribute", ctypes.byref(value), attribute, pointer)
            found.append(value.value)
        return found[0], found[1]

    def allocate(self, size: int) -> NixlRegion:
        """Zeroed memory of our device. Raises ``MemoryError`` or :class:`TransportError`."""
        pointer = ctypes.c_uint64()
        with self.current(self._device):
            self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
            keeper = _Allocation(self, self._device, pointer.value)
            self._call("cuMemsetD8_v2", pointer, 0, ctypes.c_size_t(size))
            self._call("cuCtxSynchronize")
        kind = Kind(("VRAM", self._device))
        return NixlRegion(pointer.value, size, Placement.DEVICE, kind, keeper)

    def free(self, ordinal: int, address: int) -> None:
        """Undo :meth:`allocate`."""
        with self.current(ordinal):
            self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def copy(self, rows: Sequence[tuple[int, int, int]]) -> None:
        """Copy between any memory: destination, source, bytes."""
        with self.current(self._device):
            for to, frm, size in rows:
                self._call(
                    "cuMemcpy", ctypes.c_uint64(to), ctypes.c_uint64(frm), ctypes.c_size_t(size)
                )
            self._call("cuCtxSynchronize")

    def close(self) -> None:
        """Give the contexts back."""
        contexts, self._contexts = self._contexts, {}
        for ordinal in contexts:
            self._call("cuDevicePrimaryCtxRelease_v2", ordinal)


class _Allocation:
    """Frees memory of a device with its last reference."""

    def __init__(self, cuda: Cuda, ordinal: int, address: int) -> None:
        self._cuda, self._ordinal, self._address = cuda, ordinal, address

    def __del__(self) -> None:
        self._cuda.free(self._ordinal, self._address)
