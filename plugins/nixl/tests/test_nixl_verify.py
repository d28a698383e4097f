"""The command with which strangers verify their machine."""

from __future__ import annotations

import nixl_skips
import pytest
from datadist_nixl import verify


@nixl_skips.needed
def test_it_passes_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--size", "4"]) == 0
    assert "all passed" in capsys.readouterr().out


@nixl_skips.needed
def test_without_cuda_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--size", "4", "--cuda", "--device-id", "4095"]) == 1
    assert "FAIL  link: TransportError" in capsys.readouterr().out
