"""Processes that end with a link up: no hang, no traceback of ours, and the peer hears of it."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from datadist import CacheKey
from tests import nodes
from tests.nodes import Node

Start = Callable[..., Node]
FAR = 60.0
PAIR = {1: 0, 2: 1}

PROGRAM = """
import atexit, os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
{before}
from datadist import *
engine = LLMDataDist(LLMRole.DECODER, 2)
OPTIONS = {{"llm.EnableCacheManager": "1", "llm.MemPoolConfig": '{{"memory_size": 16777216}}'}}
engine.init(OPTIONS)
cache = engine.cache_manager.allocate_cache(CacheDesc(2, [1, 1 << 20], DataType.DT_INT32))
comm_id = engine.link("exit", {{1: 0, 2: 1}}, {table!r})
engine.wait_link(comm_id)
def pull():
    engine.cache_manager.pull_cache(CacheKey(1, 2**64 - 1, prefix_id=7), cache)
def pull_without_end(started):
    while True:
        pull()
        started.set()
def pull_in_daemon_threads():
    for _ in range(4):
        started = threading.Event()
        threading.Thread(target=pull_without_end, args=[started], daemon=True).start()
        started.wait()
def say(what):
    try:
        print(what(), flush=True)
    except Exception as error:
        print(type(error).__name__, flush=True)
{ending}
"""
ENDS: dict[str, tuple[str, str, int, str, str]] = {
    "the end": ("", "", 0, "", ""),
    "sys.exit": ("", "sys.exit(4)", 4, "", ""),
    "an exception": ("", "raise ValueError('mine')", 1, "", "ValueError: mine"),
    "os._exit": ("", "os._exit(5)", 5, "", ""),
    "SIGTERM": ("", "os.kill(os.getpid(), signal.SIGTERM); signal.pause()", -15, "", ""),
    "SIGINT": ("", "os.kill(os.getpid(), signal.SIGINT); signal.pause()", -2, "", "KeyboardInterrupt"),
    "exec": ("", "os.execv('/bin/true', ['true'])", 0, "", ""),
    "daemon threads in a pull": ("", "pull_in_daemon_threads()", 0, "", ""),
    "SIGTERM, daemon threads": (
        "", "pull_in_daemon_threads(); os.kill(os.getpid(), signal.SIGTERM); signal.pause()", -15, "", "",
    ),
    "a thread that is waited for": (
        "", "threading.Timer(0.2, lambda: (pull(), print('pulled'))).start()", 0, "pulled\\n", "",
    ),
    "atexit, before our end": ("", "atexit.register(lambda: say(pull))", 0, "None\\n", ""),
    "atexit, after our end": (
        "atexit.register(lambda: say(lambda: engine.stats()))", "", 0, "RuntimeError\\n", "",
    ),
    "atexit, a new engine": (
        "atexit.register(lambda: say(lambda: LLMDataDist(LLMRole.MIX, 3).init(OPTIONS)))", "", 0,
        "(None|LLMException)\\n", "",
    ),
    "a destructor": (
        "", "class Late:\n    def __del__(self): say(engine.finalize)\nsys.modules['late'] = Late()",
        0, "(None\\n)?", "",
    ),
}  # fmt: skip


def _prompt(start_node: Start) -> Node:
    prompt = start_node(1)
    prompt.do(nodes.make, "a", "cache", [1, 1 << 20], 2, [CacheKey(1, 2**64 - 1, prefix_id=7)])
    prompt.do(nodes.fill, "a", 1)
    return prompt


def _loses(here: nodes.Here, comm_id: int) -> str | None:
    """Wait until the peer is lost; why."""
    deadline = time.monotonic() + FAR
    while (why := here.live.link_error(comm_id)) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return why


def _program(before: str, ending: str) -> str:
    return PROGRAM.format(before=before, ending=ending, table=nodes.table_for(PAIR))


def _environ(runtime_dir: Path) -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "DATADIST_RUNTIME_DIR": str(runtime_dir)}


def _end(start_node: Start, runtime_dir: Path, name: str, *flags: str) -> None:
    before, ending, status, output, last = ENDS[name]
    prompt = _prompt(start_node)
    prompt.begin(nodes.link_and_wait, "exit", PAIR)
    done = subprocess.run(
        [sys.executable, *flags, "-c", _program(before, ending)],
        capture_output=True, text=True, check=False, timeout=FAR, env=_environ(runtime_dir),
    )  # fmt: skip
    comm_id = prompt.result()
    begun = time.monotonic()
    assert prompt.do(_loses, comm_id)
    assert time.monotonic() - begun < FAR / 2
    assert done.returncode == status, done.stderr
    assert re.fullmatch(output, done.stdout), done.stdout
    lines = done.stderr.strip().splitlines()
    assert (lines[-1:] or [""]) == [last], done.stderr
    assert done.stderr.count("Traceback") == bool(last), done.stderr


@pytest.mark.parametrize("name", ENDS)
def test_ends(start_node: Start, runtime_dir: Path, name: str) -> None:
    _end(start_node, runtime_dir, name)


def test_ends_where_warnings_are_errors(start_node: Start, runtime_dir: Path) -> None:
    _end(start_node, runtime_dir, "daemon threads in a pull", "-X", "dev", "-W", "error")


def _child(runtime_dir: str) -> None:
    os.environ["DATADIST_RUNTIME_DIR"] = runtime_dir
    scope: dict[str, object] = {}
    exec(_program("", ""), scope)
    globals()["kept"] = scope


def test_a_child_of_multiprocessing_ends(start_node: Start, runtime_dir: Path) -> None:
    """Which runs no atexit handlers."""
    prompt = _prompt(start_node)
    prompt.begin(nodes.link_and_wait, "exit", PAIR)
    child = multiprocessing.get_context("spawn").Process(target=_child, args=(str(runtime_dir),))
    child.start()
    comm_id = prompt.result()
    child.join(FAR)
    assert child.exitcode == 0
    assert prompt.do(_loses, comm_id)


def test_other_daemon_threads_report_as_before(runtime_dir: Path) -> None:
    """Only exceptions of this library are expected at exit."""
    ending = (
        "go = threading.Event()\n"
        "def fail(): go.wait(); raise KeyError('mine')\n"
        "late = threading.Thread(target=fail, daemon=True); late.start()\n"
    )
    code = (
        "import atexit, threading\n"
        "atexit.register(lambda: (go.set(), late.join()))\n"  # runs after the engine's end
        "from datadist import *\n"
        "engine = LLMDataDist(LLMRole.DECODER, 2)\n"
        'engine.init({"llm.EnableCacheManager": "1", '
        '"llm.MemPoolConfig": \'{"memory_size": 16777216}\'})\n' + ending
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          timeout=FAR, env=_environ(runtime_dir))  # fmt: skip
    assert done.returncode == 0
    assert done.stderr.strip().splitlines()[-1] == "KeyError: 'mine'"
