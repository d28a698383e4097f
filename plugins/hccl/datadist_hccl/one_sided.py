"""HCCL's one-sided operations: communicators, registrations, batches. Errors are raised."""

from __future__ import annotations

import ctypes
import os
import threading
import time

from datadist_hccl import abi, environment
from datadist_hccl.acl import Runtime
from datadist_hccl.libraries import Vendor

DESTROY_ATTEMPTS = 50
DESTROY_PAUSE = 0.02
"""Seconds between attempts to destroy a communicator that is busy."""

_init_lock = threading.Lock()
"""The library makes one communicator of a process at a time."""


class HcclError(Exception):
    """A call of HCCL failed; ``code`` is its HcclResult."""

    def __init__(self, call: str, code: int, detail: str) -> None:
        name = abi.HCCL_NAMES.get(code, "unknown")
        super().__init__(f"{call} returned {code} ({name}){detail}")
        self.code = code


class Hccl:
    """The functions of the library; every call needs the device's context on its thread."""

    def __init__(self, vendor: Vendor, runtime: Runtime) -> None:
        self._vendor = vendor
        self._runtime = runtime

    def call(self, name: str, *args: object) -> None:
        """Call a function; raise :class:`HcclError` with all that the libraries say."""
        code = self._vendor[name](*args)
        if code != abi.HCCL_SUCCESS:
            raise HcclError(name, code, self._detail(code))

    def _detail(self, code: int) -> str:
        text = self._vendor["HcclGetErrorString"](code)
        shown = f": {text.decode(errors='replace')}" if text else ""
        return shown + self._runtime.recent()

    def register(self, address: int, size: int, device: bool) -> int:
        """Make a range known to the library; pinning happens when a communicator is prepared."""
        memory = abi.CommMem(abi.MEM_DEVICE if device else abi.MEM_HOST, address, size)
        handle = ctypes.c_void_p()
        self.call("HcclRegisterGlobalMem", ctypes.byref(memory), ctypes.byref(handle))
        return handle.value or 0

    def create(
        self, table: str, rank: int, name: str, traffic_class: int | None, service_level: int | None
    ) -> int:
        """A communicator of a rank table; local, one at a time in the process."""
        config = _config(name, traffic_class, service_level)
        communicator = ctypes.c_void_p()
        with _init_lock:
            self.call(
                "HcclCommInitClusterInfoMemConfig",
                table.encode(), rank, ctypes.byref(config), ctypes.byref(communicator),
            )  # fmt: skip
            environment.mark_environment_read(os.environ)
        return communicator.value or 0

    def prepare(self, communicator: int, seconds: int) -> None:
        """Meet every other rank; ``seconds`` > 0 is the limit of each of its phases."""
        config = abi.PrepareConfig()
        self.call("HcclCommPrepare", communicator, ctypes.byref(config), seconds)

    def exchange(
        self, communicator: int, own: int, rank: int, blobs: list[bytes], room: int, seconds: int
    ) -> list[bytes]:
        """Swap blobs of at most :data:`abi.BLOB_BYTES` bytes with a rank, which does the same.

        The library writes as many as the peer sends: ``room`` must be more than it may send.
        """
        mine = (abi.MemDesc * len(blobs))()
        for item, blob in zip(mine, blobs, strict=True):
            item.local_rank, item.remote_rank = own, rank
            ctypes.memmove(ctypes.addressof(item) + abi.MemDesc.desc.offset, blob, len(blob))
        theirs = (abi.MemDesc * room)()
        sent, received = abi.MemDescs(mine, len(blobs)), abi.MemDescs(theirs, room)
        count = ctypes.c_uint32()
        self.call(
            "HcclExchangeMemDesc",
            communicator, rank, ctypes.byref(sent), seconds, ctypes.byref(received),
            ctypes.byref(count),
        )  # fmt: skip
        offset = abi.MemDesc.desc.offset
        return [
            ctypes.string_at(ctypes.addressof(item) + offset, abi.BLOB_BYTES)
            for item in theirs[: count.value]
        ]

    def batch(
        self, write: bool, communicator: int, rank: int, items: int, count: int, stream: int
    ) -> None:
        """Queue ``count`` items of :class:`abi.OpDesc` at address ``items`` on a stream."""
        name = "HcclBatchPut" if write else "HcclBatchGet"
        self.call(name, communicator, rank, items, count, stream)

    def remap(self, communicator: int, ranges: list[tuple[int, int]]) -> None:
        """Make the keys of registered device memory (address, size) anew; only RDMA has such."""
        memories = (abi.CommMem * len(ranges))()
        for memory, (address, size) in zip(memories, ranges, strict=True):
            memory.type, memory.address, memory.size = abi.MEM_DEVICE, address, size
        handles = (ctypes.c_void_p * 1)(communicator)
        self.call("HcclRemapRegistedMemory", handles, memories, 1, len(ranges))

    def destroy(self, communicator: int) -> None:
        """Destroy a communicator without bound memory; while it is busy, try for a second."""
        for attempt in range(DESTROY_ATTEMPTS):
            try:
                self.call("HcclCommDestroy", communicator)
                return
            except HcclError as error:
                if error.code != abi.HCCL_AGAIN or attempt == DESTROY_ATTEMPTS - 1:
                    raise
            time.sleep(DESTROY_PAUSE)


def _config(name: str, traffic_class: int | None, service_level: int | None) -> abi.CommConfig:
    return abi.CommConfig(
        size=abi.CONFIG_BYTES,
        magic=abi.CONFIG_MAGIC,
        version=abi.CONFIG_VERSION,
        buffer_size=abi.BUFFER_MIB,
        deterministic=0,
        name=name.encode(),
        expansion_mode=0,
        traffic_class=abi.CONFIG_NOT_SET if traffic_class is None else traffic_class,
        service_level=abi.CONFIG_NOT_SET if service_level is None else service_level,
    )
