"""Log records name the engine that speaks, by Python's default logging and by any other."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from datadist import LLMDataDist, LLMRole
from datadist.base.log_prefix import attach, clear_log_prefix, set_log_prefix
from tests.engine.test_init import OPTIONS

ME = f"[cluster 7, pid {os.getpid()}]"


@pytest.fixture
def prefixed() -> Iterator[None]:
    for name in ("datadist.shm", "datadist.some.plugin"):  # a plugin makes its when it is imported
        logging.getLogger(name)
    set_log_prefix(7)
    yield
    clear_log_prefix()


@pytest.mark.usefixtures("prefixed")
@pytest.mark.parametrize("name", ["datadist", "datadist.shm", "datadist.some.plugin"])
def test_a_record_begins_with_the_engine(name: str, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger(name).warning("%d of %s", 3, "x")
    logging.getLogger(name).warning("100% of it")
    assert caplog.messages == [f"{ME} 3 of x", f"{ME} 100% of it"]
    assert caplog.records[0].args == (3, "x")
    assert caplog.records[0].datadist_engine == ME  # type: ignore[attr-defined]


@pytest.mark.usefixtures("prefixed")
def test_a_logger_that_was_made_later_is_included(caplog: pytest.LogCaptureFixture) -> None:
    later = logging.getLogger("datadist.test_log_prefix.later")
    attach()
    attach()
    later.warning("x")
    assert caplog.messages == [f"{ME} x"]


@pytest.mark.usefixtures("prefixed")
def test_loggers_of_others_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("datadistance", "other", None):
        logging.getLogger(name).warning("x")
    assert caplog.messages == ["x", "x", "x"]


@pytest.mark.usefixtures("prefixed")
def test_a_record_that_is_handled_again_begins_with_it_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.getLogger("datadist.shm").warning("x")
    logging.getLogger("datadist.link").handle(caplog.records[0])
    assert caplog.messages == [f"{ME} x", f"{ME} x"]


@pytest.mark.usefixtures("prefixed")
def test_what_is_disabled_costs_nothing() -> None:
    class Never:
        def __str__(self) -> str:
            raise AssertionError("it was formatted")

    logging.getLogger("datadist.shm").debug("%s", Never())


def test_another_process_is_not_this_engine(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_log_prefix(7)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    logging.getLogger("datadist").warning("x")
    clear_log_prefix()
    assert caplog.messages == ["x"]


def test_an_engine_speaks_from_init_to_finalize(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DATADIST_RUNTIME_DIR", str(runtime_dir))
    caplog.set_level(logging.INFO, "datadist")
    engine = LLMDataDist(LLMRole.MIX, 7)
    with pytest.raises(ModuleNotFoundError):
        engine.init({})
    logging.getLogger("datadist.link").warning("nobody")
    engine.init({**OPTIONS, "llm.Nope": "1"})
    logging.getLogger("datadist.shm").warning("said by the plugin")
    engine.finalize()
    logging.getLogger("datadist.shm").warning("nobody again")
    assert caplog.messages[0] == "nobody"
    assert caplog.messages[1] == f"{ME} there is no option 'llm.Nope', it has no effect"
    assert caplog.messages[-2:] == [f"{ME} said by the plugin", "nobody again"]
    assert all(message.startswith(ME) for message in caplog.messages[1:-1])


def test_a_terminal_shows_who_speaks(runtime_dir: Path) -> None:
    code = (
        "from datadist import *\n"
        "engine = LLMDataDist(LLMRole.MIX, 2)\n"
        f"engine.init({ {**OPTIONS, 'llm.Nope': '1'}!r})\n"
        "print(__import__('os').getpid())\n"
    )
    environ = {**os.environ, "DATADIST_RUNTIME_DIR": str(runtime_dir)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    pid = done.stdout.strip()
    assert (
        done.stderr == f"[cluster 2, pid {pid}] there is no option 'llm.Nope', it has no effect\n"
    )
