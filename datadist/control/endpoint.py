"""The address that an engine listens on for `link_clusters`, and how peers of this host find it.

The engine reserves the port. A symbolic link in the runtime directory, named after the address and
its network namespace, points to the engine's socket. Only an engine that uses the network accepts
connections at the port.
"""

from __future__ import annotations

import errno
import socket
from contextlib import suppress

from datadist.base.picklable import PicklableError
from datadist.control.hostport import HostPort
from datadist.control.job import described
from datadist.control.kernel import network_namespace
from datadist.control.listener import NetworkError, listen_problem
from datadist.control.network_discovery import NetworkDiscovery
from datadist.control.runtime_dir import (
    Address,
    RuntimeDir,
    listening_name,
)

ANY = "0.0.0.0"


class EndpointError(PicklableError):
    """An address cannot be listened on; the text says why and what to do.

    ``in_use`` is the address where another socket has the port.
    """

    def __init__(self, text: str, in_use: HostPort | None = None) -> None:
        super().__init__(text)
        self.in_use = in_use


class Endpoint:
    """A reserved address, published in the runtime directory from construction until :meth:`close`.

    ``address`` is IPv4 text, ``port`` 1 to 65535, or 0 for a free one; with ``remote`` engines of other
    hosts can dial it. Raises :class:`EndpointError`.
    """

    def __init__(
        self,
        directory: RuntimeDir,
        engine: Address,
        address: str,
        port: int,
        remote: NetworkDiscovery | None = None,
    ) -> None:
        self._asked = HostPort(address, port)
        self._directory = directory
        self._engine = engine
        self._remote = remote
        self._socket: socket.socket | None = None
        self.port = self._take_port()
        self.place = HostPort(address, self.port)
        """Where it is: the port is the real one where 0 was asked for."""
        self.name = listening_name(address, self.port)
        """Its name in the runtime directory."""
        try:
            directory.publish(*self.place, engine)
        except OSError as error:
            self._give_back()
            raise EndpointError(f"cannot list {self.place}: {error}") from error

    def renew(self) -> None:
        """Publish the address again where its name was removed. Raises OSError."""
        if not self._directory.has(self.name):
            self._directory.publish(*self.place, self._engine)

    def close(self) -> None:
        """Remove the address from the directory and release the port, also where its name stays there.

        Raises OSError where it does.
        """
        try:
            self._directory.retract(*self.place, self._engine)
        finally:
            self._give_back()

    def abandon(self) -> None:
        """In a forked child: close the descriptor, leave the directory alone."""
        if self._socket is not None:
            self._socket.close()

    def _take_port(self) -> int:
        """The port, which is ours until `_give_back`."""
        try:
            if self._remote is not None:
                return self._remote.listen(self._asked).endpoint.port
            self._socket = _bind(self._asked)
            port: int = self._socket.getsockname()[1]
            return port
        except NetworkError as error:
            raise EndpointError(str(error), error.in_use) from error

    def _give_back(self) -> None:
        if self._socket is not None:
            self._socket.close()
        elif self._remote is not None:
            self._remote.unlisten(self._asked)


def find(directory: RuntimeDir, address: str, port: int, far: bool) -> Address | None:
    """The engine of this host that listens at an address, or None.

    An address of this network namespace names an engine in it. Any other address is searched in the
    other namespaces that share the directory, unless the network can be used (``far``). Raises
    :class:`EndpointError` where several of these have the address.
    """
    there = directory.listening(port)
    if _is_local(address):
        here = network_namespace()
        known = {each.ip: each.engine for each in there if each.namespace == here}
        return known.get(address) or known.get(ANY)
    found = {each.engine for each in there if each.ip == address}
    if far or not found:
        return None
    if len(found) > 1:
        raise EndpointError(
            f"{len(found)} engines in different network namespaces listen at {HostPort(address, port)}, "
            "and this one belongs to none of these: give them addresses or ports that differ"
        )
    return found.pop()


def hint(directory: RuntimeDir, port: int) -> str:
    """A hint that names engines of this user that listen at the port elsewhere; or ""."""
    here = network_namespace()
    found = [
        f"cluster {each.engine.cluster_id} listens at {HostPort(each.ip, port)} in another network "
        "namespace (let it listen at an address of its own)"
        for each in directory.listening(port)
        if each.namespace != here
    ]
    for other in directory.others():
        with suppress(OSError):
            found += [
                f"cluster {each.engine.cluster_id} listens at {HostPort(each.ip, port)} in "
                f"{described(other.job)} (set the same DATADIST_JOB)"
                for each in other.listening(port)
            ]
    return "".join(f"; {text}" for text in dict.fromkeys(found))


def _bind(place: HostPort) -> socket.socket:
    """Bind the port without listening: engines of this host use the directory."""
    try:
        return _bound(place)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise listen_problem(place, error) from error
    try:
        return _bound_after_others(place)
    except OSError as error:
        raise listen_problem(place, error) from error


def _bound(place: HostPort, reuse: bool = False) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        sock.bind(place)
    except OSError:
        sock.close()
        raise
    return sock


def _bound_after_others(place: HostPort) -> socket.socket:
    """Bind a port that has connections which ended (TIME_WAIT). Raises OSError where it is in use.

    SO_REUSEADDR alone lets several sockets bind, as long as none of them listens. Of those that
    begin to listen, the first one has the port. It keeps the port when it ends to listen, and without
    the option nobody else gets it. A connection that comes in between is reset.
    """
    sock = _bound(place, reuse=True)
    try:
        sock.listen(1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        sock.close()
        raise
    return sock


def _is_local(address: str) -> bool:
    """Whether an address is one of this network namespace, as its routes say.

    Binding would not tell: ``net.ipv4.ip_nonlocal_bind`` allows any address. Nothing is sent.
    """
    if address == ANY:
        return True
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect((address, 9))
        except OSError:  # no route, or a broadcast address
            return False
        source = str(probe.getsockname()[0])
    return source == address or (source.startswith("127.") and address.startswith("127."))
