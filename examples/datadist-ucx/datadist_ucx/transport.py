"""The transport class: what `datadist` finds by the entry point ``ucx``."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, ClassVar

from datadist.messaging import MessagingTransport
from datadist.plugin_options import refuse_unknown
from datadist.transport import Availability, TransportError, TransportOptions
from datadist_ucx.engine import UcxEngine

LOOPBACK = "lo"
OPTIONS = {"device": "network interface to use, default lo"}


class UcxTransport(MessagingTransport):
    """TCP by UCX; HOST and DEVICE are labels on memory of the host.

    Option ``datadist.ucx.device``: the network interface to listen on and to use, default ``lo``.
    """

    api_version: ClassVar[int] = 2
    priority: ClassVar[int] = 1
    options: ClassVar[Mapping[str, str] | None] = OPTIONS

    @classmethod
    def probe(cls) -> Availability:
        """Usable where the module ucxx is."""
        if importlib.util.find_spec("ucxx") is None:
            return Availability(False, "ucxx is not installed: pip install ucxx-cu12")
        return Availability(True, "UCX over TCP")

    def make_engine(self, options: TransportOptions) -> UcxEngine:
        """Open UCX on that interface."""
        refuse_unknown("ucx", options.extra, OPTIONS)
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
            return UcxEngine(libucxx.UCXContext(settings, features))
        except Exception as error:
            raise TransportError(f"UCX does not start on {self._device}: {error}") from error

    def describe(self) -> Mapping[str, Any]:
        """The interface in use."""
        return {"device": self._device}
