"""Engines that start and end while other threads, a signal or a fork interfere."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datadist import LLMDataDist, LLMException, LLMRole
from tests import nodes
from tests.nodes import Node

Start = Callable[..., Node]
OPTIONS = {"llm.EnableCacheManager": "1", "llm.MemPoolConfig": '{"memory_size": 1048576}'}


def test_threads_do_not_start_two_engines(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATADIST_RUNTIME_DIR", str(runtime_dir))
    pair = [LLMDataDist(LLMRole.MIX, 1), LLMDataDist(LLMRole.MIX, 2)]
    try:
        assert sorted(_init_at_once(pair)) == ["LLM_FAILED", "ready"]
    finally:
        for engine in pair:
            engine.finalize()
    with pair[0]:
        assert _init_at_once(pair[:1] * 3) == ["ready"] * 3
        assert _control_threads() == 1
    assert _control_threads() == 0


def _init_at_once(engines: list[LLMDataDist]) -> list[str]:
    """What becomes of `init` of every engine, each in a thread."""
    results = []
    barrier = threading.Barrier(len(engines))

    def init(engine: LLMDataDist) -> None:
        barrier.wait(30)
        try:
            engine.init(dict(OPTIONS))
            results.append("ready")
        except LLMException as error:
            results.append(error.status_code.name)

    threads = [threading.Thread(target=init, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def _control_threads() -> int:
    return sum(thread.name == "datadist-control" for thread in threading.enumerate())


def test_a_child_forked_while_an_engine_starts_has_its_own(start_node: Start) -> None:
    one = start_node(1)
    one.do(nodes.finalize)
    assert one.do(_fork_while_starting) == "ready"


def _fork_while_starting(here: nodes.Here) -> str:
    """Fork while another thread is inside `init`; what becomes of an engine in the child."""
    inside, forked = threading.Event(), threading.Event()

    class Slow(dict[str, str]):
        def get(self, *_: Any) -> Any:  # what is done first with options
            inside.set()
            forked.wait(30)
            raise KeyError("never mind")

    def start() -> None:
        with contextlib.suppress(KeyError):
            LLMDataDist(LLMRole.MIX, 2).init(Slow())

    thread = threading.Thread(target=start)
    thread.start()
    assert inside.wait(30)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        nodes.init(nodes.Here(), 3)
        os.write(writing, b"ready")
        os._exit(0)
    forked.set()
    thread.join()
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading) as pipe:
        return pipe.read()
