"""What the system refuses for want of a resource: which limit that is, and what to do."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from pathlib import Path

from datadist.base.cgroups import groups, number

__all__ = ["explain", "is_shortage", "thread_limits"]

_THREADS_OF_HOST = Path("/proc/sys/kernel/threads-max")
_NO_THREAD = "can't start new thread"
"""What `threading` says with RuntimeError, in every version of Python."""
_IN_IMPORTS = {
    "Too many open files": errno.EMFILE,
    "failed to map segment": errno.ENOMEM,
    "annot allocate memory": errno.ENOMEM,
}
"""How the dynamic loader says it, with ImportError."""


def is_shortage(error: BaseException) -> bool:
    """Whether the system refused a thread, a descriptor or memory."""
    return _number(error) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)


def explain(error: BaseException) -> str:
    """The text of an error, with the limit that was met and the remedy where it is about a resource."""
    text = str(error) or type(error).__name__
    where, limits = _remedy(_number(error))
    return f"{text}{f' ({where})' * bool(where)}{f': {limits}' * bool(limits)}"


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, RuntimeError) and _NO_THREAD in str(error):
        return errno.EAGAIN
    if isinstance(error, ImportError):
        return next((code for text, code in _IN_IMPORTS.items() if text in str(error)), None)
    return None


def _remedy(code: int | None) -> tuple[str, str]:
    """Where to look, and the limits that are known."""
    if code == errno.EAGAIN:
        return "see `ulimit -u` for threads", "; ".join(thread_limits())
    if code == errno.EMFILE:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return "see `ulimit -n` for descriptors", f"this process may have {soft}"
    if code == errno.ENFILE:
        return "see `sysctl fs.file-max`", "the host has no descriptor left"
    if code == errno.ENOMEM:
        return "see `ulimit -v` and the memory of the container", _address_space()
    if code in (errno.ENOSPC, errno.EDQUOT):
        return "see `df` and `df -i`", ""
    return "", ""


def _address_space() -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return "" if soft == resource.RLIM_INFINITY else f"this process may map {soft} bytes"


def thread_limits() -> Iterator[str]:
    """Each limit of threads that holds for this process, in words, with what is used where known."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY:
        yield f"this user may have {soft} processes and threads"
    for group in groups("pids"):
        most, used = group.read("pids.max"), group.read("pids.current")
        if most is not None:
            yield f"the cgroup {group.path} may have {most} and has {used}"
    host = number(_THREADS_OF_HOST)
    if host is not None:
        yield f"the host may have {host}"
