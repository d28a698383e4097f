"""The address that an engine listens on for `link_clusters`, and how peers of this host find it.

The port is bound, so that nobody else can take it, and a symbolic link in the runtime directory,
named after the address, leads to the engine's socket there. The port itself is not opened to the
network here.
"""

from __future__ import annotations

import errno
import socket

from datadist.control.runtime_dir import Address, RuntimeDir

ANY = "0.0.0.0"


class EndpointError(Exception):
    """An address cannot be listened on; the text says why and what to do."""


class Endpoint:
    """A bound address, listed in the runtime directory from construction until :meth:`close`.

    ``address`` is IPv4 text, ``port`` 1 to 65535. Raises :class:`EndpointError`.
    """

    def __init__(self, directory: RuntimeDir, engine: Address, address: str, port: int) -> None:
        self.address = address
        self.port = port
        self._directory = directory
        self._engine = engine
        self._socket = _bind(address, port)
        try:
            directory.publish(address, port, engine)
        except OSError as error:
            self._socket.close()
            raise EndpointError(f"cannot list {address}:{port}: {error}") from error

    def close(self) -> None:
        """Take the address out of the directory and give the port back."""
        self._directory.retract(self.address, self.port, self._engine)
        self._socket.close()

    def abandon(self) -> None:
        """In a forked child: close the descriptor, leave the directory alone."""
        self._socket.close()


def find(directory: RuntimeDir, address: str, port: int) -> Address | None:
    """The engine of this host that listens at an address, or None."""
    found = directory.published(address, port)
    if found is None and _is_local(address):
        found = directory.published(ANY, port)
    return found


def _bind(address: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.bind((address, port))
    except OSError as error:
        sock.close()
        hints = {
            errno.EADDRINUSE: "another process uses this port: choose another one, or end it",
            errno.EADDRNOTAVAIL: "this host has no such address: use one that `ip addr` shows",
            errno.EACCES: "this user may not use it: choose a port above 1023",
        }
        hint = hints.get(error.errno or 0, error.strerror)
        raise EndpointError(f"cannot listen on {address}:{port}: {hint}") from error
    return sock


def _is_local(address: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
