"""What a link that waits tells: who is missing, who is here instead, and until when it waits."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datadist.links import missing_members
from tests import nodes
from tests.nodes import Node, RemoteError

Start = Callable[..., Node]
PAIR = {1: 0, 2: 1}
ABSENT, ELSEWHERE = 90210, 90211
"""Cluster ids that no other tests use: engines of this user are seen wherever they are."""
WARNING = re.compile(
    r"WARNING .*link 'pair' \(comm id 1\) is not complete after (\d+) s and waits for (\d+) s more: (.+)"
)


def _search_patiently(_here: nodes.Here) -> None:
    """The warning waits for what is found elsewhere, however slow the machine is."""
    missing_members.SEARCH_SECONDS = nodes.SECONDS


def _told(node: Node) -> str:
    """The one warning of a link that waits, which comes after 5 s; what it says is missing."""
    deadline = time.monotonic() + nodes.SECONDS
    while time.monotonic() < deadline:
        found = [m for m in map(WARNING.match, node.do(nodes.log_of, "WARNING")) if m]
        if found:
            (told,) = found
            assert int(told[1]) >= 5
            assert int(told[1]) + int(told[2]) in (29, 30, 31), "link_total_time is 30 s"
            return told[3]
        time.sleep(0.1)
    raise AssertionError(f"no warning: {node.do(nodes.log_of)}")


def _wait_failed(node: Node) -> str:
    with pytest.raises(RemoteError) as caught:
        node.do(nodes.wait, 1)
    assert caught.value.status == "LLM_LINK_FAILED"
    return caught.value.text


def test_nobody_is_here(start_node: Start) -> None:
    node = start_node(1)
    node.do(nodes.link, "pair", {1: 0, ABSENT: 1})
    told = _told(node)
    assert f"cluster {ABSENT} (rank 1) has not called link" in told
    assert "no engine with its cluster id is here" in told
    assert "other clusters" not in told


def test_another_cluster_is_here_instead(start_node: Start) -> None:
    node, _ = start_node(1), start_node(22)
    node.do(nodes.link, "pair", {1: 0, ABSENT: 1})
    assert "no engine with its cluster id is here (other clusters are: 22)" in _told(node)


def test_the_peer_is_here_but_stopped(start_node: Start) -> None:
    node, peer = start_node(1), start_node(2)
    peer.pause()
    node.do(nodes.link, "pair", PAIR)
    assert "does not answer (is it stopped or busy?)" in _told(node)
    peer.resume()


def test_the_peer_is_here_but_does_not_link(start_node: Start) -> None:
    node, peer = start_node(1), start_node(2)
    node.do(nodes.link, "pair", PAIR)
    told = _told(node)
    assert f"cluster 2 (rank 1) is here (pid {peer.pid}, " in told
    assert "has not called link with this engine" in told


def test_the_peer_waits_under_another_name(start_node: Start) -> None:
    node, peer = start_node(1), start_node(2)
    node.do(nodes.link, "pair", PAIR)
    peer.do(nodes.link, "pears", PAIR)
    told = _told(node)
    assert f"pid {peer.pid}" in told
    assert "waits with comm_name 'pears', not 'pair'" in told
    with pytest.raises(RemoteError, match="waits with comm_name 'pair', not 'pears'"):
        peer.do(nodes.wait, 1, 100)


def test_who_fails_second_still_hears_of_the_other_name(start_node: Start) -> None:
    first, second = start_node(1, link_total_time=3), start_node(2, link_total_time=6)
    first.do(nodes.link, "pair", PAIR)
    second.do(nodes.link, "pears", PAIR)
    _wait_failed(first)
    assert "it waited with comm_name 'pair'" in _wait_failed(second)


def test_the_peer_waits_with_another_mapping_that_names_us(start_node: Start) -> None:
    node, peer = start_node(1, link_total_time=6), start_node(2)
    node.do(nodes.link, "pair", {1: 0, 2: 1, 3: 2})
    peer.do(nodes.link, "pair", {2: 0, 3: 1})
    text = _wait_failed(node)
    assert "cluster 3 (rank 2) has not called link" in text
    assert f"cluster 2 (rank 1) is here (pid {peer.pid}" in text


def test_the_peer_is_in_another_job(start_node: Start) -> None:
    node, peer = start_node(1), start_node(2, {"DATADIST_JOB": "blue"})
    for each in (node, peer):
        each.do(_search_patiently)
    node.do(nodes.link, "pair", PAIR)
    peer.do(nodes.link, "pair", PAIR)
    told = _told(node)
    assert "no engine with its cluster id is here, but elsewhere: " in told
    assert f"pid {peer.pid}, " in told
    assert "job 'blue'" in told
    assert "set the same DATADIST_JOB" in told
    theirs = _told(peer)
    assert f"pid {node.pid}, " in theirs
    assert "the job without a name" in theirs


def test_the_peer_is_in_another_directory(start_node: Start, tmp_path: Path) -> None:
    other = tmp_path / "other"
    node, peer = start_node(1), start_node(ELSEWHERE, {"DATADIST_RUNTIME_DIR": str(other)})
    node.do(_search_patiently)
    node.do(nodes.link, "pair", {1: 0, ELSEWHERE: 1})
    told = _told(node)
    assert f"pid {peer.pid}, " in told
    assert f"in the job without a name of runtime directory {other}" in told
    assert "set the same DATADIST_RUNTIME_DIR and DATADIST_JOB" in told


def test_a_short_link_says_it_at_its_end(start_node: Start) -> None:
    node, peer = (
        start_node(1, link_total_time=5),
        start_node(2, {"DATADIST_JOB": "blue"}, link_total_time=5),
    )
    node.do(nodes.link, "pair", PAIR)
    text = _wait_failed(node)
    assert f"pid {peer.pid}, " in text
    assert "job 'blue'" in text
    assert not any(WARNING.match(line) for line in node.do(nodes.log_of, "WARNING"))


def test_a_link_that_is_complete_says_nothing(start_node: Start) -> None:
    node, peer = start_node(1), start_node(2)
    nodes.link_pair(node, peer)
    time.sleep(6)
    assert node.do(nodes.log_of, "WARNING") == []
    node.do(nodes.link, "left", {1: 0, 9: 1})
    node.do(nodes.unlink, 2)
    time.sleep(6)
    assert node.do(nodes.log_of, "WARNING") == []


def _delay_searches(here: nodes.Here) -> None:
    """As a mount that does not answer does."""

    def find_unreachable_engines(*_: Any) -> list[Any]:
        time.sleep(3600)
        return []

    setattr(missing_members, "find_unreachable_engines", find_unreachable_engines)  # noqa: B010


def test_the_warning_does_not_wait_for_a_look_that_hangs(start_node: Start) -> None:
    node = start_node(1)
    node.do(_delay_searches)
    node.do(nodes.link, "pair", {1: 0, ABSENT: 1})
    assert f"cluster {ABSENT} (rank 1) has not called link" in _told(node)
    node.do(nodes.link, "second", {1: 0, ABSENT: 1})
    deadline = time.monotonic() + nodes.SECONDS
    while not any("'second'" in line for line in node.do(nodes.log_of, "WARNING")):
        assert time.monotonic() < deadline, "a second one is warned of as well"
        time.sleep(0.1)
    began = time.monotonic()
    node.do(nodes.finalize)
    assert time.monotonic() - began < 30, "finalize does not wait for it"
