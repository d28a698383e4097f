"""Where engines of this user find each other: the runtime directory, its file system, file sizes."""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
from collections.abc import Iterator
from pathlib import Path

from datadist.base.file_size import LEAST, check_size
from datadist.control.default_place import existing_place, obstacle, usual_place
from datadist.control.job import described, job_name
from datadist.control.own_directory import RuntimeDirError
from datadist.control.runtime_dir import MAX_SOCKET_PATH, Address, RuntimeDir, chosen_path
from datadist.diagnosis.finding import Finding, Level, on

NAME = "runtime directory"


def examine() -> Iterator[Finding]:
    """Every finding about places."""
    yield from runtime_directory(chosen_path())
    yield file_size(resource.getrlimit(resource.RLIMIT_FSIZE)[0])


def runtime_directory(path: Path | None) -> Iterator[Finding]:
    """Whether engines of this user can use the runtime directory; None is the default one."""
    existed = existing_place() is not None if path is None else path.exists()
    try:
        directory = RuntimeDir(path)
    except RuntimeDirError as error:
        yield Finding(NAME, Level.PROBLEM, str(error), "as said")
        return
    try:
        yield _use(directory, existed)
        if path is None and directory.path != usual_place() and obstacle():
            yield Finding(
                "default runtime directory", Level.NOTE,
                f"{obstacle()}; the engines of this user use {directory.path}",
                "remove it (as root, where it is another user's), or set DATADIST_RUNTIME_DIR",
            )  # fmt: skip
        yield from _visibility(directory)
    finally:
        directory.close()
        if not existed:
            directory.path.rmdir()


def _use(directory: RuntimeDir, existed: bool) -> Finding:
    try:
        _probe(directory)
    except OSError as error:
        return Finding(
            NAME, Level.PROBLEM, f"no name can be made in {directory.path}: {error.strerror}",
            "free space and inodes there, see that it can be written to, or set DATADIST_RUNTIME_DIR",
        )  # fmt: skip
    if not existed:
        return Finding(NAME, Level.OK, f"{directory.path} can be made")
    listed = {directory.job: _engines(directory)}
    listed.update({other.job: _engines(other) for other in directory.others()})
    jobs = ", ".join(f"{count} in {described(job)}" for job, count in listed.items() if count)
    return Finding(NAME, Level.OK, f"{directory.path}: engines listed: {jobs or 'none'}")


def _probe(directory: RuntimeDir) -> None:
    """Make and remove what an engine has there. Raises OSError."""
    check_size(LEAST)
    name = f".probe-{secrets.token_hex(8)}"
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory.fd)
    try:
        os.write(fd, b"probe")
    finally:
        os.close(fd)
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=directory.fd)


def _visibility(directory: RuntimeDir) -> Iterator[Finding]:
    with contextlib.suppress(ValueError):  # a name that `init` refuses
        length = _longest_path(directory, job_name(os.environ))
        if length > MAX_SOCKET_PATH:
            yield Finding(
                "socket paths", Level.NOTE,
                f"paths of sockets in {directory.path} have {length} bytes and more, the kernel shows "
                f"{MAX_SOCKET_PATH}: a program that cleans up may not see that such an engine lives",
                "set DATADIST_RUNTIME_DIR to a shorter path, or exclude it from cleaning",
            )  # fmt: skip


def _longest_path(directory: RuntimeDir, job: str) -> int:
    name = Address(1, "0" * 32).file_name
    place = os.path.realpath(directory.path)
    inner = f".job-{job}/" if job else ""
    return len(os.fsencode(f"{place}/{inner}{name}"))


def file_size(limit: int) -> Finding:
    """Whether `ulimit -f` permits the files of engines and pools."""
    if limit == resource.RLIM_INFINITY:
        return Finding("file sizes", Level.OK, "unlimited")
    if limit < LEAST:
        return Finding(
            "file sizes", Level.PROBLEM, f"limit of {limit} bytes", "ulimit -f unlimited"
        )
    return Finding(
        "file sizes", Level.NOTE, f"limit of {limit} bytes: `init` refuses larger pools, which are files",
        "ulimit -f unlimited", on("shm"),
    )  # fmt: skip


def _engines(directory: RuntimeDir) -> int:
    return len(list(directory.engines()))
