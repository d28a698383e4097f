"""The scripts of examples/grants: a prompt and a decoder, each of which is killed and started again."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from queue import Queue

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "grants"
SECONDS = 90.0


class Script:
    """A running script, and the lines that it has said."""

    def __init__(self, runtime_dir: Path, name: str, *args: int) -> None:
        environ = {**os.environ, "DATADIST_RUNTIME_DIR": str(runtime_dir), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(EXAMPLES / name), *map(str, args)],
            env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self._lines: Queue[str] = Queue()
        self.said: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip())

    def until(self, text: str) -> str:
        """The next line that has this text."""
        while True:
            self.said.append(self._lines.get(timeout=SECONDS))
            if text in self.said[-1]:
                return self.said[-1]

    def end(self) -> int:
        """Its exit status, once it has ended by itself."""
        code = self.process.wait(SECONDS)
        self._thread.join(SECONDS)
        return code

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self._thread.join(SECONDS)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def start(
    runtime_dir: Path, free_ports: Callable[[int], list[int]]
) -> Iterator[Callable[..., Script]]:
    """Start a script, with two ports that are the same for all."""
    ports = free_ports(2)
    with ExitStack() as stack:

        def run(name: str, *args: int) -> Script:
            script = Script(runtime_dir, name, *ports, *args)
            stack.callback(script.close)
            return script

        yield run


def test_either_side_is_killed_and_comes_again(start: Callable[..., Script]) -> None:
    prompt = start("prompt.py")
    prompt.until("ready")
    decoder = start("decoder.py", 1, 100_000)
    decoder.until("request 5 is right")
    prompt.close()
    decoder.until("again")
    prompt = start("prompt.py")
    decoder.until("is right")
    prompt.until("CONSUMED")
    decoder.close()
    decoder = start("decoder.py", 200_000, 30)
    decoder.until("request 200029 is right")
    assert decoder.end() == 0, decoder.said
    prompt.until("request 200029: CONSUMED")
    prompt.process.terminate()
    assert prompt.end() == 0
