"""Two hosts, which are network namespaces joined by a cable, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("pull_between_hosts.py")


@pytest.fixture
def hosts() -> Iterator[list[int]]:
    """Processes in the namespaces of 10.99.0.1 and 10.99.0.2."""
    missing = [tool for tool in ("ip", "nsenter", "unshare") if shutil.which(tool) is None]
    if missing and os.environ.get("DATADIST_TESTS_REQUIRED") == "1":
        pytest.fail(f"needs {', '.join(missing)}")
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (packages iproute2 and util-linux)")
    with ExitStack() as stack:
        pids = [stack.enter_context(_holder()).pid for _ in range(2)]
        _run("ip", "link", "add", "eth0", "netns", str(pids[0]), "type", "veth",
             "peer", "name", "eth0", "netns", str(pids[1]))  # fmt: skip
        for number, pid in enumerate(pids, 1):
            _inside(pid, "ip", "address", "add", f"10.99.0.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _inside(pid, "ip", "link", "set", device, "up")
        for pid in pids:
            _wait_running(pid)
        yield pids


@contextmanager
def _holder() -> Iterator[subprocess.Popen[str]]:
    command = ["unshare", "--net", "sh", "-c", "echo up; exec sleep 600"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "up\n"
            yield holder
        finally:
            holder.kill()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=60)


def _inside(pid: int, *command: str) -> None:
    _run("nsenter", "--target", str(pid), "--net", *command)


def _wait_running(pid: int) -> None:
    """The kernel reports a cable a moment after it is plugged in, and UCX looks at that."""
    command = ["nsenter", "--target", str(pid), "--net", "ip", "link", "show", "eth0"]
    end = time.monotonic() + 60
    while "state UP" not in subprocess.check_output(command, text=True, timeout=60):
        assert time.monotonic() < end, "the cable between the hosts does not work"
        time.sleep(0.02)


def _start(pid: int, cluster: int, folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(mode=0o700)
    command = ["nsenter", "--target", str(pid), "--net", sys.executable, str(PROGRAM), str(cluster)]
    environ = {"DATADIST_AUTH_KEY": "k" * 32, "DATADIST_RUNTIME_DIR": str(folder)}
    return subprocess.Popen(
        command, env={**os.environ, **environ}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_cache_is_pulled_from_another_host(hosts: list[int], tmp_path: Path) -> None:
    owner, puller = (_start(pid, n, tmp_path / str(n)) for n, pid in enumerate(hosts, 1))
    try:
        assert puller.stdout is not None
        line = puller.stdout.readline()
        for program in (puller, owner):
            _, errors = program.communicate(timeout=120)
            assert program.returncode == 0, errors
        assert line == "pulled\n"
    finally:
        for program in (puller, owner):
            program.kill()
            program.communicate()
