"""Where engines of one user find each other if DATADIST_RUNTIME_DIR is not set.

All engines of the user follow one rule, which asks no variable: a login session, a cron job and a
service have different ones. XDG_RUNTIME_DIR would also end with the session. The rule:

1. A directory of ours that exists: ``/tmp/datadist-<uid>``, else the first by name of
   ``/tmp/datadist-<uid>.*``; else the same in the next of :func:`bases`.
2. Otherwise the first of these names that can be made. Where another user has ``datadist-<uid>``,
   the name gets a random suffix, which nobody can take beforehand.

A directory that others can write to, or of another user, is never used. The last engine that leaves an
unusual place removes it, so that the next ones come back to the usual one.
"""

from __future__ import annotations

import logging
import os
import pwd
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from datadist.base.shortage import is_shortage
from datadist.control.own_directory import RuntimeDirError, locked

log = logging.getLogger("datadist.control")

_WRITABLE_BY_OTHERS = 0o022
_KINDS = {stat.S_IFDIR: "directory", stat.S_IFLNK: "symbolic link"}


def bases() -> list[Path]:
    """Directories that have the default place, the usual one first."""
    return [Path("/tmp"), Path("/dev/shm"), Path(f"/run/user/{os.geteuid()}")]


def usual_place() -> Path:
    """The default place, unless something is in its way."""
    return bases()[0] / _name()


def _name() -> str:
    return f"datadist-{os.geteuid()}"


def existing_place() -> Path | None:
    """The directory that the rule chooses among those that exist; None if there is none.

    Raises ``OSError`` where no descriptor is left.
    """
    return next((found for base in bases() if (found := _existing(base)) is not None), None)


def default_place() -> Path:
    """The directory that the rule chooses; made where there is none.

    Raises :class:`RuntimeDirError`, and ``OSError`` where no descriptor is left.
    """
    found = existing_place()
    if found is not None:
        return found
    problems = []
    for base in bases():
        try:
            return _make(base)
        except OSError as error:
            if is_shortage(error):  # which says nothing about the directory
                raise
            problems.append(f"{base}: {error.strerror}")
    raise RuntimeDirError(
        f"no runtime directory can be made ({'; '.join(problems)}): free space or make one of these "
        "writable, or set DATADIST_RUNTIME_DIR to a directory that only you can enter"
    )


def report_place(path: Path) -> None:
    """Log why the default place is an unusual one."""
    problem = obstacle()
    if path != usual_place() and problem:
        log.warning(
            "%s, so the engines of user %d use the runtime directory %s: correct that, or set "
            "DATADIST_RUNTIME_DIR to a directory that only you can enter",
            problem, os.geteuid(), path,
        )  # fmt: skip
    elif path != usual_place():
        log.info("the runtime directory is %s, where engines of this user have been before", path)


def obstacle() -> str:
    """Why :func:`usual_place` is not used, for people; "" where nothing is in its way."""
    path = usual_place()
    try:
        info = path.lstat()
    except FileNotFoundError:
        return _problem_of(path.parent)
    except OSError as error:
        return f"{path}: {error.strerror}"
    kind = _KINDS.get(stat.S_IFMT(info.st_mode), "file")
    if info.st_uid != os.geteuid() or kind != "directory":
        return f"{path} is a {kind} of {_user(info.st_uid)}"
    if _is_usable(path):
        return ""
    if info.st_mode & _WRITABLE_BY_OTHERS:
        return f"{path} has mode {stat.S_IMODE(info.st_mode):04o}, so that others can write to it"
    return f"{path} cannot be written to (is its file system mounted read-only?)"


def _problem_of(base: Path) -> str:
    """Why nothing can be made in a base, or ""."""
    if not os.access(base, os.W_OK | os.X_OK, effective_ids=True):
        return f"{base} cannot be written to"
    with suppress(OSError):
        room = os.statvfs(base)
        if room.f_bavail == 0 or (room.f_files and room.f_favail == 0):
            return f"{base} is full"
    return ""


def _user(uid: int) -> str:
    try:
        return f"user {uid} ({pwd.getpwuid(uid).pw_name})"
    except KeyError:
        return f"user {uid}"


def _existing(base: Path) -> Path | None:
    """The first usable directory of ours in a base; only an unusual one costs a listing."""
    first = base / _name()
    if _is_usable(first):
        return first
    others: list[str] = []
    with suppress(OSError):
        others = sorted(each for each in os.listdir(base) if each.startswith(f"{first.name}."))
    return next((base / each for each in others if _is_usable(base / each)), None)


def _is_usable(path: Path) -> bool:
    """Whether it is a directory of ours that nobody else can write to, on a writable file system.

    Its mode becomes 0700: an odd umask, or somebody, may have left another one.
    """
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        if is_shortage(error):  # which says nothing about the directory
            raise
        return False
    try:
        info = os.fstat(fd)
        if info.st_uid != os.geteuid() or info.st_mode & _WRITABLE_BY_OTHERS:
            return False
        inner = f"/proc/self/fd/{fd}"
        if stat.S_IMODE(info.st_mode) & 0o777 != 0o700:
            os.chmod(inner, 0o700)
        return os.access(inner, os.W_OK | os.X_OK, effective_ids=True)
    except OSError:
        return False
    finally:
        os.close(fd)


def _make(base: Path) -> Path:
    """Make the default place in a base. Raises OSError where nothing can be made there."""
    first = base / _name()
    with suppress(FileExistsError):
        os.mkdir(first, 0o700)
    if _is_usable(first):
        return first
    fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with locked(fd):  # engines that start at the same time make one
            found = _existing(base)
            if found is None:
                found = base / f"{first.name}.{secrets.token_hex(8)}"
                os.mkdir(found, 0o700)
                os.chmod(found, 0o700)
            return found
    finally:
        os.close(fd)
