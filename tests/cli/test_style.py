"""Colours where a terminal has them, and only there."""

from __future__ import annotations

import io
import sys

import pytest

from datadist.cli.style import BAD, GOOD, Styled, coloured, cut, paint
from datadist.cli.tables import render


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environ", "terminal", "colours"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"TERM": "dumb"}, True, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"FORCE_COLOR": "1", "TERM": "dumb"}, True, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False),
    ],
)
def test_who_gets_colours(
    environ: dict[str, str], terminal: bool, colours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", _Terminal() if terminal else io.StringIO())
    assert coloured(sys.stdout) is colours
    assert paint("ok", GOOD) == ("\x1b[32mok\x1b[0m" if colours else "ok")
    assert not coloured(None) or "FORCE_COLOR" in environ


def test_styles_do_not_move_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(Styled("no", BAD), "1"), ("yes", "22")]
    monkeypatch.setenv("NO_COLOR", "1")
    plain = render(("USABLE", "N"), rows)
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("FORCE_COLOR", "1")
    styled = render(("USABLE", "N"), rows)
    assert "\x1b[31mno\x1b[0m      " in styled
    for code in ("\x1b[1m", "\x1b[31m", "\x1b[0m"):
        styled = styled.replace(code, "")
    assert styled == plain


def test_a_line_is_cut_where_it_looks_as_long() -> None:
    assert cut("\x1b[1mabcd\x1b[0mefgh", 6) == "\x1b[1mabcd\x1b[0mef"
    assert cut("\x1b[1mabcd\x1b[0m", 2) == "\x1b[1mab\x1b[0m"
