"""The per-user directory where engines of one host and job find each other's sockets.

One socket per engine, ``<cluster id>-<incarnation>@<kernel>.sock``; for one that listens on an address
a symbolic link to it, ``<network namespace>@<ip>:<port>``; and what :mod:`datadist.control.claims` puts
there. The engines of a named job have a directory of their own inside, ``.job-<name>``. Who adds or
removes names that several engines may want holds the lock of the directory (:meth:`RuntimeDir.locked`).

Several kernels may share the directory (a network file system, a virtual machine). Names say which
kernel they belong to. Nobody uses or removes those of another one: whether their engines live cannot
be seen.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from datadist.control.default_place import default_place, existing_place, usual_place
from datadist.control.kernel import is_ours, kernel_id, network_namespace
from datadist.control.own_directory import LOCK_SECONDS, RuntimeDirError, enter, locked

_NAME = re.compile(r"^(\d{1,20})-([0-9a-f]{32})@([0-9a-f]{8})\.sock$")
_LISTENING = re.compile(r"^([0-9a-f]{8}-\d+)@([0-9.]{7,15}):(\d{1,5})$")
_JOB = ".job-"
"""No runtime directory that a user chooses begins like this."""
MAX_SOCKET_PATH = 107
"""Bytes of a socket's path that the kernel takes, without the last zero."""
TOUCH_SECONDS = 600.0
"""Age of a name's times at which it is touched: cleaners remove what is old for hours or days."""
TRIES = 5


@dataclass(frozen=True)
class Address:
    """An engine's place in the directory of its job."""

    cluster_id: int
    incarnation: str
    kernel: str = field(default_factory=kernel_id)

    @property
    def full_name(self) -> str:
        """Names the engine among those of all kernels that share the directory."""
        return f"{self.cluster_id}-{self.incarnation}@{self.kernel}"

    @property
    def file_name(self) -> str:
        """Name of the engine's socket."""
        return f"{self.full_name}.sock"


@dataclass(frozen=True)
class Listening:
    """An address that an engine listens on, as seen in its network namespace."""

    namespace: str
    ip: str
    engine: Address


def engine_of(name: str) -> Address | None:
    """The engine whose socket has this name; None for any other name."""
    match = _NAME.match(name)
    return Address(int(match[1]), match[2], match[3]) if match else None


def place_of(directory: Path, job: str) -> Path:
    """A job's part of a runtime directory."""
    return directory / f"{_JOB}{job}" if job else directory


def job_of(place: Path) -> tuple[Path, str]:
    """The runtime directory that a job's part belongs to, and the job."""
    if place.name.startswith(_JOB):
        return place.parent, place.name.removeprefix(_JOB)
    return place, ""


def kernel_of_listening(name: str) -> str | None:
    """The kernel of a name that is an address's; None for any other name."""
    match = _LISTENING.match(name)
    return match[1].partition("-")[0] if match else None


def chosen_path(environ: Mapping[str, str] = os.environ) -> Path | None:
    """``DATADIST_RUNTIME_DIR``; None means the default place."""
    chosen = environ.get("DATADIST_RUNTIME_DIR")
    return Path(chosen) if chosen else None


class RuntimeDir:
    """One job's part of the directory, opened once; paths go through its descriptor (no 108-byte limit).

    ``path`` None means the default place (:mod:`datadist.control.default_place`). ``job`` is a name
    that :func:`datadist.control.job.job_name` takes. Raises :class:`RuntimeDirError`.
    """

    def __init__(self, path: Path | None, job: str = "") -> None:
        self._chosen = None if path is None else path.absolute()
        self.job = job
        self.path, self.fd = self._opened()
        """The directory, and the descriptor of the job's part."""

    @property
    def place(self) -> Path:
        """The job's part, for people."""
        return place_of(self.path, self.job)

    def _opened(self) -> tuple[Path, int]:
        """The directory, by the rule as things are now, and its job's part; made where needed."""
        path = self._chosen or default_place()
        fd = enter(path, None, path)
        if not self.job:
            return path, fd
        place = place_of(path, self.job)
        try:
            return path, enter(Path(place.name), fd, place)
        finally:
            os.close(fd)

    def is_current(self) -> bool:
        """Whether the rule still leads to the directory that is open; makes nothing.

        Raises ``OSError`` where no descriptor is left, at an unusual place only.
        """
        path = self._chosen
        if path is None:
            path = self.path if self.path == usual_place() else existing_place()
        if path is None:
            return False
        try:
            return os.path.samestat(os.stat(place_of(path, self.job)), os.fstat(self.fd))
        except OSError:
            return False

    def renew(self, names: Iterable[str] = ()) -> bool:
        """Open the directory anew where its name leads to another one, or to none; whether it was so.

        ``names`` are removed from the one before. The descriptor keeps its number. Raises
        :class:`RuntimeDirError`; all is as before then.
        """
        path, fd = self._opened()
        try:
            if os.path.samestat(os.fstat(fd), os.fstat(self.fd)):
                return False
            for name in names:
                self._unlink(name)
            os.dup2(fd, self.fd, inheritable=False)
            self.path = path
            return True
        finally:
            os.close(fd)

    def listen(self, address: Address) -> socket.socket:
        """A listening socket under the address's name. Raises :class:`RuntimeDirError`.

        ``/proc/net/unix`` shows it with its path, where cleaners look for sockets that live, unless
        the path is too long.
        """
        for _ in range(TRIES):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                with self.locked():  # nobody takes a name for dead before it listens
                    self._listen(sock, address)
                return sock
            except OSError as error:
                sock.close()
                problem = error
                if not self.renew():
                    break  # otherwise the last engine of the job, or a cleaner, removed the directory
        raise RuntimeDirError(
            f"cannot listen in {self.place}: {problem.strerror or problem}; {_listen_remedy(problem)}"
        ) from problem

    def _listen(self, sock: socket.socket, address: Address) -> None:
        self.remove(address)
        sock.bind(self.socket_path(address))
        try:
            os.chmod(address.file_name, 0o600, dir_fd=self.fd)  # whatever the umask is
            sock.listen(128)
        except OSError:
            self.remove(address)
            raise
        sock.setblocking(False)

    def socket_path(self, address: Address) -> str:
        """The real path of an engine's socket; one through our descriptor where it is too long."""
        try:
            place = os.readlink(f"/proc/self/fd/{self.fd}")
            path = f"{place}/{address.file_name}"
            same = os.path.samestat(os.stat(place), os.fstat(self.fd))
        except OSError:
            same = False
        if same and len(os.fsencode(path)) <= MAX_SOCKET_PATH:
            return path
        return self._proc_path(address.file_name)

    def has(self, name: str) -> bool:
        """Whether a name is there. Raises OSError where that cannot be seen."""
        try:
            os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def touch(self, *names: str) -> None:
        """Set the times of the directory and of names in it, where these are old."""
        for path in (self.path, self.place):
            _touch(str(path), None)
        for name in names:
            _touch(name, self.fd)

    def connect(self, address: Address) -> socket.socket | None:
        """A connection; None if no engine listens (its name is removed if it is certainly dead)."""
        try:
            return self._connected(address)
        except (ConnectionRefusedError, FileNotFoundError):
            self._remove_dead(address)
            return None

    def _connected(self, address: Address) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.setblocking(False)
        try:
            sock.connect(self._proc_path(address.file_name))
        except OSError:
            sock.close()
            raise
        return sock

    def _remove_dead(self, address: Address) -> None:
        """Remove a name of our kernel at which nobody listens, or begins to; does not wait."""
        if not is_ours(address.kernel):
            return
        with contextlib.suppress(OSError), self.locked(0.0) as held:
            if not held:
                return
            try:
                self._connected(address).close()
            except ConnectionRefusedError:
                self.remove(address)

    def remove(self, address: Address) -> None:
        """Take the name out of the directory; harmless when it is not there, or has to stay there."""
        self._unlink(address.file_name)

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self.fd)

    def engines(self) -> Iterator[Address]:
        """Every name that looks like an engine's of our kernel, alive or not."""
        for name in os.listdir(self.fd):
            engine = engine_of(name)
            if engine is not None and engine.kernel == kernel_id():
                yield engine

    def publish(self, ip: str, port: int, address: Address) -> None:
        """Let ``ip:port`` lead to an engine; replaces what a crashed process left. Raises OSError.

        It is an address of this thread's network namespace, where the engine has taken the port.
        """
        hidden = f".{address.full_name}-{port}"
        with self.locked():
            self._unlink(hidden)
            os.symlink(address.file_name, hidden, dir_fd=self.fd)
            os.rename(hidden, listening_name(ip, port), src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def listening(self, port: int) -> list[Listening]:
        """Who listens at a port, alive or not, in any network namespace of our kernel."""
        found = []
        for name in os.listdir(self.fd):
            match = _LISTENING.match(name)
            if match and int(match[3]) == port:
                engine = self._target(name)
                if engine is not None and engine.kernel == kernel_id():
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
        name = listening_name(ip, port)
        with self.locked():
            if self._target(name) == address:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self.fd)

    def locked(self, seconds: float = LOCK_SECONDS) -> AbstractContextManager[bool]:
        """Hold the lock of the directory, see :func:`~datadist.control.own_directory.locked`."""
        return locked(self.fd, seconds)

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
        """:meth:`close`; the last engine of a job, and of an unusual place, removes the directory."""
        with contextlib.suppress(OSError):  # another engine is there
            if self.job:
                os.rmdir(self.place)
            if self._chosen is None and self.path != usual_place():
                os.rmdir(self.path)
        self.close()

    def close(self) -> None:
        """Close the descriptor, once; the directory stays."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _proc_path(self, name: str) -> str:
        return f"/proc/self/fd/{self.fd}/{name}"


def _touch(name: str, directory: int | None) -> None:
    with contextlib.suppress(OSError):  # of a file system that is read-only now, too
        info = os.stat(name, dir_fd=directory, follow_symlinks=False)
        oldest = min(info.st_atime, info.st_mtime, info.st_ctime)
        if abs(time.time() - oldest) > TOUCH_SECONDS:
            os.utime(name, dir_fd=directory, follow_symlinks=False)


def _listen_remedy(error: OSError) -> str:
    hints = {
        errno.ENOSPC: "free space or inodes there",
        errno.EDQUOT: "free space or inodes there",
        errno.EROFS: "mount its file system for writing",
        errno.EOPNOTSUPP: "its file system has no sockets",
        errno.EPERM: "its file system has no sockets",
    }
    hint = hints.get(error.errno or 0, "see that this user may write there")
    return f"{hint}, or set DATADIST_RUNTIME_DIR to another directory that only you can enter"


def listening_name(ip: str, port: int) -> str:
    """The name of an address of this thread's network namespace."""
    return f"{network_namespace()}@{ip}:{port}"
