"""Engines that start and end while other threads, a signal or a fork interfere."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datadist import LLMDataDist, LLMException, LLMRole, LLMStatusCode
from datadist.engine import engine as engine_module
from datadist.links import building
from tests import nodes
from tests.faults import scenarios
from tests.nodes import MIB, Node
from tests.waiting import until

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
    until(lambda: _control_threads() == 0)


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
    return _threads().count("datadist-control")


def _threads() -> list[str]:
    """Those of engines."""
    return [each.name for each in threading.enumerate() if each.name.startswith("datadist")]


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


# -- the end -------------------------------------------------------------------------------------


def _linked(start: Start) -> tuple[Node, int]:
    """A member with a cache and a long timeout, and the comm id of its link to another."""
    settings = {"pool": 16 * MIB, "sync_kv_timeout": 60_000}
    peer, we = start(1, **settings), start(2, **settings)
    for node in (peer, we):
        node.do(scenarios.prepare, 1)
    _, comm_id = nodes.link_pair(peer, we)
    return we, comm_id


def _finalize_during_unlink(here: nodes.Here, comm_id: int, who: str) -> tuple[list[float], float]:
    """Finalize while `unlink` waits for a transfer of many seconds.

    Seconds that `finalize` took, and those until nothing of the engine is left.
    """
    engine, took = here.live, []
    scenarios.slow_down(here)
    scenarios.begin(here, "mid-pull")
    scenarios.PAUSE = 1.0
    scenarios.go_on(here)
    links = engine._live(LLMStatusCode.LLM_FAILED)._links

    def finalize(*_: object) -> None:
        started = time.monotonic()
        engine.finalize()
        took.append(time.monotonic() - started)

    def strike() -> None:
        until(lambda: not links.domains, what="unlink has not begun")
        os.kill(os.getpid(), signal.SIGUSR1)

    started = time.monotonic()
    if who == "signal handler":
        signal.signal(signal.SIGUSR1, finalize)
        threading.Thread(target=strike).start()
        engine.unlink(comm_id)
    else:
        thread = threading.Thread(target=engine.unlink, args=(comm_id,))
        thread.start()
        until(lambda: not links.domains, what="unlink has not begun")
        finalize()
        thread.join()
    until(lambda: not _threads())
    return took, time.monotonic() - started


@pytest.mark.parametrize("who", ["signal handler", "another thread"])
def test_finalize_during_unlink(start_node: Start, who: str) -> None:
    we, comm_id = _linked(start_node)
    took, whole = we.do(_finalize_during_unlink, comm_id, who)
    assert len(took) == 1
    assert whole < 30  # the transfer would take 50 s, and unlink waits for it for 60
    assert we.do(scenarios.outcome)[0] in ("LLM_FAILED", "LLM_NOT_YET_LINK")
    assert [line for line in we.do(nodes.log_of) if "report it" in line] == []
    we.do(nodes.init, 2)


def _finalize_during_pull(here: nodes.Here) -> tuple[str, float, float]:
    """Outcome of a pull of a minute that a handler interrupts, its end, and that of the engine.

    Who waits for that pull waits for a minute, too.
    """
    from datadist_shm import link

    engine = here.live
    building.CLOSE_SECONDS = link.CLOSE_SECONDS = 60.0
    scenarios.PAUSE = 1.0
    scenarios.slow_down(here)
    signal.signal(signal.SIGUSR1, lambda *_: engine.finalize())

    def strike() -> None:
        until(lambda: here.any["slow"].pieces > 0)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=strike).start()
    started = time.monotonic()
    status, ended, _ = scenarios.pull_now(here)
    engine.init(dict(OPTIONS))  # waits for what is left
    whole = time.monotonic() - started
    until(
        lambda: _threads().count("datadist-finalize") == 1,
        what="the new engine's, which waits for finalize",
    )
    return status, ended - started, whole


def test_a_signal_handler_finalizes_during_a_pull(start_node: Start) -> None:
    we, _ = _linked(start_node)
    status, ended, whole = we.do(_finalize_during_pull, timeout=200)
    assert status in ("LLM_FAILED", "LLM_NOT_YET_LINK")
    assert ended < 30, "link and transport wait for the pull that the handler interrupted"
    assert whole < 45
    assert [line for line in we.do(nodes.log_of) if "mappings stay" in line] == []


def test_a_control_thread_that_hangs_keeps_nothing_open(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATADIST_RUNTIME_DIR", str(runtime_dir))
    monkeypatch.setattr(engine_module, "CONTROL_SECONDS", 0.2)
    engine = LLMDataDist(LLMRole.MIX, 1)
    engine.init(dict(OPTIONS))
    inner = engine._live(LLMStatusCode.LLM_FAILED)
    hangs = threading.Event()
    inner._reactor.post(lambda: hangs.wait(nodes.SECONDS))
    with pytest.raises(LLMException, match="control thread") as caught:
        engine.unlink_clusters([nodes.cluster_info(2, 1)])
    assert caught.value.status_code is LLMStatusCode.LLM_FAILED
    threading.Timer(1.0, hangs.set).start()
    engine.finalize()
    until(lambda: not _threads())
    del inner
    gc.collect()  # which warns of descriptors that were left open
    engine.init(dict(OPTIONS))
    engine.finalize()
