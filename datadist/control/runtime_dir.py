"""The per-user directory where engines of one host find each other's sockets.

One socket per engine, ``<cluster id>-<incarnation>.sock``, and for one that listens on an address a
symbolic link ``<ip>:<port>`` to it; nothing else is ever put there.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"^(\d{1,20})-([0-9a-f]{32})\.sock$")
_LISTENING = re.compile(r"^[0-9.]{7,15}:\d{1,5}$")
_HIDDEN = re.compile(r"^\.[0-9a-f]{32}(-\d{1,5})?$")
HIDDEN_SECONDS = 60.0


class RuntimeDirError(Exception):
    """The directory cannot be used; the text says why and what to do."""


@dataclass(frozen=True)
class Address:
    """An engine's place in the directory."""

    cluster_id: int
    incarnation: str

    @property
    def file_name(self) -> str:
        """Name of the engine's socket."""
        return f"{self.cluster_id}-{self.incarnation}.sock"


def default_path(environ: Mapping[str, str] = os.environ) -> Path:
    """``DATADIST_RUNTIME_DIR``, else the fixed ``/tmp/datadist-<uid>``."""
    chosen = environ.get("DATADIST_RUNTIME_DIR")
    return Path(chosen) if chosen else Path("/tmp") / f"datadist-{os.geteuid()}"


class RuntimeDir:
    """The directory, opened once; all paths go through its descriptor (no 108-byte limit)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=False, exist_ok=True)
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise RuntimeDirError(
                f"cannot use the runtime directory {path}: {error.strerror}; create it with mode "
                "0700 or set DATADIST_RUNTIME_DIR to a directory that only you can enter"
            ) from error
        self._check(os.fstat(self._fd))

    def _check(self, info: os.stat_result) -> None:
        if info.st_uid == os.geteuid() and not stat.S_IMODE(info.st_mode) & 0o077:
            return
        os.close(self._fd)
        raise RuntimeDirError(
            f"the runtime directory {self.path} belongs to user {info.st_uid} with mode "
            f"{stat.S_IMODE(info.st_mode):04o}, expected user {os.geteuid()} with mode 0700; "
            "correct it or set DATADIST_RUNTIME_DIR"
        )

    def listen(self, address: Address) -> socket.socket:
        """A listening socket under the address's name, which appears only once it listens."""
        hidden, name = f".{address.incarnation}", address.file_name
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.bind(self._proc_path(hidden))
            sock.listen(128)
            sock.setblocking(False)
            os.rename(hidden, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except OSError as error:
            sock.close()
            raise RuntimeDirError(f"cannot listen in {self.path}: {error}") from error
        return sock

    def connect(self, address: Address) -> socket.socket | None:
        """A connection, or None where nobody listens (a stale name is removed)."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.setblocking(False)
        try:
            sock.connect(self._proc_path(address.file_name))
        except (ConnectionRefusedError, FileNotFoundError):
            sock.close()
            self.remove(address)
            return None
        except OSError:
            sock.close()
            raise
        return sock

    def remove(self, address: Address) -> None:
        """Take the name out of the directory; harmless when it is not there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address.file_name, dir_fd=self._fd)

    def engines(self) -> Iterator[Address]:
        """Every name that looks like an engine's, alive or not."""
        for name in os.listdir(self._fd):
            match = _NAME.match(name)
            if match:
                yield Address(int(match[1]), match[2])

    def publish(self, ip: str, port: int, address: Address) -> None:
        """Let ``ip:port`` lead to an engine; replaces what a crashed process left. Raises OSError."""
        hidden = f".{address.incarnation}-{port}"
        os.symlink(address.file_name, hidden, dir_fd=self._fd)
        os.rename(hidden, f"{ip}:{port}", src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def published(self, ip: str, port: int) -> Address | None:
        """The engine that ``ip:port`` leads to, alive or not; None where there is no such name."""
        try:
            match = _NAME.match(os.readlink(f"{ip}:{port}", dir_fd=self._fd))
        except OSError:
            return None
        return Address(int(match[1]), match[2]) if match else None

    def retract(self, ip: str, port: int, address: Address) -> None:
        """Undo :meth:`publish` unless another engine has the name now."""
        if self.published(ip, port) == address:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{ip}:{port}", dir_fd=self._fd)

    def sweep(self) -> None:
        """Remove the names that crashed processes left behind."""
        for address in self.engines():
            with contextlib.suppress(OSError):
                sock = self.connect(address)
                if sock is not None:
                    sock.close()
        for name in os.listdir(self._fd):
            with contextlib.suppress(FileNotFoundError):
                if self._is_left_over(name):
                    os.unlink(name, dir_fd=self._fd)

    def _is_left_over(self, name: str) -> bool:
        """Whether a name leads nowhere, or is hidden for longer than any engine hides one."""
        if _LISTENING.match(name):
            target = os.readlink(name, dir_fd=self._fd)
            return target not in os.listdir(self._fd)
        age = time.time() - os.stat(name, dir_fd=self._fd, follow_symlinks=False).st_mtime
        return bool(_HIDDEN.match(name)) and age > HIDDEN_SECONDS

    def close(self) -> None:
        """Close the descriptor of the directory, once; the directory stays."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _proc_path(self, name: str) -> str:
        return f"/proc/self/fd/{self._fd}/{name}"
