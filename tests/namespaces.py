"""Namespaces for tests: nodes that live in pid, user, mount, ipc and network namespaces of their own."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing.connection import Connection

import pytest

from tests import nodes
from tests.nodes import Node

FLAGS = {
    "mount": 0x00020000, "ipc": 0x08000000, "user": 0x10000000, "pid": 0x20000000,
    "net": 0x40000000, "uts": 0x04000000,
}  # fmt: skip
PR_SET_PDEATHSIG = 1
MS_REC, MS_PRIVATE = 0x4000, 1 << 18
CONTAINER = ("pid", "mount", "ipc", "net", "uts")
"""What a container has of its own, where nothing is shared."""


def missing() -> str | None:
    """Why no namespaces can be made here, or None."""
    if os.geteuid() != 0:
        return "namespaces of processes and users need root"
    if shutil.which("unshare") is None:
        return "unshare is not installed (Debian: util-linux)"
    return _refused()


@cache
def _refused() -> str | None:
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--user", "--map-root-user", "true"]
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    try:  # what sanitizers preload would end it
        subprocess.run(command, check=True, capture_output=True, timeout=30, env=plain)
    except (OSError, subprocess.SubprocessError) as error:
        return f"namespaces of processes and users cannot be made: {error}"
    return None


_reason = missing()
needed = pytest.mark.skipif(_reason is not None, reason=_reason or "")
"""Mark of tests that need such namespaces."""


class Contained(Node):
    """A node in new namespaces; ``proc``: with /proc of its own, as in a container."""

    def __init__(
        self, environ: Mapping[str, str], kinds: Sequence[str] = CONTAINER, proc: bool = True
    ) -> None:
        super().__init__(environ, serve_by=(serve_contained, tuple(kinds), proc))


def serve_contained(
    pipe: Connection, environ: dict[str, str], directory: str, kinds: Sequence[str], proc: bool
) -> None:
    """Serve as a node from within new namespaces."""
    enter_new(kinds)
    if "mount" in kinds:
        _call("mount", b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)
        if proc and "pid" in kinds:
            mount("proc", "/proc")
    nodes.serve(pipe, environ, directory)


def mount(kind: str, place: str, options: str = "") -> None:
    """Mount a file system of a kind, in a mount namespace of this process's own."""
    _call("mount", b"none", place.encode(), kind.encode(), ctypes.c_ulong(0), options.encode())


def enter_new(kinds: Sequence[str]) -> None:
    """Go on in new namespaces; of pids in a child, which ends with this process.

    This process waits for it, and ends with its status.
    """
    _call("unshare", ctypes.c_int(sum(FLAGS[kind] for kind in kinds)))
    if "user" in kinds:
        _map_root()
    if "pid" in kinds and (inner := os.fork()):
        _, status = os.waitpid(inner, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    _call("prctl", PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)


def _map_root() -> None:
    """Root of the namespace is the user who made it."""
    for name, text in (("setgroups", "deny"), ("uid_map", "0 0 1"), ("gid_map", "0 0 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
