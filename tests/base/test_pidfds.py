"""Descriptors of other processes (pidfds.py)."""

from __future__ import annotations

import os
import subprocess

from datadist.base.pidfds import has_ended
from tests.waiting import until


def test_a_process_has_ended_before_and_after_it_was_waited_for() -> None:
    process = subprocess.Popen(["sleep", "60"])
    pidfd = os.pidfd_open(process.pid)
    try:
        assert not has_ended(pidfd)
        process.kill()
        until(lambda: has_ended(pidfd))
        process.wait(60)
        assert has_ended(pidfd)
    finally:
        process.kill()
        process.wait(60)
        os.close(pidfd)
