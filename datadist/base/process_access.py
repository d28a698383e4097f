"""Whether this process may read and write the memory of another one, and if not, why.

A process that owns registered memory is reached by process_vm_readv and process_vm_writev. The kernel
permits that as it permits ptrace (man 2 ptrace, "Ptrace access mode checking").
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from datadist.base.callers import tolerate

PROC = Path("/proc")
YAMA = PROC / "sys/kernel/yama/ptrace_scope"
REFUSALS = (errno.EPERM, errno.ENOSYS, errno.EACCES)
"""How a seccomp filter, a security module or an old kernel refuses a call."""
ALLOW_CALL = "allow it in the seccomp profile of the container or service"
"""What to do about that."""
NOWHERE = (1 << 64) - 4096
"""An address of the kernel, at which no process has memory."""
POOLS = "use memory of the pool instead of registered memory"
OTHER_NAMESPACE = (
    "its process is in another pid namespace, which is not visible here: let both share one (docker "
    f"--pid, Kubernetes shareProcessNamespace), or {POOLS}"
)


class _Range(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_uint64), ("size", ctypes.c_size_t))


def try_access(pid: int, write: bool = False) -> int:
    """0 if this process may read (or ``write``) the memory of process ``pid``, else the errno.

    The kernel checks the permission before the address. An address at which nothing can be mapped
    makes no page of the other process, and EFAULT says that the access is permitted.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    call = getattr(libc, _name(write), None)
    if call is None:
        return errno.ENOSYS
    byte = ctypes.c_char()
    mine, theirs = _Range(ctypes.addressof(byte), 1), _Range(NOWHERE, 1)
    call.restype = ctypes.c_ssize_t
    one = ctypes.c_ulong(1)
    if call(pid, ctypes.byref(mine), one, ctypes.byref(theirs), one, ctypes.c_ulong(0)) >= 0:
        return 0
    error = ctypes.get_errno()
    return 0 if error == errno.EFAULT else error


def refusal(pid: int | None, write: bool = False) -> str | None:
    """Why the memory of a process can not be read (or written) from here; None if it can.

    ``pid`` is as the kernel reports it for a peer: None or 0 is a process of another pid namespace. A
    process that has ended is not refused.
    """
    if not pid:
        return OTHER_NAMESPACE
    error = try_access(pid, write)
    return None if error in (0, errno.ESRCH) else why_refused(pid, error, write)


def why_refused(pid: int | None, error: int, write: bool = False) -> str:
    """The cause of an errno that process_vm_readv (or process_vm_writev) has for a process."""
    if not pid:
        return OTHER_NAMESPACE
    text = f"{_name(write)}: {os.strerror(error)}"
    if error not in REFUSALS:
        return text
    if try_access(os.getpid(), write) in REFUSALS:
        return (
            f"{text}, also for this process itself: allow {_name(write)} in the seccomp profile of the "
            f"container or service, or {POOLS}"
        )
    found = _differences(pid) or [
        "it is not dumpable (prctl PR_SET_DUMPABLE), in another user namespace, or protected by a "
        "security module"
    ]
    return (
        f"{text}: {'; '.join(found)}. Run both processes as one user in one user namespace, or this one "
        f"with CAP_SYS_PTRACE, or {POOLS}"
    )


def ptrace_scope() -> int:
    """kernel.yama.ptrace_scope; 0, which restricts nothing, where the kernel has none."""
    with tolerate(OSError, ValueError):
        return int(YAMA.read_text())
    return 0


def shows_our_pids() -> bool:
    """Whether /proc is of our pid namespace; otherwise its numbers mean other processes."""
    try:
        return os.readlink(PROC / "self") == str(os.getpid())
    except OSError:
        return False


def _name(write: bool) -> str:
    return "process_vm_writev" if write else "process_vm_readv"


def _differences(pid: int) -> list[str]:
    """What refuses the access, as far as /proc shows it: the kernel's checks in its order."""
    if not shows_our_pids():
        return []
    own, theirs = _status("self"), _status(str(pid))
    if not theirs or not own:
        return []
    return [
        *_other_user("user", own["Uid"], theirs["Uid"]),
        *_other_user("group", own["Gid"], theirs["Gid"]),
        *_other_namespace(pid),
        *_not_dumpable(pid, int(theirs["Uid"][1])),
        *_more_capabilities(own, theirs),
        *_yama(),
    ]


def _status(name: str) -> dict[str, list[str]]:
    try:
        lines = (PROC / name / "status").read_text(errors="replace").splitlines()
    except OSError:
        return {}
    parts = (line.partition(":") for line in lines)
    return {key: rest.split() for key, _, rest in parts}


def _other_user(kind: str, own: list[str], theirs: list[str]) -> list[str]:
    """The real id of the caller must equal the real, effective and saved id of the owner."""
    if set(theirs[:3]) == {own[0]}:
        return []
    return [f"it runs with {kind} ids {'/'.join(theirs[:3])}, this process as {kind} {own[0]}"]


def _other_namespace(pid: int) -> list[str]:
    """The links of ns/ are closed to who may not trace; the mapping of users is not."""
    try:
        own, theirs = ((PROC / name / "uid_map").read_text().split() for name in ("self", str(pid)))
    except OSError:
        return []
    return [] if own == theirs else ["it is in another user namespace"]


def _not_dumpable(pid: int, user: int) -> list[str]:
    """The directory of a process that is not dumpable belongs to root."""
    try:
        owner = os.stat(PROC / str(pid)).st_uid
    except OSError:
        return []
    if owner == user:
        return []
    return [
        "it is not dumpable (it called prctl PR_SET_DUMPABLE, or changed its user after its start)"
    ]


def _more_capabilities(own: dict[str, list[str]], theirs: dict[str, list[str]]) -> list[str]:
    more = int(theirs["CapPrm"][0], 16) & ~int(own["CapPrm"][0], 16)
    return [f"it has capabilities that this process lacks (mask {more:#x})"] if more else []


def _yama() -> list[str]:
    scope = ptrace_scope()
    return [f"kernel.yama.ptrace_scope is {scope}"] if scope else []
