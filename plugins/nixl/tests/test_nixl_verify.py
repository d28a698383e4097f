"""The command with which strangers verify their machine."""

from __future__ import annotations

import subprocess
import sys

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


@nixl_skips.needed
def test_a_process_ends_without_a_crash() -> None:
    """Also on hosts with libibverbs, where UCX's modules of RDMA made it crash at its exit."""
    command = [sys.executable, "-m", "datadist_nixl.verify", "--size", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
