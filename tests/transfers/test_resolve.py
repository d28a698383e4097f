"""Pulls of a key that an owner has not told of: it answers, is silent, or goes (resolve.py)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from datadist import CacheKey, LLMException, LLMStatusCode
from datadist.control.messages import Sync
from tests import nodes
from tests.forming import GOOD, PAIR, TOKEN, complete, rank_0
from tests.in_process_engine import SECONDS, Engine, Sent
from tests.raw_peer import RawPeer
from tests.waiting import until

LONG = 60_000
"""Milliseconds that no test waits for."""


@contextmanager
def _linked(runtime_dir: Path, sync_kv_timeout: int) -> Iterator[tuple[Engine, RawPeer]]:
    """An engine, and a raw peer as the owner of caches, which it has not told of any."""
    engine = Engine(runtime_dir, sync_kv_timeout)
    try:
        owner = rank_0(engine)
        Sent(owner, GOOD, TOKEN)
        complete(engine, owner)
        yield engine, owner
    finally:
        engine.close()


class Pull(threading.Thread):
    """A pull of a key, and how it ended."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(daemon=True)
        self._engine = engine
        self.status: LLMStatusCode | None = None

    def run(self) -> None:
        """Pull."""
        try:
            self._engine.api.cache_manager.pull_cache(CacheKey(2, 5), self._engine.cache)
        except LLMException as error:
            self.status = error.status_code


@pytest.fixture
def asked(runtime_dir: Path) -> Iterator[tuple[RawPeer, Sync, Pull]]:
    """An owner that was asked by a pull, and the question."""
    with _linked(runtime_dir, LONG) as (engine, owner):
        pull = Pull(engine)
        pull.start()
        question = owner.hear("sync")
        assert isinstance(question, Sync)
        yield owner, question, pull


def test_an_owner_that_has_no_such_key(asked: tuple[RawPeer, Sync, Pull]) -> None:
    owner, question, pull = asked
    assert pull.is_alive()
    assert owner.say({"kind": "synced", "id": question.id})
    pull.join(SECONDS)
    assert pull.status is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST


def test_an_owner_that_goes_instead_of_answering_is_not_waited_for(
    asked: tuple[RawPeer, Sync, Pull],
) -> None:
    owner, _, pull = asked
    owner.close()
    pull.join(SECONDS)
    assert pull.status is LLMStatusCode.LLM_NOT_YET_LINK


def test_an_owner_that_does_not_answer(runtime_dir: Path) -> None:
    with _linked(runtime_dir, 100) as (engine, _):
        pull = Pull(engine)
        pull.start()
        pull.join(SECONDS)
        assert pull.status is LLMStatusCode.LLM_TIMEOUT


def test_a_link_that_is_broken_is_told_beside_one_that_is_not_complete(runtime_dir: Path) -> None:
    """Waiting for the newer one helps only if the cluster comes again."""
    with _linked(runtime_dir, LONG) as (engine, owner):
        engine.api.link("again", PAIR, nodes.table_for(PAIR))
        owner.close()
        until(lambda: engine.api.link_error(engine.comm_id) is not None)
        with pytest.raises(LLMException) as caught:
            engine.api.cache_manager.pull_cache(CacheKey(2, 5), engine.cache)
    assert caught.value.status_code is LLMStatusCode.LLM_NOT_YET_LINK
    newer, older = (
        "link 'again' (comm id 2) is still PREPARING",
        "link 'pair' (comm id 1) is broken",
    )
    assert str(caught.value).index(newer) < str(caught.value).index(older)
