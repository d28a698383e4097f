"""Pythons and systems that engines cannot run on say so at `init`: greenlets, no GIL, no /proc."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from datadist.base.patched_modules import REMEDY
from datadist.cli import main
from datadist.diagnosis import Level, python
from datadist.engine import interpreter
from datadist.engine.interpreter import BOOT_ID, PROC, check_proc, lacks_of_proc
from datadist.status import LLMException, LLMStatusCode

INIT = """
from datadist import *
OPTIONS = {"llm.EnableCacheManager": "1", "llm.MemPoolConfig": '{"memory_size": 1048576}'}
def attempt(call):
    try:
        call()
        print("fine", flush=True)
    except LLMException as error:
        print(error.status_code.name, error, flush=True)
engine = LLMDataDist(LLMRole.MIX, 1)
"""
PATCHES = {
    "gevent": "from gevent import monkey; monkey.patch_all()",
    "eventlet": "import eventlet; eventlet.monkey_patch()",
}
PARTIAL = {
    "gevent": "from gevent import monkey; monkey.patch_all(thread=False, socket=False, select=False, "
    "time=False, queue=False, event=False)",
    "eventlet": "import eventlet; eventlet.monkey_patch(thread=False, socket=False, select=False, "
    "time=False)",
}
LINK = """
attempt(lambda: engine.link("x", {1: 0, 2: 1}, '{"version": "1.0", "status": "completed", '
    '"server_count": "1", "server_list": [{"server_id": "a", "device": [{"device_id": "0", "rank_id": '
    '"0"}, {"device_id": "1", "rank_id": "1"}]}]}'))
"""
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(runtime_dir: Path) -> Run:
    """Runs Python code to its end."""

    def start(code: str, *prefix: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*prefix, sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True,
            check=False, timeout=120, env={**os.environ, "DATADIST_RUNTIME_DIR": str(runtime_dir)},
        )  # fmt: skip

    return start


def _needs(library: str) -> None:
    if find_spec(library) is None:  # importing it here would change this process
        pytest.skip(f"{library} is not installed")


@pytest.mark.parametrize("library", PATCHES)
@pytest.mark.parametrize("before", [True, False], ids=["before the import", "after the import"])
def test_replaced_modules_are_refused_at_init(run: Run, library: str, before: bool) -> None:
    _needs(library)
    parts = [PATCHES[library], INIT] if before else [INIT, PATCHES[library]]
    done = run("\n".join([*parts, "attempt(lambda: engine.init(OPTIONS))"]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        f"LLM_FAILED init needs threads, and {library} has replaced _thread.start_new_thread, "
    )
    assert "run the engine in a process of its own" in done.stdout


@pytest.mark.parametrize("library", PATCHES)
def test_modules_that_are_replaced_later_are_refused_at_link_and_do_not_hang_the_exit(
    run: Run, library: str
) -> None:
    _needs(library)
    done = run("\n".join([INIT, "attempt(lambda: engine.init(OPTIONS))", PATCHES[library], LINK]))
    first, second = done.stdout.splitlines()
    assert first == "fine"
    assert second.startswith(f"LLM_FAILED link needs threads, and {library} has replaced")
    assert done.returncode == 0
    assert "_finalize_at_exit" not in done.stderr


@pytest.mark.parametrize("library", PATCHES)
def test_the_remedy_works(run: Run, library: str) -> None:
    _needs(library)
    done = run("\n".join([PARTIAL[library], INIT, "attempt(lambda: engine.init(OPTIONS))", LINK]))
    assert (done.stdout, done.returncode) == ("fine\nfine\n", 0), done.stderr
    assert PARTIAL[library].partition("(")[2].split(")")[0] in REMEDY


def test_event_loops_of_asyncio_and_uvloop(run: Run) -> None:
    _needs("uvloop")
    body = (
        "import asyncio, uvloop\n"
        "async def use():\n"
        "    await asyncio.to_thread(attempt, lambda: engine.init(OPTIONS))\n"
        "    await asyncio.to_thread(engine.finalize)\n"
        "for loop in (asyncio.new_event_loop, uvloop.new_event_loop):\n"
        "    made = loop()\n"
        "    made.run_until_complete(use())\n"
        "    made.run_until_complete(made.shutdown_default_executor())\n"
        "    made.close()\n"
    )
    done = run(INIT + body)
    assert (done.stdout, done.stderr, done.returncode) == ("fine\nfine\n", "", 0)


def test_without_a_gil(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    with pytest.raises(LLMException, match="without the GIL") as caught:
        interpreter.check_interpreter("init")
    assert caught.value.status_code is LLMStatusCode.LLM_FAILED
    assert "PYTHON_GIL=1" in str(caught.value)
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: True, raising=False)
    interpreter.check_interpreter("init")


def _without_proc(option: str) -> list[str]:
    """A command that runs another one where /proc is empty, or has processes only."""
    mount = f'mount -t {option} none /proc && exec "$@"'
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", mount, "sh"]
    try:
        made = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if made.returncode:
        pytest.skip(f"mount namespaces cannot be made here: {made.stderr.strip()}")
    return command


def test_without_proc_init_says_so_and_leaves_nothing(run: Run, runtime_dir: Path) -> None:
    command = _without_proc("tmpfs")
    done = run(INIT + "attempt(lambda: engine.init(OPTIONS))", *command)
    assert done.stdout.startswith("LLM_FAILED the engine cannot start: there is no /proc/self/fd, ")
    assert "mount -t proc proc /proc" in done.stdout
    assert not list(runtime_dir.iterdir())
    doctor = run("import datadist.cli; print(datadist.cli.main(['doctor']))", *command)
    assert doctor.stderr == ""
    assert "PROBLEM /proc: there is no /proc/self/fd" in doctor.stdout
    assert doctor.stdout.splitlines()[-1] == "1"


def test_with_processes_only_in_proc_all_works_but_links_by_address(run: Run) -> None:
    command = _without_proc("proc -o subset=pid")
    listen = '{**OPTIONS, "llm.listenIpInfo": "127.0.0.1:0", "llm.LocalCommRes": ""}'
    body = (
        "attempt(lambda: engine.init(OPTIONS))\n" + LINK + "info = LLMClusterInfo()\n"
        "info.remote_cluster_id = 2\n"
        "info.append_local_ip_info('127.0.0.1', 0)\n"
        "info.append_remote_ip_info('127.0.0.1', 1)\n"
        "attempt(lambda: engine.link_clusters([info]))\n"
        "engine.finalize()\n"
        f"attempt(lambda: engine.init({listen.replace(':0', ':26701')}))\n"
    )
    done = run(INIT + body, *command)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["fine", "fine"], done.stderr
    assert lines[2].startswith(
        f"LLM_FAILED link_clusters: there is no {BOOT_ID}: mount all of /proc"
    )
    assert lines[3].startswith(f"LLM_FAILED the engine cannot listen: there is no {BOOT_ID}")


def test_what_doctor_says_of_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    assert lacks_of_proc(PROC) == ""
    check_proc()
    assert [finding.level for finding in python.examine()] == [Level.OK] * 4
    assert python.gil(False).level is Level.PROBLEM
    assert python.threads("gevent has replaced time.sleep").level is Level.PROBLEM
    assert python.proc("there is no /proc/self/fd", "").level is Level.PROBLEM
    assert python.proc("", f"there is no {BOOT_ID}").level is Level.NOTE
    main(["doctor", "--backend", "shm"])
    out = capsys.readouterr().out
    for name in ("Python", "GIL", "threads", "/proc"):
        assert f"ok      {name}: " in out
