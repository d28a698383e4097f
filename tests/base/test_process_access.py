"""Whether the memory of another process can be reached, and the cause if not."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from datadist.base import process_access
from datadist.base.process_access import refusal, try_access, why_refused
from tests import namespaces, privileges, seccomp
from tests.privileges import in_child

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be other users")


@pytest.fixture
def owner() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the same user."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("write", [False, True])
def test_a_process_of_ours_can_be_reached(owner: subprocess.Popen[bytes], write: bool) -> None:
    assert try_access(owner.pid, write) == try_access(os.getpid(), write) == 0
    assert refusal(owner.pid, write) is None


def test_the_attempt_makes_no_page_of_the_owner() -> None:
    memory = mmap.mmap(-1, 64 << 20)
    before = Path("/proc/self/statm").read_text().split()[1]
    for _ in range(1000):
        assert try_access(os.getpid()) == try_access(os.getpid(), True) == 0
    after = Path("/proc/self/statm").read_text().split()[1]
    more = int(after) - int(before)
    assert more < 500  # pages; the interpreter's own, and others may be given back
    memory.close()


def test_a_process_that_has_ended_is_not_refused() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert try_access(process.pid) == errno.ESRCH
    assert refusal(process.pid) is None


@pytest.mark.parametrize("pid", [0, None])
def test_a_process_without_a_number_here_is_in_another_namespace(pid: int | None) -> None:
    assert "another pid namespace" in str(refusal(pid))
    assert why_refused(pid, errno.EXDEV) == refusal(pid)


def test_another_user(owner: subprocess.Popen[bytes]) -> None:
    def look() -> str | None:
        privileges.become()
        return refusal(owner.pid)

    text = in_child(look)
    assert "it runs with user ids 0/0/0, this process as user 65534" in text
    assert "it has capabilities that this process lacks" in text


def test_more_capabilities(owner: subprocess.Popen[bytes]) -> None:
    def look() -> str | None:
        privileges.drop_ptrace()
        return refusal(owner.pid)

    assert f"lacks (mask {1 << privileges.CAP_SYS_PTRACE:#x})" in in_child(look)


def test_an_owner_that_is_not_dumpable(tmp_path: Path) -> None:
    def look() -> str | None:
        privileges.become()
        reading, writing = os.pipe()
        pid = os.fork()  # not dumpable, as it has changed its user
        if pid == 0:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
        text = refusal(pid)
        os.close(writing)
        os.waitpid(pid, 0)
        return text

    text = in_child(look)
    assert "it is not dumpable" in text
    assert "user ids" not in text
    assert "capabilities that" not in text


@seccomp.needed
@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS])
@pytest.mark.parametrize("write", [False, True])
def test_a_filter_of_this_process(owner: subprocess.Popen[bytes], write: bool, error: int) -> None:
    call = "process_vm_writev" if write else "process_vm_readv"

    def look() -> tuple[str | None, str | None]:
        seccomp.install([call], error)
        return refusal(owner.pid, write), refusal(owner.pid, not write)

    text = in_child(look)
    assert f"{call}: {os.strerror(error)}, also for this process itself" in text
    assert text.endswith("None)")


@namespaces.needed
def test_another_user_namespace(owner: subprocess.Popen[bytes]) -> None:
    def look() -> str | None:
        namespaces.enter_new(["user"])
        return refusal(owner.pid)

    assert "it is in another user namespace" in in_child(look)


@namespaces.needed
def test_the_numbers_of_a_foreign_proc_are_not_ours() -> None:
    def look() -> bool:
        namespaces.enter_new(["pid"])
        return process_access.shows_our_pids()

    assert process_access.shows_our_pids()
    assert in_child(look) == "False"


def test_without_proc_the_refusal_is_told_all_the_same(
    owner: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(process_access, "PROC", tmp_path)
    text = why_refused(owner.pid, errno.EPERM)
    assert "process_vm_readv: Operation not permitted" in text
    assert "another user namespace, or protected by a security module" in text


def test_yama_is_named(
    owner: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scope = tmp_path / "scope"
    scope.write_text("2\n")
    monkeypatch.setattr(process_access, "YAMA", scope)
    assert "kernel.yama.ptrace_scope is 2" in why_refused(owner.pid, errno.EPERM)
