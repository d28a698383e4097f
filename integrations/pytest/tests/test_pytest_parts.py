"""The parts of the plugin that need no engine: references, processes, memory, ports, surroundings."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from pytest_datadist import cutting, ports, processes
from pytest_datadist.environment import JOB, RUNTIME_DIR, Environment
from pytest_datadist.held import Held
from pytest_datadist.memory import shared_memory
from pytest_datadist.references import Reference, reference_to, resolve

SECONDS = 60.0


def top() -> str:
    return "found"


def test_a_function_is_found_by_its_reference() -> None:
    assert resolve(reference_to(top)) is top


def test_a_module_that_cannot_be_imported_is_found_by_its_file(tmp_path: Path) -> None:
    file = tmp_path / "beside.py"
    file.write_text("def number():\n    return 41 + 1\n")
    try:
        assert resolve(Reference("some.where.beside", str(file), "number"))() == 42
        other = tmp_path / "other.py"
        other.write_text("def number():\n    return 7\n")
        assert resolve(Reference("some.where.beside", str(other), "number"))() == 7
    finally:
        del sys.modules["some.where.beside"]


def test_importing_the_plugin_imports_no_engine() -> None:
    code = (
        "import sys, pytest_datadist.plugin; "
        "print(sorted({'datadist', 'numpy', 'pydantic', 'stevedore'} & set(sys.modules)))"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def _sleepers(pid: int) -> set[processes.Found]:
    """Children that sleep by now: a new one has its parent's command line for a moment."""
    return {each for each in processes.descendants(pid) if each.command.startswith("sleep")}


def test_descendants_are_found_and_killed() -> None:
    child = subprocess.Popen(["sh", "-c", "sleep 500 & wait"], stdout=subprocess.PIPE)
    try:
        deadline = time.monotonic() + SECONDS
        while not (found := _sleepers(child.pid)):
            assert time.monotonic() < deadline, processes.descendants(child.pid)
        (sleeper,) = found
        assert str(sleeper) == f"process {sleeper.pid} (sleep 500)"
        processes.kill(found, 10)
        child.communicate(timeout=60)
        assert processes.descendants(child.pid) == set()
    finally:
        child.kill()
        child.wait()


def test_a_process_is_found_by_its_environment() -> None:
    value = f"some value of {os.getpid()}"
    with subprocess.Popen(["sleep", "500"], env={"MARK": value}) as child:
        try:
            (found,) = processes.with_variable(f"MARK={value}", processes.everything())
            assert found.pid == child.pid
            assert processes.with_variable("MARK=some", processes.everything()) == set()
        finally:
            child.kill()


def test_helpers_of_python_are_no_descendants() -> None:
    sleeping = "import time; from multiprocessing import resource_tracker; time.sleep(500)"
    tracker = [sys.executable, "-c", f"# multiprocessing.resource_tracker\n{sleeping}"]
    with subprocess.Popen(tracker) as child:
        try:
            among = processes.everything()
            assert child.pid in {each.pid for each in processes.helpers(among)}
            assert child.pid not in {each.pid for each in processes.descendants(os.getpid(), among)}
        finally:
            child.kill()


def test_what_is_held_anew_is_named() -> None:
    before = Held.now()
    gate = threading.Event()
    thread = threading.Thread(target=gate.wait, name="waits")
    fd = os.memfd_create("some memory")
    os.ftruncate(fd, 8192)
    thread.start()
    try:
        assert any(each.size == 8192 for each in shared_memory())
        memory, waits = before.left_since()
    finally:
        gate.set()
        thread.join()
        os.close(fd)
    assert memory.startswith("shared memory memfd:some memory (8,192 bytes)")
    assert waits == "thread 'waits', which still runs"
    assert before.left_since() == []


def test_tcp_connections_with_a_process_are_cut() -> None:
    code = (
        "import socket, sys\n"
        "with socket.create_connection(('127.0.0.1', int(sys.argv[1]))) as sock:\n"
        "    print('here', flush=True)\n"
        "    print(sock.recv(1))\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        with subprocess.Popen(
            [sys.executable, "-c", code, port], stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            accepted, _ = server.accept()
            with accepted:
                assert child.stdout.readline() == "here\n"
                assert cutting.cut(os.getpid()) == 0
                assert cutting.cut(child.pid) == 1
                assert child.communicate(timeout=60)[0] == "b''\n"


def test_ports_are_free_and_below_those_of_the_kernel() -> None:
    found = ports.free(20)
    assert len(set(found)) == 20
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(found) < first
    with pytest.raises(OSError, match="are free"):
        ports.free(100_000)


def test_the_environment_is_set_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(JOB, raising=False)
    monkeypatch.setenv(RUNTIME_DIR, "/somewhere/of/the/user")
    environment = Environment()
    environment.set()
    assert os.environ[JOB] == environment.name
    assert os.environ[RUNTIME_DIR] == "/somewhere/of/the/user"
    inner = Environment()
    inner.name = "pytest-datadist-inner"
    inner.set()
    assert os.environ[JOB] == "pytest-datadist-inner"
    inner.restore()
    assert os.environ[JOB] == environment.name
    environment.restore()
    assert JOB not in os.environ
