"""Where engines of this user find each other: the runtime directory and its file system."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from datadist.control.default_place import existing_place, obstacle, usual_place
from datadist.control.job import described, job_name
from datadist.control.kernel import kernel_id
from datadist.control.own_directory import RuntimeDirError
from datadist.control.runtime_dir import (
    MAX_SOCKET_PATH,
    Address,
    RuntimeDir,
    chosen_path,
    engine_of,
)
from datadist.diagnosis.finding import Finding, Level

NAME = "runtime directory"


def examine() -> Iterator[Finding]:
    """Every finding about the runtime directory of this environment."""
    yield from findings(chosen_path())


def findings(path: Path | None) -> Iterator[Finding]:
    """Whether engines of this user can use the runtime directory; None is the default one."""
    existed = existing_place() is not None if path is None else path.exists()
    try:
        directory = RuntimeDir(path)
    except RuntimeDirError as error:
        yield Finding(NAME, Level.PROBLEM, str(error), "as said")
        return
    try:
        yield _use(directory, existed)
        yield from _default(directory, path is None)
        yield from _other_kernels(directory)
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
    if not os.statvfs(directory.fd).f_bavail:
        return Finding(
            NAME, Level.NOTE, f"the file system of {directory.path} is full",
            "free space there, so that engines can say who they are",
        )  # fmt: skip
    if not existed:
        return Finding(NAME, Level.OK, f"{directory.path} can be made")
    listed = {directory.job: _engines(directory)}
    listed.update({other.job: _engines(other) for other in directory.others()})
    jobs = ", ".join(f"{count} in {described(job)}" for job, count in listed.items() if count)
    return Finding(NAME, Level.OK, f"{directory.path}: engines listed: {jobs or 'none'}")


def _probe(directory: RuntimeDir) -> None:
    """Make and remove a file, as engines do there. Raises OSError."""
    name = f".probe-{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    os.close(os.open(name, flags, 0o600, dir_fd=directory.fd))
    os.unlink(name, dir_fd=directory.fd)


def _default(directory: RuntimeDir, is_default: bool) -> Iterator[Finding]:
    problem = obstacle()
    if is_default and problem and directory.path != usual_place():
        yield Finding(
            "default runtime directory", Level.NOTE,
            f"{problem}; the engines of this user use {directory.path}",
            "correct that (as root, where it is another user's), or set DATADIST_RUNTIME_DIR",
        )  # fmt: skip


def _other_kernels(directory: RuntimeDir) -> Iterator[Finding]:
    found = [engine_of(name) for name in os.listdir(directory.fd)]
    foreign = sum(each is not None and each.kernel != kernel_id() for each in found)
    if foreign:
        yield Finding(
            "engines of other kernels", Level.NOTE,
            f"{foreign} listed in {directory.path}: of other hosts that share it, or of an earlier boot",
            "they are not used, and stay; remove names of engines that have ended",
        )  # fmt: skip


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


def _engines(directory: RuntimeDir) -> int:
    return len(list(directory.engines()))
