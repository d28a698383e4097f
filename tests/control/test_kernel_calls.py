"""System calls that the control plane tries when an engine starts."""

from __future__ import annotations

import errno
import os
import socket
import subprocess

import pytest

from datadist.control import kernel_calls
from datadist.control.process import open_peer
from datadist.control.reactor import WAKE, WAKE_BYTES, Reactor, wake_descriptors
from tests import descriptors, seccomp
from tests.privileges import in_child

pytestmark = seccomp.needed

REFUSALS = [errno.EPERM, errno.ENOSYS, errno.EACCES]


def test_nothing_is_refused_here() -> None:
    before = descriptors.count()
    kernel_calls.check()
    assert kernel_calls.limits() == []
    assert descriptors.falls_to(before)


@pytest.mark.parametrize("error", REFUSALS)
@pytest.mark.parametrize("call", ["epoll_create1", "socket"])
def test_a_call_that_is_needed_is_named(call: str, error: int) -> None:
    def look() -> object:
        seccomp.install([call], error)
        kernel_calls.check()
        return "nothing"

    text = in_child(look)
    assert "CallRefused" in text
    assert call in text
    assert "seccomp profile" in text


@pytest.mark.parametrize("error", REFUSALS)
def test_what_can_be_replaced_is_told(error: int) -> None:
    def look() -> object:
        seccomp.install(["eventfd2", *seccomp.NO_PIDFD], error)
        kernel_calls.check()
        return kernel_calls.limits()

    text = in_child(look)
    assert "eventfd2 is refused" in text
    assert "pidfd_open" in text


@pytest.mark.parametrize("error", REFUSALS)
def test_a_call_that_only_this_check_uses_may_be_refused(error: int) -> None:
    def look() -> object:
        seccomp.install(["socketpair"], error)
        kernel_calls.check()
        return kernel_calls.limits()

    assert in_child(look) == "[]"


@pytest.mark.parametrize("calls", [["pidfd_open"], [seccomp.PEERPIDFD]])
def test_either_way_to_the_descriptor_of_a_process_is_enough(calls: list[str]) -> None:
    def look() -> object:
        seccomp.install(calls)
        return kernel_calls.limits()

    assert in_child(look) == "[]"


def test_without_descriptors_of_processes_a_peer_has_none() -> None:
    def look() -> object:
        seccomp.install(seccomp.NO_PIDFD)
        ours, _theirs = socket.socketpair()
        return open_peer(ours, os.getpid())

    assert in_child(look) == "None"


def test_a_missing_descriptor_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(os, "eventfd", fail)
    with pytest.raises(OSError, match="too many"):
        wake_descriptors()


def test_a_pipe_wakes_as_an_eventfd_does() -> None:
    def look() -> object:
        seccomp.install(["eventfd2"])
        woken, wake = wake_descriptors()
        assert woken != wake
        for _ in range(100_000):  # more than a pipe holds
            WAKE(wake, 1)
        assert os.read(woken, WAKE_BYTES)
        reactor = Reactor("test")
        answers = [reactor.call(lambda: 7, 60) for _ in range(3)]
        reactor.stop()
        return answers

    assert in_child(look) == "[7, 7, 7]"


def test_the_process_of_a_peer_that_has_ended_is_refused() -> None:
    def look() -> object:
        seccomp.install([seccomp.PEERPIDFD])
        return open_peer(ours, process.pid)

    ours, theirs = socket.socketpair(socket.AF_UNIX)
    process = subprocess.Popen(["true"])
    process.wait()
    with ours, theirs:
        assert "No such process" in in_child(look)
