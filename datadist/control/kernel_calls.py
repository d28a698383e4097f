"""System calls that the control plane needs of the kernel, tried when an engine starts.

Seccomp filters of containers and services refuse calls with EPERM or ENOSYS. Where core can do without
a call, :func:`limits` says how. What is missing otherwise is raised by :func:`check`.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable

from datadist.base.process_access import ALLOW_CALL, REFUSALS
from datadist.control.process import open_peer, peer_of


class CallRefused(Exception):
    """The kernel refuses a call that every engine needs; the text names it and says what to do."""


def check() -> None:
    """Raise :class:`CallRefused` for the first call that is refused.

    Other errors, such as missing descriptors, pass as ``OSError``.
    """
    _try("epoll_create1", lambda: select.epoll().close())
    _try("socket(AF_UNIX)", lambda: socket.socket(socket.AF_UNIX).close())
    _try("getsockopt(SO_PEERCRED)", lambda: _with_peer(peer_of))


def limits() -> list[str]:
    """What is refused that an engine can do without, and what it does instead."""
    found = []
    try:
        os.close(os.eventfd(0, os.EFD_CLOEXEC))
    except OSError as error:
        if error.errno in REFUSALS:
            found.append(f"eventfd2 is refused ({error.strerror}): a pipe takes its place")
    if _with_peer(lambda sock: open_peer(sock, os.getpid())) is None:
        found.append(
            "neither SO_PEERPIDFD nor pidfd_open gives a descriptor of a process: the end of the "
            "connection tells the end of a peer, and memory that a killed peer was writing is kept"
        )
    return found


def _try(name: str, call: Callable[[], object]) -> None:
    try:
        call()
    except OSError as error:
        if error.errno in REFUSALS or error.errno == errno.EAFNOSUPPORT:
            raise CallRefused(f"{name} is refused here ({error.strerror}): {ALLOW_CALL}") from error
        raise


def _with_peer(look: Callable[[socket.socket], object]) -> object:
    """What is found of a socket whose peer is this process; a descriptor is closed.

    "" where there is no such socket to look at: engines do not need it.
    """
    try:
        ours, theirs = socket.socketpair()
    except OSError as error:
        if error.errno in REFUSALS:
            return ""
        raise
    with ours, theirs:
        found = look(ours)
        if isinstance(found, int):
            os.close(found)
        return found
