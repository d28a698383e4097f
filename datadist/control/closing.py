"""Closing what peers have sent: `close` may block, or hang, for descriptors that another process made.

A socket with SO_LINGER blocks in it for as long as its sender chose, a file of a FUSE file system until
that answers. So does closing a socket in whose queue such descriptors lie. Memory files do not block.
"""

from __future__ import annotations

import array
import fcntl
import logging
import os
import queue
import socket
import termios
import threading
from collections.abc import Iterable
from contextlib import suppress

from datadist.base.texts import in_seconds
from datadist.base.threads import start

log = logging.getLogger("datadist.control")

MAX_WAITING = 256
"""From so many descriptors on that wait to be closed no connection is accepted."""
STOP_SECONDS = 1.0
"""How long the end of an engine waits for them."""


class Closer:
    """A thread that closes descriptors one after another; started by the constructor.

    Raises ``RuntimeError`` where no thread can be started.
    """

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = 0
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        start(self._thread)

    @property
    def waiting(self) -> int:
        """Descriptors that are not closed yet."""
        return self._waiting

    @property
    def full(self) -> bool:
        """Whether so many wait that no more may come."""
        return self._waiting >= MAX_WAITING

    def take(self, fds: Iterable[int]) -> None:
        """Close descriptors in a while, without waiting for that."""
        for fd in fds:
            with self._lock:
                self._waiting += 1
            self._queue.put(fd)

    def discard(self, fds: Iterable[int]) -> None:
        """Close descriptors that a peer sent: at once those that cannot block, the others in a while."""
        for fd in fds:
            if is_memory(fd):
                os.close(fd)
            else:
                self.take([fd])

    def close_socket(self, sock: socket.socket) -> None:
        """End a connection at once; what lies unread in its queue goes in a while."""
        with suppress(OSError):  # it was not connected
            sock.shutdown(socket.SHUT_RDWR)
        if sock.fileno() >= 0 and unread(sock) != 0:
            self.take([sock.detach()])
        else:
            sock.close()

    def close_listener(self, listener: socket.socket) -> None:
        """Stop listening, and end the connections that were never accepted."""
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # nobody can connect any more
        try:
            while True:
                self.close_socket(listener.accept()[0])
        except (BlockingIOError, InterruptedError):
            listener.close()
        except OSError:  # no descriptor is left, or there is none of it: what waits goes with it
            if listener.fileno() >= 0:
                self.take([listener.detach()])

    def tell(self) -> None:
        """Have the thread end once what waits is closed, without waiting for it."""
        if not self._stopped:
            self._stopped = True
            self._queue.put(None)

    def stop(self, timeout: float = STOP_SECONDS) -> None:
        """:meth:`tell`, and wait; says what is left after ``timeout`` seconds."""
        self.tell()
        self._thread.join(timeout)
        if self._thread.is_alive():
            log.warning(
                "%d descriptors that peers sent are not closed after %s (a socket that lingers, or a "
                "file system that does not answer?): they end with this process",
                self._waiting, in_seconds(timeout),
            )  # fmt: skip

    def _run(self) -> None:
        while (fd := self._queue.get()) is not None:
            with suppress(OSError):
                os.close(fd)
            with self._lock:
                self._waiting -= 1


def is_memory(fd: int) -> bool:
    """Whether a descriptor is of memory (memfd_create), which alone has seals."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def unread(sock: socket.socket) -> int | None:
    """Bytes that lie unread in a socket's queue; None where that cannot be told."""
    count = array.array("i", [0])
    try:
        fcntl.ioctl(sock, termios.FIONREAD, count)
    except (OSError, ValueError):
        return None
    return count[0]
