"""The ACL runtime: errors, the device with its context, memory, streams and copies."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
from collections.abc import Iterator

from datadist_hccl import abi
from datadist_hccl.libraries import Vendor

log = logging.getLogger("datadist.hccl")

MAX_SYNC_MS = 2**31 - 1


class AclError(Exception):
    """A ``call`` of the runtime failed; ``code`` is its number."""

    def __init__(self, call: str, code: int, detail: str) -> None:
        name = abi.ACL_NAMES.get(code, "unknown error")
        super().__init__(f"{call} returned {code} ({name}){detail}")
        self.call = call
        self.code = code


class Runtime:
    """The functions of the runtime, with their errors raised as :class:`AclError`."""

    def __init__(self, vendor: Vendor) -> None:
        self._vendor = vendor

    def call(self, name: str, *args: object) -> None:
        """Call a function that returns an error number."""
        code = self._vendor[name](*args)
        if code != abi.ACL_SUCCESS:
            raise AclError(name, code, self.recent())

    def _out(self, name: str, *args: object) -> int:
        """Call a function whose first argument takes a pointer out."""
        result = ctypes.c_void_p()
        self.call(name, ctypes.byref(result), *args)
        return result.value or 0

    def recent(self) -> str:
        """The runtime's messages about the last failures on this thread; reading clears them."""
        text = self._vendor["aclGetRecentErrMsg"]()
        return f": {text.decode(errors='replace').strip()}" if text else ""

    def initialise(self) -> None:
        """Initialise the process, which a framework may have done before.

        It is never finalised: after ``aclFinalize`` nothing in the process could use the device
        again.
        """
        code = self._vendor["aclInit"](None)
        if code not in (abi.ACL_SUCCESS, abi.ACL_REPEAT_INITIALIZE):
            raise AclError("aclInit", code, self.recent())

    def device_count(self) -> int:
        """Devices that are visible to this process."""
        count = ctypes.c_uint32()
        self.call("aclrtGetDeviceCount", ctypes.byref(count))
        return count.value

    def soc_name(self) -> str:
        """Name of the chip, empty if unknown."""
        name = self._vendor["aclrtGetSocName"]()
        return name.decode(errors="replace") if name else ""

    def physical_id(self, device: int) -> int:
        """The physical number of a device, which rank tables use."""
        number = ctypes.c_int32()
        self.call("aclrtGetPhyDevIdByLogicDevId", device, ctypes.byref(number))
        return number.value

    def current_context(self) -> int | None:
        """The calling thread's context, if it has one."""
        context = ctypes.c_void_p()
        code = self._vendor["aclrtGetCurrentContext"](ctypes.byref(context))
        if code == abi.ACL_NO_CONTEXT:
            self.recent()  # otherwise the next error would contain it
            return None
        if code != abi.ACL_SUCCESS:
            raise AclError("aclrtGetCurrentContext", code, self.recent())
        return context.value

    def malloc(self, size: int) -> int:
        """Device memory in huge pages, aligned to 2 MiB, which peers over HCCS need."""
        return self._out("aclrtMalloc", size, abi.MALLOC_HUGE_ONLY)

    def malloc_host(self, size: int) -> int:
        """Pinned memory of the host."""
        return self._out("aclrtMallocHost", size)

    def create_context(self, device: int) -> int:
        """A context, which is current on the calling thread afterwards."""
        return self._out("aclrtCreateContext", device)

    def create_stream(self) -> int:
        """A stream of the current context."""
        flags = abi.STREAM_FAST_LAUNCH | abi.STREAM_FAST_SYNC
        return self._out("aclrtCreateStreamWithConfig", 0, flags)

    def synchronize(self, stream: int, seconds: float) -> int:
        """Wait for what was queued on a stream, at least 1 ms; returns the runtime's number."""
        milliseconds = min(MAX_SYNC_MS, max(1, round(seconds * 1000)))
        code: int = self._vendor["aclrtSynchronizeStreamWithTimeout"](stream, milliseconds)
        return code

    def is_through(self, stream: int) -> bool:
        """Whether all that was queued on a stream was run; False where that is not known."""
        status = ctypes.c_int32(-1)
        code = self._vendor["aclrtStreamQuery"](stream, ctypes.byref(status))
        return bool(code == abi.ACL_SUCCESS and status.value == abi.STREAM_THROUGH)

    def copy(self, dst: int, src: int, size: int, kind: int) -> None:
        """Copy and wait; ``kind`` says which end is the host's and which the device's."""
        self.call("aclrtMemcpy", dst, size, src, size, kind)


class Device:
    """A device in use: a context of our own on it.

    Contexts belong to threads, and a calling thread may have another one. So every use of the
    runtime is inside of :meth:`bound`, which restores the context of the thread. A thread without a
    context gets the device's default context, as frameworks expect.

    The device is released after it was closed and after the last memory that views may use was
    freed.
    """

    def __init__(self, runtime: Runtime, number: int) -> None:
        self.runtime = runtime
        self.number = number
        self._lock = threading.Lock()
        self._users = 1
        before = runtime.current_context()
        runtime.call("aclrtSetDevice", number)
        try:
            self._default = runtime.current_context()
            self.physical_id = runtime.physical_id(number)
            self._context = runtime.create_context(number)
        except BaseException:
            runtime.call("aclrtResetDevice", number)
            raise
        finally:
            self._restore(before)

    def _restore(self, context: int | None) -> None:
        try:
            self.runtime.call("aclrtSetCurrentContext", context or self._default)
        except AclError as error:
            log.debug("the thread's own context is gone: %s", error)

    @contextlib.contextmanager
    def bound(self) -> Iterator[None]:
        """Run with our context current on the calling thread."""
        before = self.runtime.current_context()
        if before == self._context:
            yield
            return
        self.runtime.call("aclrtSetCurrentContext", self._context)
        try:
            yield
        finally:
            self._restore(before)

    def info(self, attribute: int) -> int:
        """A fact of the device by the number of its attribute."""
        value = ctypes.c_int64()
        with self.bound():
            self.runtime.call("aclrtGetDeviceInfo", self.number, attribute, ctypes.byref(value))
        return value.value

    def hold(self) -> None:
        """Keep the device open until :meth:`drop`."""
        with self._lock:
            self._users += 1

    def drop(self) -> None:
        """Undo :meth:`hold`, or the creation; the last one gives the device back."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
        self.runtime.call("aclrtDestroyContext", self._context)
        self.runtime.call("aclrtResetDevice", self.number)
