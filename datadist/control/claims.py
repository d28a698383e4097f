"""Claims: within one job and host a cluster id is one engine's, from its first `link` to `finalize`.

A claim is a lock of fcntl on ``<cluster id>.claim`` in the runtime directory. The kernel takes it
back with the process, however that ends, and forked children do not inherit it. It is also lost when
the process closes any descriptor of the file: nothing else here opens it while it is held, and who is
refused closes a descriptor in its own process. ``<cluster id>-<incarnation>.contested`` says that an
engine was refused beside the holder with that incarnation.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import time
from dataclasses import asdict, dataclass

from datadist.control.process import described, now, own_program
from datadist.control.runtime_dir import Address, RuntimeDir

log = logging.getLogger("datadist.control")

MOST_BYTES = 4096
WRITING_SECONDS = 0.2
"""How long a holder may take to write who it is."""
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Claimant:
    """Who holds a claim, or was refused one."""

    pid: int
    program: str
    started: float
    """When it claimed the id, on the clock of :func:`datadist.control.process.now`."""
    incarnation: str

    def __str__(self) -> str:
        return described(
            self.pid or None, self.program, now() - self.started if self.started else None
        )


UNKNOWN = Claimant(0, "", 0.0, "0" * 32)


class Claims:
    """The claim of one engine; not thread-safe."""

    def __init__(self, directory: RuntimeDir, engine: Address) -> None:
        self._directory = directory
        self._engine = engine
        self._fd = -1

    def take(self) -> Claimant | None:
        """Claim our cluster id, once; its holder where that is another live engine.

        Raises ``OSError``.
        """
        if self._fd >= 0:
            return None
        while True:
            fd = os.open(
                self._name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600,
                dir_fd=self._directory.fd,
            )  # fmt: skip
            if not self._lock(fd):
                holder = _read_soon(fd)
                os.close(fd)
                self._contest(holder)
                return holder
            if self._is_current(fd):
                break
            os.close(fd)  # its holder removed it just now
        self._fd = fd
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(asdict(self._claimant())).encode(), 0)
        return None

    def release(self) -> None:
        """Give the id back; no-op without a claim."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            for name in (self._name, _contested(self._engine)):
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=self._directory.fd)
            os.close(fd)

    def abandon(self) -> None:
        """In a forked child, which does not hold it: close the descriptor."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def contest(self, engine: Address) -> Claimant | None:
        """Who was refused the cluster id of an engine of our job; None where nobody was."""
        try:
            fd = os.open(_contested(engine), os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory.fd)
        except OSError:
            return None
        try:
            return _read(fd)
        finally:
            os.close(fd)

    @property
    def _name(self) -> str:
        return f"{self._engine.cluster_id}.claim"

    def _claimant(self) -> Claimant:
        return Claimant(os.getpid(), own_program(), now(), self._engine.incarnation)

    def _lock(self, fd: int) -> bool:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                log.warning(
                    "the file system of %s has no locks (%s), so a second engine of cluster %d would "
                    "not be noticed: set DATADIST_RUNTIME_DIR to a local directory",
                    self._directory.place, error.strerror, self._engine.cluster_id,
                )  # fmt: skip
                return True
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            os.close(fd)
            raise
        return True

    def _is_current(self, fd: int) -> bool:
        try:
            there = os.stat(self._name, dir_fd=self._directory.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(fd))

    def _contest(self, holder: Claimant) -> None:
        """Leave word for those who will link with the holder."""
        name = _contested(Address(self._engine.cluster_id, holder.incarnation))
        with contextlib.suppress(OSError):
            fd = os.open(
                name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600,
                dir_fd=self._directory.fd,
            )  # fmt: skip
            try:
                os.pwrite(fd, json.dumps(asdict(self._claimant())).encode(), 0)
            finally:
                os.close(fd)


def _contested(engine: Address) -> str:
    return f"{engine.cluster_id}-{engine.incarnation}.contested"


def _read_soon(fd: int) -> Claimant:
    deadline = time.monotonic() + WRITING_SECONDS
    while (holder := _read(fd)) == UNKNOWN and time.monotonic() < deadline:
        time.sleep(0.002)
    return holder


def _read(fd: int) -> Claimant:
    """What a file says; UNKNOWN where its holder has not written it yet."""
    try:
        said = json.loads(os.pread(fd, MOST_BYTES, 0))
        return Claimant(
            int(said["pid"]), str(said["program"]), float(said["started"]), str(said["incarnation"])
        )
    except (ValueError, KeyError, TypeError, OSError):
        return UNKNOWN
