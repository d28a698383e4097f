"""Commands keep log lines from their output, and leave the loggers as they were."""

from __future__ import annotations

import argparse
import logging

import pytest

from datadist.base.quiet import quiet
from datadist.cli import backends


def test_nothing_below_critical_within_the_block(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("datadist.test_quiet")
    with quiet("datadist.test_quiet"):
        logger.error("hidden")
    logger.warning("shown")
    assert caplog.messages == ["shown"]


def test_a_command_leaves_the_level_as_it_was() -> None:
    logger = logging.getLogger("datadist.backend")
    before = logger.level
    backends.run(argparse.Namespace(json=False))
    assert logger.level == before
