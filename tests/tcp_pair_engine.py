"""The engine of :mod:`tests.pair_engine` over TCP: for peers on other hosts, which the tests make."""

from __future__ import annotations

import socket
from dataclasses import replace

from datadist.transport import (
    Availability,
    Capabilities,
    Group,
    Link,
    OptionError,
    TransportOptions,
)
from tests.netcopy import NetCopy, NetCopyLink
from tests.pair_engine import PairEngine, PairTransport

CONNECT_SECONDS = 2.0


class TcpPairEngine(PairEngine):
    """Listens at one address."""

    def __init__(self, host: str) -> None:
        self._host = host
        super().__init__()

    def listen(self) -> socket.socket:
        return socket.create_server((self._host, 0))

    def dial(self, address: bytes) -> socket.socket:
        host, _, port = address.decode().rpartition(":")
        return socket.create_connection((host, int(port)), CONNECT_SECONDS)

    @property
    def address(self) -> bytes:
        return f"{self._host}:{self._listener.getsockname()[1]}".encode()


class TcpPairTransport(PairTransport):
    """The option ``device`` must name an interface of the namespace that it runs in."""

    same_host_only = False
    options = {"device": "must be there"}  # noqa: RUF012 - as plugins write it

    @classmethod
    def probe(cls) -> Availability:
        return Availability(True, "TCP")

    def make_engine(self, options: TransportOptions) -> PairEngine:
        device = options.extra.get("device", "lo")
        if device not in [name for _, name in socket.if_nameindex()]:
            raise OptionError(f"there is no device {device}")
        if options.listen_address is not None and options.auth_key is None:
            raise OptionError("beyond loopback it needs DATADIST_AUTH_KEY")
        self.engine = TcpPairEngine(options.listen_address or "127.0.0.1")
        return self.engine


class _WritesNearLink(NetCopyLink):
    def __init__(self, own: Capabilities, group: Group, *args: object) -> None:
        super().__init__(group, *args)  # type: ignore[arg-type]
        self._own, self._group = own, group

    def capabilities_of(self, rank: int) -> Capabilities:
        return replace(self._own, one_sided_write=self._group.peers[rank].address is None)


class WritesNear(NetCopy):
    """Peers on the same host can be written, those on another one cannot."""

    def open(self, group: Group, *args: object) -> Link:
        return _WritesNearLink(self.capabilities, group, *args)
