"""The transport class: what `datadist` finds by the entry point ``ucx``."""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from datadist.plugin_options import refuse_unknown
from datadist.transport import (
    Access,
    Availability,
    Capabilities,
    Group,
    LinkError,
    Placement,
    Region,
    RegistrationError,
    Transport,
    TransportError,
    TransportOptions,
)
from datadist_ucx.link import UcxLink

LOOPBACK = "lo"
MS_ASYNC = 1


class UcxTransport(Transport):
    """TCP by UCX; HOST and DEVICE are labels on memory of the host.

    Option ``datadist.ucx.device``: the network interface to listen on and to use, default ``lo``.
    """

    api_version: ClassVar[int] = 2
    priority: ClassVar[int] = 1

    @classmethod
    def probe(cls) -> Availability:
        """Usable where the module ucxx is."""
        if importlib.util.find_spec("ucxx") is None:
            return Availability(False, "ucxx is not installed: pip install ucxx-cu12")
        return Availability(True, "UCX over TCP")

    def __init__(self, options: TransportOptions) -> None:
        refuse_unknown("ucx", options.extra, {"device": "network interface to use, default lo"})
        self._device = options.extra.get("device", LOOPBACK)
        if self._device != LOOPBACK and options.auth_key is None:
            raise TransportError(
                f"the option datadist.ucx.device is {self._device!r}: beyond loopback the secrets of "
                "links need a protected control plane: set DATADIST_AUTH_KEY"
            )
        try:
            from ucxx._lib import libucxx

            features = (libucxx.Feature.TAG, libucxx.Feature.WAKEUP)
            settings = {"TLS": "tcp", "NET_DEVICES": self._device, "WARN_UNUSED_ENV_VARS": "n"}
            self._context: Any = libucxx.UCXContext(settings, features)
        except Exception as error:
            raise TransportError(f"UCX does not start on {self._device}: {error}") from error

    @property
    def capabilities(self) -> Capabilities:
        """All there is, but the owner must run for others to reach its memory."""
        both = frozenset(Placement)
        return Capabilities(
            placements=both, foreign_memory=True, same_host_only=False, host_addressable=both,
            passive_target=False,
        )  # fmt: skip

    def allocate(self, size: int, placement: Placement) -> Region:
        """Anonymous memory, which goes with the region and its keeper."""
        try:
            keeper = (ctypes.c_char * size).from_buffer(mmap.mmap(-1, size))
        except (OSError, OverflowError, ValueError) as error:
            raise MemoryError(f"{size} bytes: {error}") from error
        return Region(ctypes.addressof(keeper), size, placement, keeper)

    def register(self, address: int, size: int, placement: Placement) -> Region:
        """Any memory of the process; msync says whether it is there."""
        first = address & -mmap.PAGESIZE
        area = ctypes.c_void_p(first), ctypes.c_size_t(address + size - first)
        if ctypes.CDLL(None).msync(*area, MS_ASYNC):
            raise RegistrationError(f"the {size} bytes at {address:#x} are not mapped here")
        return Region(address, size, placement)

    def release(self, region: Region) -> None:
        """The memory goes with its last user."""
        region.keeper = None

    def open(self, group: Group, regions: Sequence[Region], access: Access) -> UcxLink:
        """A worker of its own for each link, so that closing one is nothing to the others."""
        try:
            return UcxLink(group, regions, access, self._context)
        except Exception as error:
            raise LinkError(f"UCX gives no worker on {self._device}: {error}") from error

    def close(self) -> None:
        """Give the context back."""
        self._context = None

    def describe(self) -> Mapping[str, Any]:
        """The interface in use."""
        return {"device": self._device}
