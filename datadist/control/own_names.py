"""What an engine has in the runtime directory: its socket, its claim, and the address it listens at.

Cleaners of /tmp remove what is old, and people remove what they do not know. So a live engine touches
its names, and makes those again that are gone, the directory included.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from pathlib import Path

from datadist.control.claims import Claims
from datadist.control.default_place import report_place
from datadist.control.endpoint import Endpoint
from datadist.control.network_discovery import NetworkDiscovery
from datadist.control.runtime_dir import Address, RuntimeDir
from datadist.control.stale_files import remove_stale_files

log = logging.getLogger("datadist.control")


class OwnNames:
    """The names of one engine; :class:`Discovery` removes them. Raises RuntimeDirError."""

    look_seconds = 5.0
    """Time between two looks whether they are all there."""

    def __init__(self, path: Path | None, job: str, address: Address) -> None:
        self.address = address
        self.directory = RuntimeDir(path, job)
        self.claims = Claims(self.directory, address)
        self.endpoint: Endpoint | None = None
        try:
            if path is None:
                report_place(self.directory.path)
            remove_stale_files(self.directory)
            self.listener = self.directory.listen(address)
        except BaseException:
            self.directory.leave()
            raise

    def listen_at(self, ip: str | None, port: int | None, remote: NetworkDiscovery | None) -> None:
        """Publish an address instead of the one before, see :class:`Endpoint`; None for none.

        An endpoint with the same port stays as it is, and any does where a free one is asked for (0).
        Raises :class:`EndpointError`; the engine listens nowhere then.
        """
        if self.endpoint is not None:
            if port in (0, self.endpoint.port):
                return
            before, self.endpoint = self.endpoint, None
            before.close()
        if ip and port is not None:
            self.endpoint = Endpoint(self.directory, self.address, ip, port, remote)

    def touch(self) -> bool:
        """Touch the names where they are old; whether all of them are there.

        It needs no descriptor at the usual place, and any thread may call it. Raises ``OSError`` where
        that cannot be seen.
        """
        names = self._names()
        self.directory.touch(*names)
        return (
            self.directory.is_current()
            and all(map(self.directory.has, names))
            and not self.claims.is_lost()
        )

    def _names(self) -> list[str]:
        endpoint, names = self.endpoint, [self.address.file_name]
        if self.claims.is_held:
            names.append(self.claims.name)
        if endpoint is not None:
            names.append(endpoint.name)
        return names

    def renew(self, replaced: Callable[[socket.socket], None]) -> None:
        """Make again what is gone; ``replaced`` gets the listener before, as soon as there is a new one.

        Raises :class:`RuntimeDirError`, or ``OSError``; the next call goes on then.
        """
        moved = self.directory.renew(self._names())
        if moved or not self.directory.has(self.address.file_name):
            before, self.listener = self.listener, self.directory.listen(self.address)
            replaced(before)
            log.warning(
                "somebody removed the socket of this engine: it was made again in %s (exclude the "
                "directory where a program cleans up)", self.directory.place,
            )  # fmt: skip
        self.claims.renew()
        if self.endpoint is not None:
            self.endpoint.renew()

    def abandon(self) -> None:
        """In a forked child: close the descriptors, leave the directory alone."""
        self.listener.close()
        self.claims.abandon()
        if self.endpoint is not None:
            self.endpoint.abandon()
        self.directory.close()
