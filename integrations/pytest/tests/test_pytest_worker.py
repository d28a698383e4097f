"""Workers: functions, what they keep, exceptions, deadlines and faults, in real processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from pytest_datadist import Call, Cluster, WorkerEnded, WorkerError, WorkerTimeout, cluster
from pytest_datadist.errors import RemoteTraceback
from pytest_datadist.isolation import Isolation
from pytest_datadist.pool import Pool

from datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    DataType,
    LLMDataDist,
    LLMException,
    LLMStatusCode,
)
from datadist.testing.processes import Process

DESC = CacheDesc(2, [4, 64], DataType.DT_FLOAT)
SECONDS = 60.0


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Processes for all tests of this module."""
    made = Pool()
    yield made
    made.close()


@pytest.fixture
def isolation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Isolation]:
    """Surroundings of one test."""
    monkeypatch.setenv("DATADIST_BACKEND", "shm")
    made = Isolation(tmp_path / "all" / "run", "test-of-workers")
    with ExitStack() as stack:
        stack.callback(made.leave)
        made.enter()
        yield made


@pytest.fixture
def made(pool: Pool, isolation: Isolation) -> Iterator[Cluster]:
    """Two linked workers."""
    found = cluster.make(pool, cluster.Shape(2), isolation, SECONDS, 1)
    yield found
    cluster.end(pool, found, isolation, False)


def filled(engine: LLMDataDist, value: float) -> Cache:
    cache = engine.cache_manager.allocate_blocks_cache(DESC, BlocksCacheKey(engine.cluster_id))
    for array in cache.numpy():
        array[:] = value
    return cache


def pull(engine: LLMDataDist, cache: Cache, *, block: int) -> float:
    engine.cache_manager.pull_blocks(BlocksCacheKey(1), cache, [block], [block])
    return float(cache.numpy()[1][block, 63])


def pid(_engine: LLMDataDist) -> int:
    return os.getpid()


def fail(_engine: LLMDataDist, text: str) -> None:
    raise ValueError(text)


class Odd(Exception):
    """Cannot be pickled."""

    def __init__(self, _one: int, _two: int) -> None:
        super().__init__("odd")


def fail_oddly(_engine: LLMDataDist) -> None:
    raise Odd(1, 2)


def leave(_engine: LLMDataDist) -> None:
    raise SystemExit(3)


def unpicklable(_engine: LLMDataDist) -> object:
    return lambda: None


def sleep(_engine: LLMDataDist, seconds: float) -> None:
    time.sleep(seconds)


def die(_engine: LLMDataDist) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def reason(engine: LLMDataDist, cluster_id: int) -> str:
    deadline = time.monotonic() + SECONDS
    while (found := engine.link_error(cluster_id=cluster_id)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def test_functions_run_in_processes_and_pull_from_each_other(made: Cluster) -> None:
    prompt, decoder = made
    assert made.run_all(pid) == [prompt.pid, decoder.pid]
    assert os.getpid() not in (prompt.pid, decoder.pid)
    prompt.keep(filled, 7.5)
    target = decoder.keep(filled, 0.0)
    assert decoder.run(pull, target, block=3) == 7.5
    with pytest.raises(TypeError, match="is no object of"):
        prompt.run(pull, target, block=3)


def test_exceptions_come_back_with_their_traceback(made: Cluster) -> None:
    with pytest.raises(ValueError, match="so it is") as caught:
        made[0].run(fail, "so it is")
    cause = caught.value.__cause__
    assert isinstance(cause, RemoteTraceback)
    assert "raise ValueError(text)" in str(cause)
    assert "remote.py" not in str(cause)
    own = made[1].keep(filled, 0.0)
    with pytest.raises(LLMException) as refused:
        made[1].run(pull, own, block=0)
    assert refused.value.status_code is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST


def test_other_exceptions_are_errors_of_the_worker(made: Cluster) -> None:
    with pytest.raises(WorkerError, match="Odd: odd"):
        made[0].run(fail_oddly)
    with pytest.raises(WorkerError, match="SystemExit: 3"):
        made[0].run(leave)
    assert made[0].run(pid) == made[0].pid


def test_what_cannot_travel_is_refused_in_words(made: Cluster) -> None:
    worker = made[0]
    with pytest.raises(TypeError, match=r"unpicklable returned cannot leave its process .*keep"):
        worker.run(unpicklable)
    with pytest.raises(TypeError, match="arguments of fail cannot be sent"):
        worker.run(fail, lambda: None)
    with pytest.raises(TypeError, match="top level of a module"):
        worker.run(lambda _engine: None)
    assert worker.keep(unpicklable)


def test_one_function_at_a_time(made: Cluster) -> None:
    running = made[0].start(sleep, 0.0)
    with pytest.raises(WorkerError, match="busy with sleep"):
        made[0].run(pid)
    assert running.result() is None
    assert isinstance(running, Call)
    with pytest.raises(WorkerError, match="taken already"):
        running.result()


def sleep_long(_engine: LLMDataDist, begun: Path) -> None:
    begun.touch()
    time.sleep(1000)


def test_a_function_that_is_late_is_killed_with_its_stacks(made: Cluster, tmp_path: Path) -> None:
    running = made[0].start(sleep_long, tmp_path / "begun")
    deadline = time.monotonic() + SECONDS
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(WorkerTimeout, match=r"(?s)did not end sleep_long.*in sleep_long"):
        running.result(0.3)
    with pytest.raises(WorkerEnded):
        made[0].run(pid)
    assert made[1].run(pid) == made[1].pid


def test_a_process_that_ends_is_named(made: Cluster) -> None:
    with pytest.raises(WorkerEnded, match="ended with signal SIGKILL"):
        made[0].run(die)


def test_kill_is_seen_by_the_other(made: Cluster) -> None:
    made[0].kill()
    assert "cluster 1 is gone" in made[1].run(reason, 1)


def test_a_stopped_owner_is_read(made: Cluster) -> None:
    prompt, decoder = made
    prompt.keep(filled, 2.5)
    target = decoder.keep(filled, 0.0)
    assert decoder.run(pull, target, block=0) == 2.5  # it has heard of the cache
    prompt.stop()
    with pytest.raises(WorkerError, match="is stopped: call cont"):
        prompt.run(pid)
    assert decoder.run(pull, target, block=1) == 2.5
    prompt.cont()
    assert prompt.run(pid) == prompt.pid


@pytest.mark.parametrize("state", ["idle", "busy", "stopped"])
def test_cut_ends_the_session_of_two_that_live(made: Cluster, state: str) -> None:
    prompt, decoder = made
    running = prompt.start(sleep, 0.5) if state == "busy" else None
    if state == "stopped":
        prompt.stop()
    assert made.cut(prompt, decoder) >= 1
    assert "cluster 1 is gone" in decoder.run(reason, 1)
    if state == "stopped":
        prompt.cont()
    if running is not None:
        running.result()
    assert "cluster 2 is gone" in prompt.run(reason, 2)
    with pytest.raises(WorkerError, match="no connection"):
        made.cut(prompt, decoder)


def test_processes_with_a_fault_are_replaced(pool: Pool, isolation: Isolation) -> None:
    first = cluster.make(pool, cluster.Shape(3), isolation, SECONDS, 1)
    pids = [worker.pid for worker in first]
    first[0].kill()
    first[1].stop()
    assert cluster.end(pool, first, isolation, False) == []
    second = cluster.make(pool, cluster.Shape(3), isolation, SECONDS, 1)
    assert {worker.pid for worker in second} & set(pids) == {pids[2]}
    assert len(second.run_all(pid)) == 3
    assert cluster.end(pool, second, isolation, False) == []


def crash(_engine: LLMDataDist) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_process_that_crashed_in_a_call_is_named(
    pool: Pool, isolation: Isolation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its end is seen at its pipe first."""
    alone = cluster.make(pool, cluster.Shape(1), isolation, SECONDS, 5)
    call = alone[0].start(crash)
    while not call.done:
        time.sleep(0.01)
    monkeypatch.setattr(Process, "crashed", lambda _process: False)
    (text,) = cluster.end(pool, alone, isolation, False)
    assert "SIGSEGV" in text


def say(_engine: LLMDataDist, text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def test_the_end_of_a_process_is_told_without_what_it_said_in_earlier_tests(
    pool: Pool, isolation: Isolation, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("in the first test", "in the second test"):
        alone = cluster.make(pool, cluster.Shape(1), isolation, SECONDS, 5)
        alone[0].run(say, text)
        deadline = time.monotonic() + SECONDS
        while text not in capsys.readouterr().err:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if text.startswith("in the first"):
            number = alone[0].pid
            assert cluster.end(pool, alone, isolation, False) == []
    assert alone[0].pid == number
    with pytest.raises(WorkerEnded) as caught:
        alone[0].run(die)
    assert str(caught.value).endswith("its last lines of stderr:\nin the second test")
    cluster.end(pool, alone, isolation, False)


def test_pools_are_looked_at_where_that_is_asked_for(pool: Pool, isolation: Isolation) -> None:
    alone = cluster.make(pool, cluster.Shape(1), isolation, SECONDS, 5)
    alone[0].keep(filled, 1.0)
    (text,) = cluster.end(pool, alone, isolation, True)
    assert "in the DEVICE pool of LLMDataDist(PROMPT, cluster_id=5" in text


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"count": 5}, "expected 1 to 4, of which a communication domain has no more"),
        ({"count": 17, "link": False}, "expected 1 to 16"),
        ({"count": 2, "roles": ["MIX"]}, "roles has 1 names for 2 workers"),
        ({"count": 1, "roles": ["BOTH"]}, "'BOTH', expected one of MIX, PROMPT, DECODER"),
    ],
)
def test_wrong_shapes_are_refused(settings: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        cluster.Shape(**settings)  # type: ignore[arg-type]
