"""Network addresses with a port, as people write them: ``host:port`` or ``[IPv6]:port``."""

from __future__ import annotations

import socket
from typing import Any, NamedTuple

from datadist.base.addresses import is_address, looks_numeric
from datadist.base.digits import is_digits

BASE_PORT = 26500
"""Port of device 0 where a rank table gives only an address; below the kernel's ephemeral range."""


class HostPort(NamedTuple):
    """A host (a name, an IPv4 or an IPv6 address) and a TCP port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> HostPort:
        """Read ``host:port`` or ``[IPv6]:port``. Raises ``ValueError`` saying what is wrong."""
        host, colon, digits = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
            if not is_address(host) or ":" not in host:
                raise ValueError(f"{text!r}: expected an IPv6 address in the brackets")
        elif ":" in host:
            raise ValueError(f"{text!r}: write an IPv6 address as [address]:port")
        if not colon or not host or any(c.isspace() for c in host):
            raise ValueError(f"{text!r}: expected host:port or [IPv6 address]:port")
        if not is_address(host) and looks_numeric(host):
            raise ValueError(
                f"{text!r}: {host!r} is neither a name nor an IPv4 address, which is four decimal "
                "numbers from 0 to 255 without leading zeros"
            )
        if not is_digits(digits) or len(digits) > 5:
            raise ValueError(f"{text!r}: the port {digits!r} is not a number")
        if not 1 <= int(digits) <= 65535:
            raise ValueError(f"{text!r}: the port must be in [1, 65535]")
        return cls(host, int(digits))

    def resolve(self) -> list[tuple[socket.AddressFamily, Any]]:
        """Families and socket addresses; blocks unless the host is an address.

        Raises ``OSError`` for a name that is not known, and for what is neither name nor address.
        """
        if not is_address(self.host) and looks_numeric(self.host):
            raise OSError(f"{self.host!r} is neither a host name nor an address")
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except UnicodeError as error:  # a label that no resolver takes
            raise OSError(f"not a host name: {error}") from None
        return [(family, address) for family, _, _, _, address in found]

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
