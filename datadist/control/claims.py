"""Claims: within one job and host a cluster id is one engine's, from its first `link` to `finalize`.

A claim is an fcntl lock on ``<cluster id>@<kernel>.claim`` in the runtime directory. The kernel
releases it when the process ends in any way, and forked children do not inherit it. It is also lost if
the process closes any descriptor of the file. Therefore no other code of this process opens the file
while the claim is held. A refused engine runs in another process.
``<cluster id>-<incarnation>@<kernel>.refused`` says that an engine was refused beside the holder with
that incarnation.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass

from datadist.base.file_size import check_size
from datadist.control.own_directory import open_file
from datadist.control.process import described, now, own_program
from datadist.control.runtime_dir import Address, RuntimeDir

log = logging.getLogger("datadist.control")

MAX_BYTES = 4096
FULL = (errno.ENOSPC, errno.EDQUOT)
"""The claim is the lock, which needs no space; what the file says is for people."""
TRIES = 100
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
    """The claim of one engine."""

    def __init__(self, directory: RuntimeDir, engine: Address) -> None:
        self._directory = directory
        self._engine = engine
        self._fd = -1
        self._closed = False
        self._rival = ""
        """Incarnation of an engine that took the id while our file was not there."""
        self._lock = threading.RLock()
        """Serialises calls of `link` and `finalize` on several threads."""

    def take(self) -> Claimant | None:
        """Claim our cluster id, once. Returns the holder if another live engine has it.

        Raises ``OSError``, and ``RuntimeError`` once :meth:`close` was called.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the engine was finalized")
            if self._fd >= 0:
                return None
            with self._directory.locked():
                holder = self._take()
                if holder is not None:
                    self._note_refusal(holder)
                return holder

    def _take(self) -> Claimant | None:
        for _ in range(TRIES):
            fd = self._open(self.name, os.O_RDWR | os.O_CREAT)
            try:
                if not self._lock_file(fd):
                    return _read(fd)
                if self._is_current(fd):
                    self._sign(fd)
                    self._fd, fd = fd, -1
                    return None
            finally:
                if fd >= 0:
                    os.close(fd)
        raise OSError(errno.EAGAIN, "others remove the file again and again")

    @property
    def is_held(self) -> bool:
        """Whether the id is ours."""
        return self._fd >= 0

    def is_lost(self) -> bool:
        """Whether the id is ours, but no file says so. Raises OSError where that cannot be seen."""
        fd = self._fd
        return fd >= 0 and not self._is_current(fd)

    def renew(self) -> None:
        """Make the file of a claim that is held again, where somebody removed it.

        It does not wait: where `link` or `finalize` is at it, the next time does. Raises ``OSError``.
        """
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self.is_lost():
                with self._directory.locked(0.0) as held:
                    if held:
                        self._take_again()
        finally:
            self._lock.release()

    def _take_again(self) -> None:
        before = self._fd
        holder = self._take()
        if holder is None:
            os.close(before)
        elif holder.incarnation != self._rival:
            self._rival = holder.incarnation
            log.warning(
                "somebody removed the claim on cluster id %d from %s, and another engine has taken the "
                "id: %s; end one of the two",
                self._engine.cluster_id, self._directory.place, holder,
            )  # fmt: skip

    def close(self) -> None:
        """Release the claim for good; idempotent."""
        with self._lock:
            self._closed = True
            fd, self._fd = self._fd, -1
            if fd < 0:
                return
            try:
                with suppress(OSError), self._directory.locked():
                    self._remove(_refused_beside(self._engine))
                    if self._is_current(fd):
                        self._remove(self.name)
            finally:
                os.close(fd)

    def abandon(self) -> None:
        """In a forked child, which does not hold it: close the descriptor."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def refused_beside(self, engine: Address) -> Claimant | None:
        """The engine that was refused the cluster id of an engine of our job; None if there is none."""
        try:
            fd = self._open(_refused_beside(engine), os.O_RDONLY)
        except OSError:
            return None
        try:
            return _read(fd)
        finally:
            os.close(fd)

    @property
    def name(self) -> str:
        """Name of the file."""
        return f"{self._engine.cluster_id}@{self._engine.kernel}.claim"

    def _sign(self, fd: int) -> None:
        """Write who we are into a file, in place of what it said."""
        claimant = Claimant(os.getpid(), own_program(), now(), self._engine.incarnation)
        os.ftruncate(fd, 0)
        try:
            os.pwrite(fd, json.dumps(asdict(claimant)).encode(), 0)
        except OSError as error:
            if error.errno not in FULL:
                raise
            log.warning(
                "%s is full, so others cannot see which process has cluster id %d: free space there",
                self._directory.place, self._engine.cluster_id,
            )  # fmt: skip

    def _open(self, name: str, flags: int) -> int:
        if flags & os.O_CREAT:
            check_size(MAX_BYTES)  # what is written beyond the limit ends the process
        return open_file(self._directory.fd, name, flags)

    def _remove(self, name: str) -> None:
        with suppress(OSError):
            os.unlink(name, dir_fd=self._directory.fd)

    def _lock_file(self, fd: int) -> bool:
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
            raise
        return True

    def _is_current(self, fd: int) -> bool:
        """Whether the file is still the one of that name: somebody may have removed it."""
        try:
            there = os.stat(self.name, dir_fd=self._directory.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(fd))

    def _note_refusal(self, holder: Claimant) -> None:
        """Record the refusal for engines that link with the holder."""
        name = _refused_beside(Address(self._engine.cluster_id, holder.incarnation))
        with suppress(OSError):
            fd = self._open(name, os.O_WRONLY | os.O_CREAT)
            try:
                self._sign(fd)
            finally:
                os.close(fd)


def _refused_beside(engine: Address) -> str:
    return f"{engine.full_name}.refused"


def _read(fd: int) -> Claimant:
    """The claimant that a file names; UNKNOWN if its content is missing."""
    try:
        said = json.loads(os.pread(fd, MAX_BYTES, 0))
        return Claimant(
            int(said["pid"]), str(said["program"]), float(said["started"]), str(said["incarnation"])
        )
    except (ValueError, KeyError, TypeError, OSError):
        return UNKNOWN
