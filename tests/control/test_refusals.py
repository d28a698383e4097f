"""What is said of strangers stays little, and of expected members nothing is lost (refusals.py)."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from datadist.control import refusals
from datadist.control.hostport import HostPort
from datadist.control.refusals import MAX_EXPLAINED, MAX_LINES, REPORT_SECONDS, Refusals

PLACE = HostPort("127.0.0.1", 7000)
MEMBER = "10.0.0.1"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [1000.0]
    monkeypatch.setattr(refusals, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_thousand_hosts_are_some_lines_and_their_number(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    made = Refusals(PLACE, lambda host: host == MEMBER)
    with caplog.at_level(logging.WARNING, "datadist.control"):
        for turn in range(3):
            for number in range(1000):
                made.note(f"127.1.{number // 250}.{number % 250}", "it is no datadist engine")
                if number == 500 and turn == 0:
                    made.note(MEMBER, "it has another DATADIST_AUTH_KEY")
        assert len(caplog.records) == MAX_LINES + 1
        assert MEMBER in caplog.text
        clock[0] += REPORT_SECONDS
        made.note("127.1.0.0", "it is no datadist engine")
    assert f"refused {3 * (1000 - MAX_LINES)} connections more at {PLACE}" in caplog.text
    assert len(made.items()) < 100


def test_the_reason_of_a_member_outlasts_those_of_strangers(clock: list[float]) -> None:
    made = Refusals(PLACE, lambda host: host == MEMBER)
    made.note(MEMBER, "it has another DATADIST_AUTH_KEY")
    for number in range(1000):
        made.note(f"127.1.{number // 250}.{number % 250}", "it is no datadist engine")
    said = made.explain()
    assert said[0] == f"refused {MEMBER} at {PLACE}: it has another DATADIST_AUTH_KEY"
    assert len(said) == MAX_EXPLAINED + 2
    assert "hosts more" in said[-1]
    made.forget(MEMBER)
    assert MEMBER not in "".join(made.explain())
