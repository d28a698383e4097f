"""Nodes in this machine and in others, which tests use alike."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from tests.nodes import SECONDS, Node, RemoteError

PRELOADED = [
    "roce.spi", "roce.library", "datadist_rdma", "tests.transfers.test_pull", "tests.transfers.test_push",
    "tests.transfers.test_layerwise", "tests.grants.test_ends",
    "tests.links.test_clusters", "tests.links.test_link", "tests.links.four_clusters",
    "tests.faults.scenarios",
]  # fmt: skip
"""Their imports take seconds in an emulated machine."""
HERE = "10.99.0.1"
OTHER = "10.99.0.2"
THIRD = "10.99.0.3"
LINE = "/dev/ttyS1"


def start_here(environ: Mapping[str, str]) -> Node:
    """A node in this machine."""
    return Node(environ, PRELOADED)


class RemoteNode:
    """A node in another machine, with the interface of :class:`tests.nodes.Node`."""

    def __init__(self, environ: Mapping[str, str], machine: str = OTHER) -> None:
        from roce.harness.agent import connect

        self._line = connect(machine)
        self._line.send(dict(environ))
        self.pid = self._receive(SECONDS)

    def _receive(self, timeout: float) -> Any:
        if not self._line.poll(timeout):
            raise TimeoutError(f"the other machine did not answer in {timeout} s")
        return self._line.recv()

    def _ask(self, order: str, *args: Any, timeout: float = SECONDS, **options: Any) -> Any:
        self._line.send((order, args, options))
        return self._answer(timeout)

    def _answer(self, timeout: float) -> Any:
        ok, value = self._receive(timeout + 10)
        if not ok:
            raise RemoteError(*value)
        return value

    def begin(self, function: Callable[..., Any], *args: Any, **options: Any) -> None:
        """Start ``function(here, *args, **options)`` in the node."""
        self._ask("begin", function, *args, **options)

    def result(self, timeout: float = SECONDS) -> Any:
        """What the function returned. Raises RemoteError."""
        return self._ask("result", timeout, timeout=timeout)

    def do(
        self, function: Callable[..., Any], *args: Any, timeout: float = SECONDS, **options: Any
    ) -> Any:
        """Run a function and return its result."""
        return self._ask("do", function, *args, timeout=timeout, **options)

    def kill(self) -> None:
        """End the process without a chance to clean up."""
        self._ask("kill")

    def pause(self) -> None:
        """SIGSTOP."""
        self._ask("pause")

    def resume(self) -> None:
        """SIGCONT."""
        self._ask("resume")

    def close(self) -> None:
        """End the node."""
        self._line.close()


AnyNode = Node | RemoteNode


def wait_for_other(timeout: float = 300, machine: str = OTHER) -> None:
    """Wait until another machine's agent answers."""
    from roce.harness.agent import connect

    deadline = time.monotonic() + timeout
    while True:
        try:
            connect(machine).close()
            return
        except (OSError, EOFError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def lab(**request: Any) -> dict[str, Any]:
    """Ask the host to do something to the wire or another machine (``machine``, else "b")."""
    line = os.open(LINE, os.O_RDWR | os.O_NOCTTY)
    try:
        os.write(line, json.dumps(request).encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            answer += os.read(line, 4096)
    finally:
        os.close(line)
    parsed: dict[str, Any] = json.loads(answer)
    assert "error" not in parsed, parsed
    return parsed
