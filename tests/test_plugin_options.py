"""Checks that plugins make of their options, and how init reports them."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

import pytest

from datadist import LLMException, LLMStatusCode
from datadist.engine.options import EngineOptions
from datadist.engine.starting import start_transport
from datadist.plugin_options import choice, number, refuse_unknown
from datadist.transport import OptionError


def test_an_unknown_option_is_named_with_the_nearest() -> None:
    known = {"threads": "how many", "populate": "at once"}
    refuse_unknown("acme", {"threads": "1"}, known)
    with pytest.raises(OptionError) as caught:
        refuse_unknown("acme", {"thread": "1"}, known)
    assert str(caught.value) == (
        "unknown option datadist.acme.thread; did you mean datadist.acme.threads? there are "
        "threads: how many; populate: at once"
    )
    with pytest.raises(OptionError, match="there are none"):
        refuse_unknown("acme", {"x": "1"}, {})


@pytest.mark.parametrize("text", ["0", "9", "x", "", "٣", "-1", "9" * 5000])
def test_numbers(text: str) -> None:
    assert number("option o", "3", 1, 8) == 3
    with pytest.raises(
        OptionError, match=r"^option o is '.*it must be a number in \[1, 8\]"
    ) as caught:
        number("option o", text, 1, 8)
    assert len(str(caught.value)) < 300


def test_choices() -> None:
    assert choice("option o", "a", ("a", "b")) == "a"
    with pytest.raises(OptionError, match='option o is \'c\', it must be "a" or "b"'):
        choice("option o", "c", ("a", "b"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"thread": "1"}, "did you mean datadist.shm.threads?"),
        ({"threads": "many"}, "option datadist.shm.threads is 'many', it must be a number in [1, "),
        ({"populate": "yes"}, 'option datadist.shm.populate is \'yes\', it must be "0" or "1"'),
        ({"kernel": "z80"}, "option datadist.shm.kernel is 'z80'"),
    ],
)
def test_a_wrong_option_of_a_plugin_is_a_wrong_parameter(given: dict[str, Any], said: str) -> None:
    with pytest.raises(LLMException) as caught:
        start_transport(EngineOptions(backend="shm", extra={"shm": given}), os.environ, ExitStack())
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert said in str(caught.value)
