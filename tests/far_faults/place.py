"""Where a round takes place: three hosts on slow cables, and a process on each."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

from tests import hosts, nodes
from tests.far_faults import ends
from tests.far_faults.cases import End, Move
from tests.far_faults.settings import LINK_SECONDS, RATE, Setting
from tests.hosts import Host, Network
from tests.nodes import Node

Who = Literal["mover", "owner", "third"]
WHO: tuple[Who, ...] = ("owner", "mover", "third")
CLUSTERS = {"owner": 1, "mover": 2, "third": 3}
STACK_SECONDS = 0.5
"""A process writes its stacks meanwhile."""


def missing() -> str | None:
    """Why there is no such place here, or None."""
    return hosts.missing() or _no_slow_cables()


@cache
def _no_slow_cables() -> str | None:
    if shutil.which("tc") is None:
        return "tc is not installed (Debian: iproute2)"
    command = ["unshare", "--net", *_slow("lo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return None if done.returncode == 0 else f"tc cannot limit a rate: {done.stderr.strip()}"


def _slow(interface: str) -> list[str]:
    limit = ["tbf", "rate", RATE, "burst", "256kb", "latency", "100ms"]
    return ["tc", "qdisc", "add", "dev", interface, "root", *limit]


class Place:
    """Processes by what they are in a round; all are gone with it."""

    def __init__(self, setting: Setting, move: Move, directory: Path, evidence: Path) -> None:
        self._setting = setting
        self._move = move
        self.nodes: dict[Who, Node] = {}
        self._network: Network
        self._directory = directory
        self._evidence = evidence
        self._starts = 0
        self._opened = ExitStack()
        with ExitStack() as opened:
            self._network = opened.enter_context(hosts.network(len(WHO)))
            for host in self._network.hosts:
                host.run(*_slow("eth0"))
                _await_carrier(host)
            for who in WHO:
                opened.callback(self._close, who)
            self.start(*WHO)
            self._opened = opened.pop_all()

    def start(self, *who: Who) -> None:
        """Start a process with an engine on each of these hosts, at the same time."""
        for each in who:
            self._close(each)
            self._starts += 1
            run = self._directory / f"{each}-{self._starts}"
            run.mkdir(mode=0o700)
            environ = {"DATADIST_RUNTIME_DIR": str(run), "DATADIST_AUTH_KEY": hosts.KEY}
            node = self.nodes[each] = Node({**self._setting.variables, **environ})
            node.do(hosts.enter, self._host(each).namespace)
            node.do(ends.prepare, str(self._evidence / f"{each}-{self._starts}"))
        for each in who:
            address = self._host(each).ipv4
            self.nodes[each].begin(ends.start, CLUSTERS[each], address, self._setting, self._move)
        for each in who:
            self.nodes[each].result()

    def _host(self, who: Who) -> Host:
        return self._network.hosts[WHO.index(who)]

    def link(self, name: str, first: Who, second: Who) -> dict[Who, int]:
        """Link two of them; the id of the link at each."""
        pair = (first, second)
        mapping = {CLUSTERS[who]: rank for rank, who in enumerate(pair)}
        table = hosts.table([self._host(who).ipv4 for who in pair])
        for who in pair:
            self.nodes[who].begin(ends.link, name, mapping, table)
        return {who: self.nodes[who].result(LINK_SECONDS + 5.0) for who in pair}

    def cut(self, end: End) -> None:
        """The cable of a host is down: both sides of it notice that it has no carrier."""
        self._set_cable(end, "down")

    def mend(self, end: End) -> None:
        """Undo :meth:`cut`."""
        self._set_cable(end, "up")
        _await_carrier(self._host(end))

    def _set_cable(self, end: End, state: str) -> None:
        self._network.switch.run("ip", "link", "set", f"port{WHO.index(end)}", state)

    def write_evidence(self, findings: list[str]) -> None:
        """What was wrong, and of each process that lives its stacks and, where it answers, its log."""
        (self._evidence / "findings.txt").write_text("\n".join(findings) + "\n")
        living = {who: node for who, node in self.nodes.items() if node.is_alive}
        for node in living.values():
            os.kill(node.pid, signal.SIGUSR2)
        time.sleep(STACK_SECONDS)
        for who, node in living.items():
            try:
                lines = node.do(nodes.log_of, timeout=5)
            except (AssertionError, OSError, EOFError) as error:  # it is busy, or has ended
                lines = [f"no log: {type(error).__name__} {error}"]
            (self._evidence / f"{who}.log").write_text("\n".join(lines) + "\n")

    def _close(self, who: Who) -> None:
        node = self.nodes.pop(who, None)
        if node is not None:
            node.close()

    def close(self) -> None:
        """End everything."""
        self._opened.close()


def _await_carrier(host: Host) -> None:
    """The kernel reports a cable a moment after it is plugged in, and libraries look at that."""
    deadline = time.monotonic() + 60
    while json.loads(host.run("ip", "-json", "link", "show", "eth0"))[0]["operstate"] != "UP":
        assert time.monotonic() < deadline, "the cable does not work"
        time.sleep(0.02)


@contextmanager
def place(setting: Setting, move: Move, evidence: Path) -> Iterator[Place]:
    """A place for the time of a round."""
    with tempfile.TemporaryDirectory(prefix="far-") as directory:
        made = Place(setting, move, Path(directory), evidence)
        try:
            yield made
        finally:
            made.close()
