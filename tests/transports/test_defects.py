"""What exceptions of transports become as text (defects.py)."""

from __future__ import annotations

import logging

import pytest

from datadist.status import LLMException, LLMStatusCode, param_invalid
from datadist.transport import LinkError
from datadist.transports.defects import text_of

LINK = object()
"""What raised."""


@pytest.mark.parametrize("error", [LinkError("no way", 1), MemoryError("no way")])
def test_errors_of_the_interface_are_their_text(error: Exception) -> None:
    assert text_of(error, LINK) == "no way"


def test_a_code_is_named_once_however_often_a_text_is_passed_on() -> None:
    inner = LLMException("no way", status_code=LLMStatusCode.LLM_TIMEOUT)
    assert text_of(inner, LINK) == "no way"
    assert str(param_invalid(f"it failed: {text_of(inner, LINK)}")) == (
        "it failed: no way (LLM_PARAM_INVALID)"
    )


def test_other_errors_are_defects_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "datadist.transport"):
        assert text_of(KeyError("x"), LINK) == "KeyError: 'x'"
    assert "defect of transport" in caplog.text
