"""Namespaces of this process, and which engines that are here could not be reached from it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from datadist.base.process_access import PROC, refusal, shows_our_pids
from datadist.control.default_place import existing_place
from datadist.control.own_directory import RuntimeDirError
from datadist.control.process import peer_of
from datadist.control.runtime_dir import Address, RuntimeDir, chosen_path
from datadist.diagnosis.finding import Finding, Level, on

SHM = on("shm")
INITIAL = {"pid": 0xEFFFFFFC, "user": 0xEFFFFFFD}
"""Inodes of the namespaces of the host (linux/proc_ns.h)."""
SHARED = {
    "pid": "registered memory is reached only by engines of the same one; pools by all that share the "
    "runtime directory",
    "user": "engines of the same one link, and those of one whose users are the same on the host; "
    "registered memory is reached in the same one, or from the one above",
}


def examine() -> Iterator[Finding]:
    """The namespaces, /proc, and the engines that are listed."""
    for kind in INITIAL:
        yield namespace(kind, PROC / "self/ns" / kind)
    if not shows_our_pids():
        yield Finding(
            "/proc", Level.NOTE, "it is of another pid namespace, or not mounted: programs of peers are "
            "not named, and small transfers of registered memory take longer",
            "mount -t proc proc /proc in the pid namespace", SHM,
        )  # fmt: skip
    path = chosen_path() or existing_place()
    if path is not None:
        yield from engines(path)


def namespace(kind: str, link: Path) -> Finding:
    """Whether this process is in the host's namespace of that kind."""
    name = f"{kind} namespace"
    try:
        inode = link.stat().st_ino
    except OSError as error:
        return Finding(name, Level.NOTE, f"unknown: {error}", "mount /proc", SHM)
    if inode == INITIAL[kind]:
        return Finding(name, Level.OK, "that of the host", "", SHM)
    return Finding(name, Level.OK, f"one of a container: {SHARED[kind]}", "", SHM)


def engines(path: Path) -> Iterator[Finding]:
    """Engines of the runtime directory, each with what of it cannot be reached from here."""
    if not path.exists():
        return
    try:
        directory = RuntimeDir(path)
    except RuntimeDirError:  # which the check of the directory reports
        return
    places = itertools.chain([directory], directory.others())
    found = [
        each for place in places for engine in place.engines() for each in _engine(place, engine)
    ]
    directory.close()
    yield from found


def _engine(place: RuntimeDir, engine: Address) -> Iterator[Finding]:
    name = f"engine of cluster {engine.cluster_id}"
    with suppress(OSError):
        sock = place.connect(engine)
        if sock is None:
            return
        with sock:
            pid, user = peer_of(sock)
        if user != os.geteuid():
            yield Finding(
                name, Level.NOTE, f"it belongs to user {user}, not to {os.geteuid()}: no link with it",
                "run both as one user, in containers with one mapping of users", SHM,
            )  # fmt: skip
            return
        why = refusal(pid)
        if why is not None:
            yield Finding(name, Level.NOTE, f"its registered memory cannot be reached: {why}",
                          "as said; pools are not concerned", SHM)  # fmt: skip
