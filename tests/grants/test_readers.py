"""Readers that are killed, stopped, slow, or come later, and owners that are killed or come again."""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import pytest
from datadist_shm.link import ShmLink

from datadist import CacheKey, LLMException, LLMStatusCode
from tests import held, nodes, waiting
from tests.grants import world as grants
from tests.grants.world import GONE, LONG, Start, check, failed, link, linked
from tests.nodes import Here, RemoteError

CASES = [
    *(
        ("revoke", when, memory, one_sided)
        for when in ("before", "after")
        for memory in ("pool", "numpy")
        for one_sided in (False, True)
    ),
    *((end, "after", "pool", False) for end in ("lapse", "replace", "free")),
    *((end, "before", "numpy", True) for end in ("lapse", "replace", "free")),
]
"""How it ends, before or after the data is read, the memory, and the mode."""


def _pull_slowly(here: Here, when: str, **options: Any) -> tuple[str, list[str]]:
    """Pull, and wait before or after the data is read until "go on" is in the list; what came of it."""
    inner = ShmLink.read
    lengths: list[int] = []

    def read(link: ShmLink, rank: int, local: Any, remote: Any, length: Any, timeout: float) -> Any:
        data = not lengths
        lengths.append(len(length))
        if data and when == "before":
            _wait(here)
        result = inner(link, rank, local, remote, length, timeout)
        if data and when == "after":
            _wait(here)
        return result

    with mock.patch.object(ShmLink, "read", read):
        try:
            grants.pull(here, **options)
        except LLMException as error:
            return error.status_code.name, [str(error)]
    return "LLM_SUCCESS", []


def _wait(here: Here) -> None:
    here.any["reached"].touch()
    deadline = time.monotonic() + nodes.SECONDS
    while not here.any["go on"].exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _marks(here: Here, directory: Any) -> None:
    here.any["reached"], here.any["go on"] = directory / "reached", directory / "go on"


class _Left:
    """Whether the link has broken."""

    def __init__(self, here: Here) -> None:
        self._attempt = held.attempt_with(here, 1)

    def exists(self) -> bool:
        return bool(self._attempt.gone)


def _marks_until_left(here: Here, directory: Any) -> None:
    here.any["reached"], here.any["go on"] = directory / "reached", _Left(here)


@pytest.mark.parametrize(("end", "when", "memory", "one_sided"), CASES)
def test_a_grant_that_ends_during_a_read(
    start_node: Start, tmp_path: Any, end: str, when: str, memory: str, one_sided: bool
) -> None:
    """Whatever the read has got: before it began, or before the word was looked at."""
    owner, reader = linked(
        start_node, memory=memory, enable_remote_cache_accessible=one_sided, sync_kv_timeout=30_000
    )
    token = owner.do(grants.grant)
    reader.do(_marks, tmp_path)
    reader.begin(_pull_slowly, when, token=token if when == "after" else None)
    deadline = time.monotonic() + nodes.SECONDS
    while not (tmp_path / "reached").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    _end(owner, end, memory)
    (tmp_path / "go on").touch()
    status, texts = reader.result()
    assert status == GONE, texts
    assert "must not be used" in texts[0]


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("memory", ["pool", "numpy"])
@pytest.mark.parametrize("leave", ["kill", "finalize", "unlink"])
def test_an_owner_that_leaves_during_a_read_ends_no_grant(
    start_node: Start, tmp_path: Any, leave: str, memory: str, one_sided: bool
) -> None:
    """Nobody can say then whether it lives: after an unlink it does."""
    owner, reader = linked(
        start_node, memory=memory, enable_remote_cache_accessible=one_sided, sync_kv_timeout=30_000
    )
    token = owner.do(grants.grant)
    reader.do(_marks_until_left, tmp_path)
    reader.begin(_pull_slowly, "after", token=token)
    waiting.until((tmp_path / "reached").exists)
    if leave == "kill":
        owner.kill()
    elif leave == "finalize":
        owner.begin(nodes.finalize)
    else:
        owner.begin(nodes.unlink, 1)
    status, texts = reader.result()
    assert status == "LLM_FAILED", texts
    assert "unlink and link again" in texts[0]
    if leave == "unlink":
        owner.result()
        assert owner.do(grants.state) == "GRANTED"
        reader.do(nodes.unlink, 1)
        link(owner, reader, name="again")
        reader.do(grants.pull, token=token)
        check(reader)


def _end(owner: nodes.Node, end: str, memory: str) -> None:
    if end == "lapse":
        owner.do(grants.renew, millis=1)
        assert owner.do(grants.wait) == "LAPSED"
    elif end == "free" and memory == "pool":
        owner.do(nodes.deallocate, "src")
    elif end == "free":
        owner.do(_unregister_beside)
    else:
        owner.do(grants.revoke)
    if end != "free":
        owner.do(grants.reuse)
    if end == "replace":
        owner.do(grants.grant)


def _unregister_beside(here: Here) -> None:
    """Unregister in a thread, which waits for readers, but ends grants before that."""
    import threading

    threading.Thread(target=nodes.unregister, args=(here, "src"), daemon=True).start()
    grants.wait(here)


@pytest.mark.parametrize("known", [False, True])
def test_a_stopped_reader_finds_that_the_grant_has_ended(start_node: Start, known: bool) -> None:
    owner, reader = linked(start_node)
    token = owner.do(grants.grant)
    if known:
        reader.do(grants.pull, [9], [0])
    reader.pause()
    reader.begin(grants.pull, token=None if known else token)
    assert owner.do(grants.revoke) == "REVOKED"  # does not wait for the reader
    owner.do(grants.reuse)
    reader.resume()
    with pytest.raises(RemoteError) as caught:
        reader.result()
    assert caught.value.status == GONE


def test_a_reader_that_is_killed_is_lost(start_node: Start) -> None:
    owner, one, two = linked(start_node, 2)
    owner.do(grants.grant, req=7)
    owner.do(grants.grant, req=8, readers=2)
    token = owner.do(grants.grant, req=9)
    for req in (7, 8):
        one.do(grants.pull, [0], [0], req)
    one.do(grants.pull, [0], [0], 9, token=token)  # the owner does not know of it
    two.do(grants.pull, [0], [0], 8)
    one.kill()
    assert owner.do(grants.wait, 7) == "READER_LOST"
    assert owner.do(grants.state, 8) == owner.do(grants.state, 9) == "GRANTED"
    two.do(grants.release, 8)
    assert owner.do(grants.wait, 8) == "READER_LOST"  # one has it, the other one never will
    assert owner.do(grants.ended, 2) == [(7, "READER_LOST"), (8, "READER_LOST")]


def test_a_reader_that_had_finished_is_not_lost(start_node: Start) -> None:
    owner, one, two = linked(start_node, 2)
    owner.do(grants.grant, readers=2)
    one.do(grants.pull)
    one.do(grants.settle)
    one.kill()
    two.do(grants.pull)
    assert owner.do(grants.wait) == "CONSUMED"


def test_a_reader_that_links_later_reads_it(start_node: Start) -> None:
    owner, late = start_node(1), start_node(2)
    grants.prepare(owner, late)
    token = owner.do(grants.grant, readers=2)
    grants.link(owner, late)
    late.do(grants.pull, [0, 1], [0, 1], token=token)
    late.do(grants.pull)
    check(late)


def test_a_reader_that_comes_again_counts_again(start_node: Start) -> None:
    owner, reader = linked(start_node)
    owner.do(grants.grant, readers=2)
    reader.do(grants.pull)
    reader.do(grants.settle)
    reader.kill()
    again = start_node(2)
    again.do(nodes.make, "dst", "blocks", grants.SHAPE, grants.TENSORS)
    again.do(nodes.clear, "dst")
    for node in (owner, again):
        node.begin(nodes.link_and_wait, "again", {1: 0, 2: 1})
    for node in (owner, again):
        node.result()
    again.do(grants.pull)
    check(again)
    assert owner.do(grants.wait) == "CONSUMED"


def test_an_owner_that_is_killed_and_comes_again(start_node: Start) -> None:
    owner, reader = linked(start_node)
    token = owner.do(grants.grant)
    reader.do(grants.pull, [0], [0])
    owner.kill()
    assert failed(reader, token=token) == failed(reader) == "LLM_NOT_YET_LINK"
    again = start_node(1)
    grants.prepare(again)
    for node in (again, reader):
        node.begin(nodes.link_and_wait, "again", {1: 0, 2: 1})
    for node in (again, reader):
        node.result()
    again.do(grants.grant, [1, 2, 3, 4], req=8)
    assert failed(reader, token=token) == failed(reader) == GONE
    reader.do(grants.release, token=token)  # of an engine that has ended: there is nothing to do
    reader.do(nodes.clear, "dst")
    reader.do(grants.pull, req=8)
    check(reader, [1, 2, 3, 4])


def test_a_stopped_owner_is_a_timeout_of_the_question_only(start_node: Start) -> None:
    owner, reader = linked(start_node, sync_kv_timeout=1000)
    token = owner.do(grants.grant)
    for node in (reader, owner):
        node.do(grants.settle)  # so that the reader knows the cache
    owner.pause()
    try:
        assert failed(reader) == "LLM_TIMEOUT"
        reader.do(grants.pull, token=token, timeout_in_millis=30_000)  # reads need no owner
    finally:
        owner.resume()
    check(reader)
    assert owner.do(grants.wait) == "CONSUMED"


def test_other_caches_and_keys_are_pulled_as_before(start_node: Start) -> None:
    owner, reader = linked(start_node)
    owner.do(nodes.make, "slot", "cache", [1, 128], 6, [CacheKey(1, 20)])
    owner.do(nodes.fill, "slot", 3)
    owner.do(grants.grant)
    with pytest.raises(RemoteError, match="src_blocks must be empty") as caught:
        reader.do(grants.pull, [0, 1], [0, 1], 20)
    assert caught.value.status == "LLM_PARAM_INVALID"
    with pytest.raises(RemoteError, match="names a cache") as caught:
        reader.do(grants.pull, [0, 1], [], 20, release=True)
    assert caught.value.status == "LLM_PARAM_INVALID"
    reader.do(grants.pull, [0, 1], [], 20)
    assert failed(reader, [0, 1], [], 20) == GONE  # it was pulled
    assert failed(reader, [0, 1], [], 21) == GONE
    assert owner.do(grants.state) == "GRANTED"


def _beside(here: Here, count: int) -> list[str]:
    """Pulls of several grants from threads of one engine."""
    from concurrent.futures import ThreadPoolExecutor

    def one(req: int) -> str:
        try:
            grants.pull(here, [2 * req, 2 * req + 1], req=req)
        except LLMException as error:
            return error.status_code.name
        return LLMStatusCode.LLM_SUCCESS.name

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, range(count)))


def test_threads_of_one_reader(start_node: Start) -> None:
    owner, reader = linked(start_node)
    for req in range(16):
        owner.do(grants.grant, [2 * req, 2 * req + 1], req, lease_millis=LONG)
    assert reader.do(_beside, 16) == ["LLM_SUCCESS"] * 16
    check(reader, list(range(32)), list(range(32)))
    assert sorted(owner.do(grants.ended, 16)) == [(req, "CONSUMED") for req in range(16)]
