"""Processors that are all busy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

_BUSY = "print(flush=True)\nwhile True: pass"

needed = pytest.mark.skipif(
    "DATADIST_ALWAYS_HELP" in os.environ, reason="a sanitizer takes all processors for idle"
)


@contextmanager
def busy() -> Iterator[None]:
    """More programs that compute than there are processors."""
    with ExitStack() as stack:
        for _ in range((os.cpu_count() or 1) + 1):
            program = subprocess.Popen([sys.executable, "-c", _BUSY], stdout=subprocess.PIPE)
            stack.callback(program.wait)
            stack.callback(program.kill)
            assert program.stdout is not None
            stack.enter_context(program.stdout)
            program.stdout.readline()
        yield
