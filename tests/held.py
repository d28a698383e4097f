"""Operations of a transport that a test holds: what goes on beside them is seen by events."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from datadist.links.domain import Attempt
from datadist.status import LLMStatusCode
from tests import nodes

SECONDS = 20.0
"""No test waits longer for what cannot happen."""


class Gate:
    """Where operations wait until they are let go; it knows which are inside."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open = False
        self.inside: list[str] = []
        """Names of those that are inside now."""
        self.most = 0
        """How many were inside at the same time."""

    def pass_through(self, name: str) -> None:
        """Come in, and go on when the gate is open."""
        with self._changed:
            self.inside.append(name)
            self.most = max(self.most, len(self.inside))
            self._changed.notify_all()
            opened = self._changed.wait_for(lambda: self._open, 5 * SECONDS)
            self.inside.remove(name)
        assert opened, f"{name} was never let go"

    def holds(self, count: int) -> bool:
        """Whether so many are inside at the same time, in time."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self.inside) == count, SECONDS)

    def open(self) -> None:
        """Let all go, those to come as well."""
        with self._changed:
            self._open = True
            self._changed.notify_all()


class WatchedLock:
    """A lock that tells when somebody waits for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.awaited = threading.Event()
        """Set when somebody has found it taken and waits."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """As the method of `threading.Lock`."""
        if self._lock.acquire(blocking=False):
            return True
        if not blocking:
            return False
        self.awaited.set()
        return self._lock.acquire(timeout=timeout)

    def release(self) -> None:
        """As the method of `threading.Lock`."""
        self._lock.release()


class Calls:
    """Calls on threads of their own, and how each ended."""

    def __init__(self) -> None:
        self._threads: dict[str, threading.Thread] = {}
        self.outcomes: dict[str, str] = {}

    def begin(self, name: str, call: Callable[[], object]) -> None:
        """Start one."""

        def run() -> None:
            try:
                call()
                self.outcomes[name] = "OK"
            except BaseException as error:
                self.outcomes[name] = f"{type(error).__name__}: {error}"

        self._threads[name] = threading.Thread(target=run, daemon=True)
        self._threads[name].start()

    def ends(self, name: str, seconds: float = SECONDS) -> bool:
        """Whether it ends in time."""
        self._threads[name].join(seconds)
        return not self._threads[name].is_alive()

    def outcome(self, name: str) -> str:
        """ "OK", or the error; "it hangs" where it does not end in time."""
        return self.outcomes[name] if self.ends(name) else "it hangs"


def attempt_with(here: nodes.Here, cluster: int) -> Attempt:
    """The newest link with a cluster, as the engine has it."""
    engine = here.live._live(LLMStatusCode.LLM_FAILED)
    domains = [domain for domain in engine._all_domains() if cluster in domain.others]
    attempt = max(domains, key=lambda domain: domain.serial).attempt
    assert attempt is not None
    return attempt


def hold_moves(here: nodes.Here, *clusters: int) -> None:
    """Let reads and writes over the newest links with these clusters wait in the transport."""
    gate: Gate = here.any.setdefault("gate", Gate())
    for cluster in clusters:
        link: Any = attempt_with(here, cluster).link
        for name in ("read", "write"):
            setattr(link, name, _held(gate, f"{name} {cluster}", getattr(link, name)))


def hold_copies(here: nodes.Here) -> None:
    """Let copies inside the engine wait in the transport."""
    gate: Gate = here.any.setdefault("gate", Gate())
    transport: Any = here.live._live(LLMStatusCode.LLM_FAILED).transport
    transport.copy = _held(gate, "copy", transport.copy)


def _held(gate: Gate, name: str, move: Callable[..., Any]) -> Callable[..., Any]:
    def moved(*args: Any) -> Any:
        gate.pass_through(name)
        return move(*args)

    return moved


def begin(here: nodes.Here, name: str, function: Callable[..., object], *args: Any) -> None:
    """Start ``function(here, *args)`` on a thread of the node."""
    here.any.setdefault("calls", Calls()).begin(name, lambda: function(here, *args))


def outcome(here: nodes.Here, name: str) -> str:
    """How that ended."""
    return str(here.any["calls"].outcome(name))


def running(here: nodes.Here, name: str) -> bool:
    """Whether it has not ended yet."""
    return not here.any["calls"].ends(name, 0)


def inside(here: nodes.Here, count: int) -> bool:
    """Whether so many operations are inside the transport at the same time, in time."""
    return bool(here.any["gate"].holds(count))


def most_inside(here: nodes.Here) -> int:
    """How many were inside at the same time."""
    return int(here.any["gate"].most)


def let_go(here: nodes.Here) -> None:
    """Let all operations end."""
    here.any["gate"].open()
