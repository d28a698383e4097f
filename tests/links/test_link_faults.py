"""Links under faults: transports that fail, ranks that give up or hang, forks, many at once."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest

from datadist import CacheKey, CacheKeyByIdAndIndex, RegisterMemStatus
from datadist.transport import Link, LinkError, Offer
from tests import descriptors, nodes
from tests.nodes import Node, RemoteError
from tests.waiting import until

Start = Callable[..., Node]
PAIR = {1: 0, 2: 1}


def _break_attach(here: nodes.Here, broken: bool) -> None:
    from datadist_shm.link import ShmLink

    if broken:

        def attach(self: ShmLink, rank: int, offer: Offer) -> None:
            for fd in offer.fds:
                os.close(fd)
            raise LinkError("sabotage", rank)

        here.any["attach"] = ShmLink.attach, ShmLink.attach_at_once
        ShmLink.attach = attach  # type: ignore[method-assign]
        ShmLink.attach_at_once = Link.attach_at_once  # type: ignore[method-assign]
    else:
        ShmLink.attach, ShmLink.attach_at_once = here.any["attach"]  # type: ignore[method-assign]


def _try(here: nodes.Here, name: str) -> str:
    comm_id = nodes.link(here, name, PAIR)
    try:
        here.live.wait_link(comm_id)
    except Exception as error:
        return str(error)
    finally:
        here.live.unlink(comm_id)
    return "OK"


def test_links_that_failed_do_not_hold_up_later_ones(start_node: Start) -> None:
    first, second = start_node(1), start_node(2)
    nodes.link_pair(first, second, "keeps the session")
    second.do(_break_attach, True)
    for number in range(20):
        first.begin(_try, f"bad {number}")
        assert "sabotage" in second.do(_try, f"bad {number}")
        assert "sabotage" in first.result()
    second.do(_break_attach, False)
    nodes.link_pair(first, second, "good")


def _raise_at_once(here: nodes.Here) -> None:
    from datadist_shm.link import ShmLink

    def attach_at_once(self: ShmLink, rank: int, offer: Offer) -> bool:
        raise ValueError("a defect")

    ShmLink.attach_at_once = attach_at_once  # type: ignore[method-assign]


def test_a_transport_that_raises_at_once_fails_this_link_only(start_node: Start) -> None:
    first, second = start_node(1), start_node(2)
    ours, theirs = nodes.link_pair(first, second, "before")
    second.do(_raise_at_once)
    first.begin(_try, "bad")
    assert "attaching the memory of rank 0 failed" in second.do(_try, "bad")
    assert "attaching the memory of rank 0 failed" in first.result()
    for node, comm_id in ((first, ours), (second, theirs)):
        assert node.do(nodes.link_error, comm_id) is None


def _offer_much(here: nodes.Here, size: int, fds: int) -> None:
    from datadist_shm.link import ShmLink

    def offer(self: ShmLink, rank: int) -> Offer:
        return Offer(bytes(size), [os.memfd_create("much") for _ in range(fds)])

    ShmLink.offer = offer  # type: ignore[method-assign]


def _count_fds(_here: nodes.Here) -> int:
    return sum("much" in target for target in descriptors.targets())


@pytest.mark.parametrize(
    ("size", "fds", "reason"),
    [
        (1, 129, "the transport's offer for rank 1 has 129 descriptors, over 128"),
        ((10 << 20) + 1, 1, "the transport's offer for rank 1 has 10485761 bytes, over 10485760"),
    ],
)
def test_an_offer_that_cannot_be_carried_fails_this_link(
    start_node: Start, size: int, fds: int, reason: str
) -> None:
    first, second = start_node(1), start_node(2)
    ours, theirs = nodes.link_pair(first, second, "before")
    first.do(_offer_much, size, fds)
    second.begin(_try, "pair")
    assert reason in first.do(_try, "pair")
    assert reason in second.result()
    until(lambda: first.do(_count_fds) == 0)  # a thread of their own closes them
    for node, comm_id in ((first, ours), (second, theirs)):
        assert node.do(nodes.link_error, comm_id) is None


def _link_and_unlink(here: nodes.Here, times: int) -> None:
    for number in range(times):
        here.live.unlink(nodes.link(here, f"short {number}", PAIR))


def test_links_that_were_given_up_do_not_hold_up_later_ones(start_node: Start) -> None:
    first, second = start_node(1), start_node(2)
    nodes.link_pair(first, second, "keeps the session")
    first.begin(_link_and_unlink, 80)
    second.do(_link_and_unlink, 80)
    first.result()
    nodes.link_pair(first, second, "good")


def _wait_for_many(here: nodes.Here, count: int) -> None:
    for number in range(count):
        nodes.link(here, f"waiting {number}", {1: 0, 2: 1, 3: 2})


def test_hundreds_that_wait_for_a_third_do_not_hold_up_a_pair(start_node: Start) -> None:
    first, second = start_node(1, link_total_time=60), start_node(2, link_total_time=60)
    first.begin(_wait_for_many, 300)
    second.do(_wait_for_many, 300)
    first.result()
    time.sleep(1.5)  # until differing wishes would be compared
    nodes.link_pair(first, second, "pair")
    first.begin(nodes.link, "different", PAIR)
    other = second.do(
        nodes.link, "different", PAIR, nodes.table_for(PAIR).replace("host", "unreachable")
    )
    first.result()
    with pytest.raises(RemoteError) as error:
        second.do(nodes.wait, other)
    assert "ranks disagree" in error.value.text


def _ignore_ready(here: nodes.Here) -> None:
    engine = here.live._engine
    assert engine is not None
    engine._builder.on_ready = lambda *_: None  # type: ignore[method-assign]


def _run_out_of_time(here: nodes.Here, comm_id: int) -> None:
    """As where the time of the link is over, which would have to be long enough for the other end."""
    engine = here.live._engine
    assert engine is not None
    links = engine._links
    engine._call(lambda: links._expire(links.domains[comm_id]))


def test_a_member_that_gives_up_when_we_are_ok_breaks_the_link(start_node: Start) -> None:
    first, second = start_node(1), start_node(2)
    second.do(nodes.make, "c", "cache", [1, 8], 2, [CacheKey(2, 1)])
    first.do(nodes.make, "c", "cache", [1, 8], 2)
    second.do(_ignore_ready)
    first.begin(nodes.link_and_wait, "pair", PAIR)
    theirs = second.do(nodes.link, "pair", PAIR)
    ours = first.result()
    second.do(_run_out_of_time, theirs)
    with pytest.raises(RemoteError):
        second.do(nodes.wait, theirs)
    until(lambda: first.do(nodes.link_error, ours) is not None)
    assert first.do(nodes.status, ours) is RegisterMemStatus.OK
    with pytest.raises(RemoteError) as error:
        first.do(nodes.pull_cache, CacheKeyByIdAndIndex(2, 1), "c")
    assert error.value.status == "LLM_NOT_YET_LINK"


@pytest.mark.parametrize(
    ("fault", "status"), [("stop", "LLM_TIMEOUT"), ("kill", "LLM_NOT_YET_LINK")]
)
def test_a_look_up_that_is_not_answered(start_node: Start, fault: str, status: str) -> None:
    limit = 1500 if fault == "stop" else 60_000
    owner, puller = start_node(1), start_node(2, sync_kv_timeout=limit)
    puller.do(nodes.make, "c", "cache", [1, 8], 2)
    nodes.link_pair(owner, puller, "pair")
    owner.pause()
    puller.begin(nodes.pull_cache, CacheKey(1, 77), "c")
    if fault == "kill":
        time.sleep(0.3)
        owner.kill()
    with pytest.raises(RemoteError) as error:
        puller.result()
    assert error.value.status == status, error.value.text


def _pull_in_threads(here: nodes.Here, threads: int) -> list[str]:
    results: list[str] = []

    def pull() -> None:
        try:
            nodes.pull_cache(here, CacheKey(1, 5), "c")
            results.append("OK")
        except Exception as error:
            results.append(getattr(error, "status_code").name)  # noqa: B009

    workers = [threading.Thread(target=pull) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(nodes.SECONDS)
    return sorted(results)


def test_a_request_key_is_pulled_once_however_many_try(start_node: Start) -> None:
    owner = start_node(1, pool=64 << 20)
    puller = start_node(2, pool=64 << 20, sync_kv_timeout=30_000)
    shape = [1, 4 << 20]
    owner.do(nodes.make, "c", "cache", shape, 2, [CacheKey(1, 5)])
    puller.do(nodes.make, "c", "cache", shape, 2)
    nodes.link_pair(owner, puller, "pair")
    assert puller.do(_pull_in_threads, 4) == ["LLM_KV_CACHE_NOT_EXIST"] * 3 + ["OK"]


def _fork_while_a_lock_is_held(here: nodes.Here) -> int:
    engine = here.live._engine
    assert engine is not None
    held, release = threading.Event(), threading.Event()
    view = next(iter(engine.views.values()))

    def hold() -> None:
        with view.lock:
            held.set()
            release.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(20)
    pid = os.fork()
    if pid == 0:
        os._exit(7)
    release.set()
    holder.join()
    deadline = time.monotonic() + nodes.SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return -9


def test_a_fork_while_another_thread_looks_a_key_up(start_node: Start) -> None:
    first, second = start_node(1), start_node(2)
    nodes.link_pair(first, second, "pair")
    assert first.do(_fork_while_a_lock_is_held) == 7


def _finalize_during_a_step(here: nodes.Here) -> list[str]:
    engine = here.live._engine
    assert engine is not None
    heard: list[str] = []

    def step() -> None:
        time.sleep(0.5)
        heard.append(engine._reactor.call(lambda: "heard", 20))

    engine._workers.submit(step)
    here.live.finalize()
    return heard


def test_a_step_that_ends_during_finalize_can_report(start_node: Start) -> None:
    assert start_node(1).do(_finalize_during_a_step) == ["heard"]


def _meet(here: nodes.Here) -> None:
    """Wait until we know an engine of another cluster and what it waits for."""
    engine = here.live._engine
    assert engine is not None
    deadline = time.monotonic() + nodes.SECONDS
    while not any(len(view.announcements) for view in list(engine.views.values())):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _end_sessions(here: nodes.Here) -> None:
    engine = here.live._engine
    assert engine is not None
    sessions = [view.session for view in engine.views.values()]
    assert sessions
    for session in sessions:
        engine._reactor.call(partial(session.close, "the test"), nodes.SECONDS)


@pytest.mark.parametrize("ends", [0, 1])
def test_who_lost_each_other_while_they_waited_meet_again(start_node: Start, ends: int) -> None:
    mapping = {1: 0, 2: 1, 3: 2}
    early = [start_node(cluster, link_total_time=60) for cluster in (1, 2)]
    ids = [node.do(nodes.link, "three", mapping) for node in early]
    for node in early:
        node.do(_meet)
    early[ends].do(_end_sessions)
    late = start_node(3, link_total_time=60)
    late.do(nodes.link_and_wait, "three", mapping)
    for node, comm_id in zip(early, ids, strict=True):
        node.do(nodes.wait, comm_id)
