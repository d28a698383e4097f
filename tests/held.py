"""Operations of a transport that a test holds: what goes on beside them is seen by events."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from datadist.links.domain import Attempt
from datadist.links.permits import Permits
from datadist.status import LLMStatusCode
from tests import core_ways, nodes

SECONDS = 20.0
"""No test waits longer for what cannot happen."""


class Gate:
    """Where operations wait until they are let go; it knows which are inside."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open = False
        self.hold = True
        """Whether newcomers are held."""
        self.inside: list[str] = []
        """Names of those that are inside now."""
        self.most = 0
        """How many were inside at the same time."""

    def pass_through(self, name: str) -> None:
        """Come in, and go on when the gate is open."""
        if not self.hold:
            return
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


def permits_with(here: nodes.Here, cluster: int) -> Permits:
    """Those of the newest link with a cluster."""
    (permits,) = attempt_with(here, cluster).permits.values()
    return permits


def watch_permits(here: nodes.Here, cluster: int) -> None:
    """Have :func:`waiting` tell of these, also when the link is not known any more."""
    here.any["permits"] = permits_with(here, cluster), list[bool]()


def take_permits(here: nodes.Here, attempt: Attempt) -> None:
    """Have all transfers of a link with one peer wait, until :func:`release_permits`."""
    core_ways.take(here)  # a transport's own call needs no permit
    (permits,) = attempt.permits.values()
    here.any["permits"] = permits, list[bool]()
    permits.take_all(here.any["permits"][1], time.monotonic() + SECONDS)


def release_permits(here: nodes.Here) -> None:
    """Let them go on."""
    permits, taken = here.any["permits"]
    while taken:
        taken.pop()
        permits.release()


def waiting(here: nodes.Here, count: int) -> bool:
    """Whether so many wait for the permits that were noted last, in time."""
    permits, deadline = here.any["permits"][0], time.monotonic() + SECONDS
    while len(permits.line) != count and time.monotonic() < deadline:
        time.sleep(0.001)
    return len(permits.line) == count


def hold_moves(here: nodes.Here, *clusters: int) -> None:
    """Let reads and writes over the newest links with these clusters wait in the transport."""
    core_ways.take(here)
    gate: Gate = here.any.setdefault("gate", Gate())
    for cluster in clusters:
        link: Any = attempt_with(here, cluster).link
        for name in ("read", "write"):
            setattr(link, name, _held(gate, f"{name} {cluster}", getattr(link, name)))
        link.abort = _noting(here.any.setdefault("aborted", threading.Event()), link.abort)


def hold_no_more(here: nodes.Here) -> None:
    """Let moves that begin from now on go on; those that are held stay."""
    here.any["gate"].hold = False


def aborted(here: nodes.Here, cluster: int) -> bool:
    """Whether the link of the moves that are held was aborted, in time."""
    return bool(here.any["aborted"].wait(SECONDS))


def hold_copies(here: nodes.Here) -> None:
    """Let copies inside the engine wait in the transport."""
    gate: Gate = here.any.setdefault("gate", Gate())
    transport: Any = here.live._live(LLMStatusCode.LLM_FAILED).transport
    transport.copy = _held(gate, "copy", transport.copy)


def _noting(event: threading.Event, call: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*args: Any) -> Any:
        try:
            return call(*args)
        finally:
            event.set()

    return noted


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
