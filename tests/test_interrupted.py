"""The program that interrupts calls at random: clean on a healthy library."""

from __future__ import annotations

import pytest

from tests.interrupted import __main__ as program


def test_a_short_run_finds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    status = program.main(["--rounds", "100", "--nested", "40"])
    out = capsys.readouterr().out
    assert status == 0, out
    assert "raised 100" in out
