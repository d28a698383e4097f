"""What `datadist doctor` says of system calls that are refused."""

from __future__ import annotations

import errno

import pytest

from datadist.diagnosis import Level, system_calls
from datadist.diagnosis.finding import Finding
from tests import seccomp
from tests.privileges import in_child

pytestmark = seccomp.needed

REFUSALS = [errno.EPERM, errno.ENOSYS]


def test_one_finding_where_nothing_is_refused() -> None:
    (finding,) = system_calls.examine()
    assert finding.level is Level.OK


def test_a_filter_that_refuses_nothing_needed_is_told() -> None:
    def look() -> list[Finding]:
        seccomp.install(["membarrier"])
        return list(system_calls.examine())

    text = in_child(look)
    assert "a seccomp filter is in force" in text
    assert text.count("Finding(") == 1


@pytest.mark.parametrize("error", REFUSALS)
@pytest.mark.parametrize(
    ("calls", "level", "word"),
    [
        (("epoll_create1",), "PROBLEM", "epoll_create1"),
        (("socket",), "PROBLEM", "socket(AF_UNIX)"),
        (("eventfd2",), "NOTE", "eventfd2 is refused"),
        (seccomp.NO_PIDFD, "NOTE", "pidfd_open"),
        (("process_vm_readv",), "NOTE", "process_vm_readv is refused: registered memory"),
        (("process_vm_writev",), "NOTE", "process_vm_writev is refused: registered memory"),
        (("madvise",), "NOTE", "madvise is refused"),
        (("fallocate",), "NOTE", "fallocate is refused"),
        (("mincore",), "NOTE", "mincore is refused"),
        (("sched_getaffinity",), "NOTE", "sched_getaffinity is refused"),
        (("prctl",), "NOTE", "prctl is refused: register_cache"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
def test_a_refused_call_is_named(calls: tuple[str, ...], level: str, word: str, error: int) -> None:
    def look() -> str:
        seccomp.install(calls, error)
        (finding,) = system_calls.examine()
        return f"{finding.level.name} {finding.found} -> {finding.remedy}"

    text = in_child(look)
    assert text.startswith(level)
    assert word in text
    assert not text.endswith("-> ")
