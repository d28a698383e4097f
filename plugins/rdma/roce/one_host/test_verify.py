"""What people run on their own hosts."""

from __future__ import annotations

import re
import subprocess
import sys


def test_verify_on_one_host() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "datadist_rdma.verify", "--size", "4", "--traffic-class", "104"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    print(run.stdout)
    assert "RoCE v2 at 10.99.0.1 (rxe0 port 1 GID 1)" in run.stdout
    assert re.search(r"ok +address fd00:99::1 \(rxe0 port 1 GID 2\): dummy0, MTU 4400", run.stdout)
    for verb in ("read", "write"):
        for size in (4, 64, 1024):
            assert f"ok    {verb} in blocks of {size} KiB" in run.stdout
    assert run.stdout.endswith("all passed\n")
