"""Faults inside our own process: signals, forks, exits, clocks, and finalize at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from datadist import CacheDesc, CacheKeyByIdAndIndex, DataType
from datadist.engine import engine as engine_module
from datadist.links import building
from tests import nodes
from tests.faults import scenarios
from tests.nodes import MIB, Node
from tests.waiting import comes_true

Start = Callable[..., Node]
PAIR = {1: 0, 2: 1}


def _pair(start: Start, **settings: Any) -> tuple[Node, Node, int]:
    settings = {"pool": 16 * MIB, "link_total_time": 20, **settings}
    peer, we = start(1, **settings), start(2, **settings)
    for node, seed in ((peer, 1), (we, 2)):
        node.do(scenarios.prepare, seed)
    _, comm_id = nodes.link_pair(peer, we)
    return peer, we, comm_id


# -- KeyboardInterrupt -----------------------------------------------------------------------


def _interrupted(here: nodes.Here, what: str, comm_id: int) -> str:
    """Interrupt a call after a while; what came of it."""
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        if what == "wait_link":
            here.live.wait_link(
                here.live.link("lonely", {2: 0, 9: 1}, nodes.table_for({2: 0, 9: 1}))
            )
        elif what == "link_clusters":
            here.live.link_clusters([nodes.cluster_info(9, 1)], 1000)
            timer.join()
        elif what == "look-up":
            nodes.pull_cache(here, CacheKeyByIdAndIndex(1, 99, 0), "c")
        elif what == "allocate":
            cache = here.live.cache_manager.allocate_cache(_most_of_the_pool())
            here.live.cache_manager.deallocate_cache(cache)
        elif what == "finalize":
            here.live.finalize()
        else:
            scenarios.slow_down(here)
            scenarios.move(here, what)
        timer.join()
        time.sleep(1)
    except KeyboardInterrupt:
        return "interrupted"
    return "not interrupted"


def _most_of_the_pool() -> CacheDesc:
    """A cache for which another one of the kind has to go first."""
    return CacheDesc(1, [1, 9 * MIB // 4], DataType.DT_INT32)


def _hand_out(here: nodes.Here) -> None:
    """Free a large cache that the peer knows: its pages return when the peer agrees."""
    cache = here.live.cache_manager.allocate_cache(_most_of_the_pool())
    here.any["known"] = cache


def _take_back(here: nodes.Here) -> None:
    here.live.cache_manager.deallocate_cache(here.any.pop("known"))


@pytest.mark.parametrize(
    "what",
    ["wait_link", "link_clusters", "look-up", "allocate", "mid-pull", "mid-push", "mid-async"],
)
def test_an_interrupted_call_leaves_a_usable_engine(start_node: Start, what: str) -> None:
    writes = what in ("mid-push", "mid-async")
    peer, we, comm_id = _pair(start_node, enable_remote_cache_accessible=writes)
    if what == "allocate":
        we.do(_hand_out)
        peer.do(nodes.pull_cache, CacheKeyByIdAndIndex(2, 1, 0), "c")  # it has heard of all by now
    if what in ("look-up", "allocate"):
        peer.pause()
    if what == "allocate":
        we.do(_take_back)
    assert we.do(_interrupted, what, comm_id) == "interrupted"
    if what in ("look-up", "allocate"):
        peer.resume()
    if what.startswith("mid-"):
        scenarios.check_moved(we, peer, what, whole=False)
        we.do(scenarios.fill, 2)
        peer.do(scenarios.fill, 1)
    assert we.do(scenarios.pull_now)[0] == "OK"
    if what in ("mid-pull", "mid-push"):  # a task goes on: it was not interrupted itself
        scenarios.check_moved(we, peer, "mid-pull", whole=True)
    we.do(nodes.unlink, comm_id)
    peer.do(nodes.unlink, 1)
    _link_again(peer, we)
    we.do(nodes.finalize)


def _link_again(peer: Node, we: Node) -> None:
    nodes.link_pair(peer, we, "again")
    assert we.do(scenarios.pull_now)[0] == "OK"


def test_an_interrupted_finalize_can_be_called_again(start_node: Start) -> None:
    peer, we, comm_id = _pair(start_node)
    peer.pause()  # finalize waits for its answer
    assert we.do(_interrupted, "finalize", comm_id) == "interrupted"
    peer.resume()
    we.do(nodes.finalize)
    assert we.do(_threads_of_engines) == []
    we.do(nodes.init, 2, 16 * MIB)
    we.do(scenarios.prepare, 2)
    peer.do(nodes.unlink, 1)
    _link_again(peer, we)


def _threads_of_engines(_here: nodes.Here) -> list[str]:
    """Those that are left, once there was time to end."""

    def left() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith("datadist")]

    comes_true(lambda: not left())
    return left()


# -- fork ------------------------------------------------------------------------------------


def _fork(here: nodes.Here, how: str) -> int:
    """Fork with live links; the child ends in some way. Its exit status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            try:
                here.live.link_error(1)
            except RuntimeError as error:
                code = 0 if "forked" in str(error) else 2
            if how == "finalizes":
                here.live.finalize()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("how", ["exits", "finalizes"])
def test_a_forked_child_harms_nobody(start_node: Start, how: str) -> None:
    peer, we, comm_id = _pair(start_node)
    assert we.do(_fork, how) == 0
    assert we.do(scenarios.pull_now)[0] == "OK"
    assert we.do(nodes.link_error, comm_id) is None
    assert peer.do(nodes.link_error, 1) is None


# -- interpreter exit ------------------------------------------------------------------------

PROGRAM = """
import json, threading, sys
from datadist import *
config = LLMConfig()
config.enable_cache_manager = True
config.transfer_backend = "shm"
config.mem_pool_cfg = '{"memory_size": 8388608}'
engine = LLMDataDist(LLMRole.MIX, 1)
engine.init(config.generate_options())
cache = engine.cache_manager.allocate_cache(CacheDesc(2, [1, 1024], DataType.DT_FLOAT16))
comm = engine.link("pair", {1: 0, 2: 1}, sys.argv[1])
engine.wait_link(comm)
print("linked", flush=True)
sys.stdin.readline()
def pull():
    while True:
        engine.cache_manager.pull_cache(CacheKeyByIdAndIndex(2, 1, 0), cache)
if sys.argv[2] == "busy":
    threading.Thread(target=pull, daemon=True).start()
if sys.argv[2] == "raises":
    raise RuntimeError("on purpose")
"""


@pytest.mark.parametrize("how", ["idle", "busy", "raises"])
def test_a_program_that_ends_with_live_links(
    start_node: Start, runtime_dir: Path, how: str
) -> None:
    we = start_node(2, pool=16 * MIB)
    we.do(scenarios.prepare, 2)
    environ = {**os.environ, "DATADIST_RUNTIME_DIR": str(runtime_dir)}
    we.begin(nodes.link_and_wait, "pair", PAIR)
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, nodes.table_for(PAIR), how],
        env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert program.stdout is not None
    assert program.stdout.readline() == "linked\n"
    comm_id = we.result()
    started = time.monotonic()
    _, errors = program.communicate("go\n", timeout=30)
    assert time.monotonic() - started < 25, "it has 30 s"
    assert program.returncode == (1 if how == "raises" else 0), errors
    assert ("on purpose" in errors) == (how == "raises")
    assert "Fatal" not in errors
    _, _, reason = we.do(scenarios.wait_until_broken, comm_id)
    assert "cluster 1" in reason
    assert list(runtime_dir.glob("1-*")) == []


# -- clocks ----------------------------------------------------------------------------------


def _jump(here: nodes.Here, seconds: float) -> None:
    """Set this process's idea of the date ahead or back."""
    real = time.time
    time.time = lambda: real() + seconds
    time.time_ns = lambda: int((real() + seconds) * 1e9)


@pytest.mark.parametrize("seconds", [-86400.0, 86400.0])
def test_a_jump_of_the_date_changes_nothing(start_node: Start, seconds: float) -> None:
    peer, we, comm_id = _pair(start_node)
    for node in (peer, we):
        node.do(_jump, seconds)
    assert we.do(scenarios.pull_now)[0] == "OK"
    we.do(nodes.unlink, comm_id)
    peer.do(nodes.unlink, 1)
    nodes.link_pair(peer, we, "again")
    assert we.do(scenarios.pull_now)[0] == "OK"


# -- finalize racing with everything ---------------------------------------------------------

DOCUMENTED = ("LLMException", "RuntimeError", "Code")
"""What calls raise; the last is the code that a layer-wise transfer ended with."""


def _race(here: nodes.Here, after: float, unlink: bool) -> tuple[list[str], list[str]]:
    """Finalize while threads do everything else; other errors, threads left.

    A wait for what does not end takes a minute, and is logged.
    """
    from datadist_shm import link

    engine_module.CALLS_SECONDS = building.CLOSE_SECONDS = link.CLOSE_SECONDS = 60.0
    engine, strange = here.live, []
    over = threading.Event()

    def repeat(call: Callable[[], object]) -> None:
        while not over.is_set():
            try:
                call()
            except Exception as error:
                if type(error).__name__ not in DOCUMENTED:
                    strange.append(f"{type(error).__name__}: {error}")

    def link_and_unlink() -> None:
        engine.unlink(engine.link("never", {2: 0, 9: 1}, nodes.table_for({2: 0, 9: 1})))

    def allocate() -> None:
        cache = engine.cache_manager.allocate_cache(here.caches["c"].cache_desc)
        engine.cache_manager.deallocate_cache(cache)

    def unlink_it() -> None:
        time.sleep(after)
        engine.unlink(1)

    calls: list[Callable[[], object]] = [
        *(partial(scenarios.move, here, what) for what in ("mid-pull", "mid-push", "mid-async")),
        *([unlink_it] if unlink else []),
        link_and_unlink,
        allocate,
        lambda: engine.link_clusters([nodes.cluster_info(9, 1)], 1000),
        engine.stats,
        lambda: engine.link_error(1),
    ]
    threads = [threading.Thread(target=repeat, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    time.sleep(after)
    engine.finalize()
    over.set()
    for thread in threads:
        thread.join(30)
    hung = [t.name for t in threads if t.is_alive()]
    return strange, hung + _threads_of_engines(here)


GIVEN_UP = ("report it", "defect", "has not ended in", "did not end within")
"""What is logged of defects, and of waits for what does not end."""


@pytest.mark.parametrize("unlink", [False, True], ids=["linked", "while unlinking"])
@pytest.mark.parametrize("after", [0.0, 0.05, 0.3])
def test_finalize_races_with_everything(start_node: Start, after: float, unlink: bool) -> None:
    peer, we, _ = _pair(start_node, enable_remote_cache_accessible=True)
    strange, left = we.do(_race, after, unlink, timeout=400)
    assert strange == []
    assert left == []
    assert [line for line in we.do(nodes.log_of) if any(text in line for text in GIVEN_UP)] == []
    assert peer.do(scenarios.wait_until_broken, 1)[2].startswith("cluster 2")
