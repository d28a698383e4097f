"""An open RDMA device: its protection domain, its limits, and the thread that handles its events."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import os
import resource
import select
import threading
from collections.abc import Iterator
from typing import Any

from datadist.base.threads import start
from datadist.transport import RegistrationError, TransportError
from datadist_rdma import verbs
from datadist_rdma.notification import Notification

log = logging.getLogger("datadist.rdma")

ACCESS = verbs.LOCAL_WRITE | verbs.REMOTE_READ | verbs.REMOTE_WRITE
"""Access flags of every memory region. The queue pair of a peer limits what the peer may do."""


class Device:
    """One device, opened. Closed by :meth:`close`, after its queue pairs and regions.

    Raises TransportError where it cannot be opened.
    """

    def __init__(self, library: verbs.Library, name: str) -> None:
        self.name = name
        self.library = library
        self.context = _open(library, name)
        self._closers = contextlib.ExitStack()
        self._closers.callback(library.close_device, self.context)
        with contextlib.ExitStack() as on_error:
            on_error.callback(self._closers.close)
            self.attributes = verbs.DeviceAttr()
            self._check("query", library.query_device(self.context, self.attributes))
            self.operations = verbs.DataPath(self.context)
            self.pd = self._made("protection domain", library.alloc_pd(self.context))
            self._closers.callback(library.dealloc_pd, self.pd)
            self.channel = self._made(
                "completion channel", library.create_comp_channel(self.context)
            )
            self._closers.callback(library.destroy_comp_channel, self.channel)
            self.events = Events(self)
            self._closers.callback(self.events.close)
            on_error.pop_all()

    def port(self, number: int) -> verbs.PortAttr:
        """State, MTU and largest message of a port."""
        attributes = verbs.PortAttr()
        error = self.library.query_port(self.context, number, attributes)
        self._check(f"query of port {number}", error)
        return attributes

    def register(self, address: int, size: int) -> Any:
        """A memory region (pointer to ``ibv_mr``). Raises RegistrationError."""
        region = self.library.reg_mr(self.pd, address, size, ACCESS)
        if not region:
            raise RegistrationError(_registration_text(self.name, address, size))
        return region

    def deregister(self, region: Any) -> None:
        """Undo :meth:`register`. Raises RegistrationError."""
        error = self.library.dereg_mr(region)
        if error:
            raise RegistrationError(
                f"{self.name} failed to release the memory: {verbs.error_text(error)}"
            )

    def close(self) -> None:
        """Close everything in order."""
        self._closers.close()

    def _check(self, what: str, error: int) -> None:
        if error:
            raise TransportError(f"{what} of {self.name} failed: {verbs.error_text(error)}")

    def _made(self, what: str, pointer: Any) -> Any:
        if not pointer:
            raise TransportError(f"{self.name} gives no {what}: {verbs.last_error()}")
        return pointer


class Events:
    """Wakes threads that wait for completions, and logs events of the device.

    One thread and one descriptor per device, however many queue pairs there are.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._tokens = itertools.count(1)
        self._waiters: dict[int, Notification] = {}
        self._pipe = os.pipe()
        self._async_fd = verbs.async_fd(device.context)
        os.set_blocking(device.channel.contents.fd, False)
        os.set_blocking(self._async_fd, False)
        self._thread = threading.Thread(target=self._run, name="datadist-rdma", daemon=True)
        try:
            start(self._thread)
        except BaseException as error:
            for fd in self._pipe:
                os.close(fd)
            if not isinstance(error, RuntimeError):
                raise
            raise TransportError(f"{device.name} cannot be used: {error}") from error

    def add(self) -> tuple[int, Notification]:
        """A token for a completion queue, and what its notifications set."""
        token, event = next(self._tokens), Notification()
        self._waiters[token] = event
        return token, event

    def remove(self, token: int) -> None:
        """Forget a completion queue."""
        self._waiters.pop(token, None)

    def close(self) -> None:
        """End the thread."""
        os.close(self._pipe[1])
        self._thread.join()
        os.close(self._pipe[0])

    def _run(self) -> None:
        channel = self._device.channel.contents.fd
        poller = select.poll()
        for fd in (channel, self._async_fd, self._pipe[0]):
            poller.register(fd, select.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._pipe[0] in ready:
                return
            if channel in ready:
                self._completions()
            if self._async_fd in ready:
                self._report()

    def _completions(self) -> None:
        library, queue, token = self._device.library, ctypes.c_void_p(), ctypes.c_void_p()
        while library.get_cq_event(self._device.channel, queue, token) == 0:
            library.ack_cq_events(queue, 1)
            waiter = self._waiters.get(token.value or 0)
            if waiter is not None:
                waiter.set()

    def _report(self) -> None:
        library, event = self._device.library, verbs.AsyncEvent()
        while library.get_async_event(self._device.context, event) == 0:
            kind = event.event_type
            library.ack_async_event(event)
            level = logging.INFO if kind in (9, 18) else logging.WARNING
            log.log(level, "%s: %s", self._device.name, verbs.EVENT_NAMES.get(kind, kind))


@contextlib.contextmanager
def listed(library: verbs.Library) -> Iterator[dict[str, int]]:
    """Names and pointers of all devices that libibverbs knows; the pointers are valid inside.

    Raises :class:`verbs.NoDevices`.
    """
    count = ctypes.c_int()
    devices = library.get_device_list(count)
    if not devices:
        raise verbs.NoDevices(
            f"the kernel has no RDMA support loaded: {verbs.last_error()} (module ib_uverbs)"
        )
    try:
        pointers = ctypes.cast(devices, ctypes.POINTER(ctypes.c_void_p))
        found = [pointers[number] for number in range(count.value)]
        yield {library.get_device_name(pointer).decode(): pointer for pointer in found}
    finally:
        library.free_device_list(devices)


def _open(library: verbs.Library, name: str) -> int:
    try:
        with listed(library) as devices:
            if name not in devices:
                raise TransportError(
                    f"libibverbs does not know the device {name}, only "
                    f"{', '.join(devices) or 'none'}: is its provider installed (Debian: "
                    "ibverbs-providers)?"
                )
            context = library.open_device(devices[name])
    except verbs.NoDevices as error:
        raise TransportError(str(error)) from None
    if not context:
        raise TransportError(
            f"cannot open {name}: {verbs.last_error()}; /dev/infiniband must be readable and "
            "writable, in containers too"
        )
    return int(context)


def _registration_text(name: str, address: int, size: int) -> str:
    number = ctypes.get_errno()
    text = f"{name} cannot register {size} bytes at {address:#x}: {verbs.error_text(number)}"
    if number == 12:  # ENOMEM
        text += (
            f"; the usual cause is the limit of locked memory (ulimit -l), which is "
            f"{_locked_limit()}: raise it"
        )
    elif number == 14:  # EFAULT
        text += "; the memory must be mapped, readable and writable, and in the host"
    return text


def _locked_limit() -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft // 1024} KiB"
    return f"{limit} for user {os.geteuid()}"
