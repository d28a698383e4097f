"""What an engine says of itself to a process of its user (reports.py)."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from datadist.control import discovery
from datadist.engine import reports
from tests import nodes
from tests.in_process_engine import PAIR, SECONDS, Engine
from tests.raw_peer import RawPeer


def _ask(peer: RawPeer) -> dict[str, Any]:
    peer.say({"kind": "ask_report"})
    body = peer.next_body()
    assert body is not None
    found: dict[str, Any] = json.loads(body)["report"]
    return found


def test_a_report_says_what_the_engine_is(engine: Engine) -> None:
    report = _ask(engine.raw_peer(hello=False))
    assert report["format"] == reports.FORMAT
    assert report["pid"] == os.getpid()
    assert report["cluster_id"] == 1
    assert report["backend"] == "shm"
    assert report["grants"] == 0
    assert report["links_left_out"] == 0
    assert report["seconds"] > 0
    assert report["kept"] == []
    assert set(report["total"]) == {"pull", "push"}
    json.dumps(report)
    engine.works()


def test_who_asks_has_no_session(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "HANDSHAKE_SECONDS", 3.0)
    peer = engine.raw_peer(hello=False)
    for _ in range(3):
        assert _ask(peer)["cluster_id"] == 1
    assert peer.closed(SECONDS)
    assert engine.ended("it did not say hello in time"), engine.ends()


def test_links_above_the_limit_are_counted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "MAX_LINKS", 0)
    engine.api.link("nobody is there", PAIR, nodes.table_for(PAIR))
    report = _ask(engine.raw_peer(hello=False))
    assert report["links"] == []
    assert report["links_left_out"] == len(engine.api.stats()["links"]) == 1


def test_a_report_that_fails_ends_that_connection_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "own_program", lambda: 1 // 0)
    peer = engine.raw_peer(hello=False)
    peer.say({"kind": "ask_report"})
    assert peer.closed(SECONDS)
    assert any("a report could not be made" in line for line in engine.log)
    engine.works()
