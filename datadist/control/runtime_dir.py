"""The per-user directory where engines of one host and job find each other's sockets.

One socket per engine, ``<cluster id>-<incarnation>.sock``; for one that listens on an address a
symbolic link to it, ``<network namespace>@<ip>:<port>``; and what :mod:`datadist.control.claims` puts
there. The engines of a named job have a directory of their own inside, ``.job-<name>``. Who adds or
removes names that several engines may want holds the lock of the directory (:meth:`RuntimeDir.locked`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"^(\d{1,20})-([0-9a-f]{32})\.sock$")
_LISTENING = re.compile(r"^([0-9a-f]{8}-\d+)@([0-9.]{7,15}):(\d{1,5})$")
_JOB = ".job-"
"""No runtime directory that a user chooses begins like this."""
LOCK_SECONDS = 1.0
"""Longest wait for the lock of the directory; its holders need milliseconds."""


class RuntimeDirError(Exception):
    """The directory cannot be used; the text says why and what to do."""


@dataclass(frozen=True)
class Address:
    """An engine's place in the directory of its job."""

    cluster_id: int
    incarnation: str

    @property
    def file_name(self) -> str:
        """Name of the engine's socket."""
        return f"{self.cluster_id}-{self.incarnation}.sock"


@dataclass(frozen=True)
class Listening:
    """An address that an engine listens on, as seen in its network namespace."""

    namespace: str
    ip: str
    engine: Address


def engine_of(name: str) -> Address | None:
    """The engine whose socket has this name; None for any other name."""
    match = _NAME.match(name)
    return Address(int(match[1]), match[2]) if match else None


def place_of(directory: Path, job: str) -> Path:
    """A job's part of a runtime directory."""
    return directory / f"{_JOB}{job}" if job else directory


def job_of(place: Path) -> tuple[Path, str]:
    """The runtime directory that a job's part belongs to, and the job."""
    if place.name.startswith(_JOB):
        return place.parent, place.name.removeprefix(_JOB)
    return place, ""


def network_namespace() -> str:
    """Names this thread's network namespace and kernel: addresses mean something in one only."""
    kernel = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    return f"{kernel}-{os.stat('/proc/thread-self/ns/net').st_ino}"


def is_listening_name(name: str) -> bool:
    """Whether a name of the directory is that of an address."""
    return _LISTENING.match(name) is not None


def default_path(environ: Mapping[str, str] = os.environ) -> Path:
    """``DATADIST_RUNTIME_DIR``, else the fixed ``/tmp/datadist-<uid>``."""
    chosen = environ.get("DATADIST_RUNTIME_DIR")
    return Path(chosen) if chosen else Path("/tmp") / f"datadist-{os.geteuid()}"


class RuntimeDir:
    """One job's part of the directory, opened once; paths go through its descriptor (no 108-byte limit).

    ``job`` is a name that :func:`datadist.control.job.job_name` takes. Raises :class:`RuntimeDirError`.
    """

    def __init__(self, path: Path, job: str = "") -> None:
        self.path = path.absolute()
        self.job = job
        self.fd = -1
        """Descriptor of the job's part."""
        self._open()

    @property
    def place(self) -> Path:
        """The job's part, for people."""
        return place_of(self.path, self.job)

    def _open(self) -> None:
        self.close()
        self.fd = _enter(self.path, None, self.path)
        if self.job:
            outer, self.fd = self.fd, -1
            try:
                self.fd = _enter(Path(self.place.name), outer, self.place)
            finally:
                os.close(outer)

    def listen(self, address: Address) -> socket.socket:
        """A listening socket under the address's name, which appears only once it listens."""
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                self._listen(sock, address)
            except OSError as error:
                sock.close()
                if not self._vanished():
                    raise RuntimeDirError(f"cannot listen in {self.place}: {error}") from error
                self._open()  # the last engine of the job has removed the empty directory
            else:
                return sock

    def _listen(self, sock: socket.socket, address: Address) -> None:
        hidden = f".{address.incarnation}"
        sock.bind(self._proc_path(hidden))
        sock.listen(128)
        sock.setblocking(False)
        os.rename(hidden, address.file_name, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def _vanished(self) -> bool:
        return bool(self.job) and os.fstat(self.fd).st_nlink == 0

    def connect(self, address: Address) -> socket.socket | None:
        """A connection; None if no engine listens (a stale name is removed)."""
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
        """Take the name out of the directory; harmless when it is not there, or has to stay there."""
        with contextlib.suppress(OSError):
            os.unlink(address.file_name, dir_fd=self.fd)

    def engines(self) -> Iterator[Address]:
        """Every name that looks like an engine's, alive or not."""
        for name in os.listdir(self.fd):
            engine = engine_of(name)
            if engine is not None:
                yield engine

    def publish(self, ip: str, port: int, address: Address) -> None:
        """Let ``ip:port`` lead to an engine; replaces what a crashed process left. Raises OSError.

        It is an address of this thread's network namespace, where the engine has taken the port.
        """
        hidden = f".{address.incarnation}-{port}"
        with self.locked():
            os.symlink(address.file_name, hidden, dir_fd=self.fd)
            os.rename(hidden, _listening_name(ip, port), src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def listening(self, port: int) -> list[Listening]:
        """Who listens at a port, alive or not, in any network namespace that shares the directory."""
        found = []
        for name in os.listdir(self.fd):
            match = _LISTENING.match(name)
            if match and int(match[3]) == port:
                engine = self._target(name)
                if engine is not None:
                    found.append(Listening(match[1], match[2], engine))
        return found

    def _target(self, name: str) -> Address | None:
        """The engine that a symbolic link of the directory names."""
        try:
            return engine_of(os.readlink(name, dir_fd=self.fd))
        except OSError:
            return None

    def retract(self, ip: str, port: int, address: Address) -> None:
        """Undo :meth:`publish` unless another engine has the name now."""
        name = _listening_name(ip, port)
        with self.locked():
            if self._target(name) == address:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self.fd)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the directory. Waiting for another holder is limited, since it may be
        stopped.

        Raises ``OSError`` where no descriptor is left.
        """
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            deadline = time.monotonic() + LOCK_SECONDS
            while not _try_lock(fd) and time.monotonic() < deadline:
                time.sleep(0.001)
            yield
        finally:
            with contextlib.suppress(OSError):  # a child that was forked meanwhile has it, too
                fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def other_jobs(self) -> list[str]:
        """Names of the other jobs that have a place in the directory; "" is the one without a name."""
        with contextlib.suppress(OSError):
            names = [
                name.removeprefix(_JOB) for name in os.listdir(self.path) if name.startswith(_JOB)
            ]
            return [job for job in ("", *names) if job != self.job]
        return []

    def others(self) -> Iterator[RuntimeDir]:
        """The places of the other jobs, each open until the next one; but for those out of reach."""
        for job in self.other_jobs():
            with contextlib.suppress(RuntimeDirError):
                other = RuntimeDir(self.path, job)
                try:
                    yield other
                finally:
                    other.leave()

    def leave(self) -> None:
        """:meth:`close`; the last engine of a job removes the job's directory."""
        if self.job:
            with contextlib.suppress(OSError):  # another engine is there
                os.rmdir(self.place)
        self.close()

    def close(self) -> None:
        """Close the descriptor, once; the directory stays."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _proc_path(self, name: str) -> str:
        return f"/proc/self/fd/{self.fd}/{name}"


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # a file system without locks has none to wait for
        return error.errno != errno.EWOULDBLOCK
    return True


def _listening_name(ip: str, port: int) -> str:
    return f"{network_namespace()}@{ip}:{port}"


def _enter(path: Path, inside: int | None, shown: Path) -> int:
    """Make a directory unless it is there, and open it. Raises :class:`RuntimeDirError`."""
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700, dir_fd=inside)
            os.chmod(path, 0o700, dir_fd=inside)  # whatever the umask is
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(path, flags, dir_fd=inside)
    except OSError as error:
        raise RuntimeDirError(
            f"cannot use the runtime directory {shown}: {error.strerror}; create it with mode "
            "0700 or set DATADIST_RUNTIME_DIR to a directory that only you can enter"
        ) from error
    info = os.fstat(fd)
    if info.st_uid == os.geteuid() and not stat.S_IMODE(info.st_mode) & 0o077:
        return fd
    os.close(fd)
    raise RuntimeDirError(
        f"the runtime directory {shown} belongs to user {info.st_uid} with mode "
        f"{stat.S_IMODE(info.st_mode):04o}, expected user {os.geteuid()} with mode 0700; "
        "correct it or set DATADIST_RUNTIME_DIR"
    )
