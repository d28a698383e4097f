"""What the members of a fault test do, in their own processes."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from datadist import (
    CacheKeyByIdAndIndex,
    LayerSynchronizer,
    TransferWithCacheKeyConfig,
)
from datadist.transport import TransferTimeout
from tests import nodes

PIECE = 64 << 10
PAUSE = 0.005
TENSORS, SHAPE = 4, [1, 256 << 10]
"""A cache of 4 MiB, which takes a slowed link 64 pieces."""


class SlowLink:
    """A transport's link over a slow wire: small pieces, with pauses between them."""

    def __init__(self, link: Any) -> None:
        self._link = link
        self.pieces = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def read(self, rank: int, local: Any, remote: Any, length: Any, timeout: float) -> None:
        """As the link's, slowly."""
        self._move(self._link.read, rank, local, remote, length, timeout)

    def write(self, rank: int, local: Any, remote: Any, length: Any, timeout: float) -> None:
        """As the link's, slowly."""
        self._move(self._link.write, rank, local, remote, length, timeout)

    def _move(
        self,
        move: Callable[..., None],
        rank: int,
        local: Any,
        remote: Any,
        length: Any,
        timeout: float,
    ) -> None:
        deadline = time.monotonic() + timeout
        for ours, theirs, size in zip(*map(np.asarray, (local, remote, length)), strict=True):
            for at in range(0, int(size), PIECE):
                piece = [ours + at, theirs + at, min(PIECE, int(size) - at)]
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TransferTimeout("the wire is too slow", link_usable=True)
                move(rank, *[np.array([number], np.int64) for number in piece], left)
                self.pieces += 1
                time.sleep(PAUSE)


class Always(LayerSynchronizer):
    """Every layer is final."""

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        """At once."""
        return True


def prepare(here: nodes.Here, seed: int) -> None:
    """A cache with a pattern."""
    nodes.make(here, "c", "cache", SHAPE, TENSORS)
    nodes.fill(here, "c", seed)


def start_engine(here: nodes.Here, cluster: int, pool: int, **settings: Any) -> None:
    """An engine with a cache, in a process that SIGUSR1 ends as `sys.exit` would."""
    nodes.init(here, cluster, pool, **settings)
    prepare(here, cluster)
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))


def slow_down(here: nodes.Here) -> None:
    """Make every link of this engine slow from now on."""
    engine = here.live._engine
    assert engine is not None
    for domain in engine._all_domains():
        assert domain.attempt is not None
        here.any["slow"] = domain.attempt.link = SlowLink(domain.attempt.link)  # type: ignore[assignment]


def begin(here: nodes.Here, moment: str) -> None:
    """Start a transfer of that kind in a thread, and return in the middle of it."""
    key = CacheKeyByIdAndIndex(1, 1, 0)

    def run() -> None:
        try:
            if moment == "mid-pull":
                nodes.pull_cache(here, key, "c")
            elif moment == "mid-push":
                nodes.push_cache(here, key, "c")
            else:
                _send_layers(here)
            here.any["outcome"] = ("OK", time.monotonic(), "")
        except Exception as error:
            here.any["outcome"] = (status_of(error), time.monotonic(), str(error))

    here.any["thread"] = thread = threading.Thread(target=run)
    thread.start()
    slow: SlowLink = here.any["slow"]
    before = slow.pieces
    deadline = time.monotonic() + 10
    while slow.pieces < before + 10 and thread.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert thread.is_alive(), here.any["outcome"]


def _send_layers(here: nodes.Here) -> None:
    config = TransferWithCacheKeyConfig(CacheKeyByIdAndIndex(1, 1, 0), range(2), range(2))
    task = here.live.cache_manager.transfer_cache_async(here.caches["c"], Always(), [config])
    (code,) = task.get_results(20_000)
    if code is None:
        raise TimeoutError("the task did not end")
    if code.name != "LLM_SUCCESS":
        raise _Code(code)


class _Code(Exception):
    def __init__(self, code: Any) -> None:
        super().__init__(code.name)
        self.status_code = code


def status_of(error: BaseException) -> str:
    """The status code's name, else the type's."""
    code = getattr(error, "status_code", None)
    return str(code.name) if code is not None else type(error).__name__


def outcome(here: nodes.Here, timeout: float = 30) -> tuple[str, float, str]:
    """Status, time (CLOCK_MONOTONIC, which processes share) and text of what :func:`begin` began."""
    here.any["thread"].join(timeout)
    assert not here.any["thread"].is_alive(), "the transfer hangs"
    result: tuple[str, float, str] = here.any["outcome"]
    return result


def wait_until_broken(here: nodes.Here, comm_id: int) -> tuple[str, float, str]:
    """Wait for link_error; then the status of a pull, and when the error was there."""
    deadline = time.monotonic() + 30
    while (reason := here.live.link_error(comm_id)) is None:
        assert time.monotonic() < deadline, "the fault was not noticed"
        time.sleep(0.001)
    noticed = time.monotonic()
    assert here.live.query_register_mem_status(comm_id).name == "OK"
    try:
        nodes.pull_cache(here, CacheKeyByIdAndIndex(1, 1, 0), "c")
    except Exception as error:
        return status_of(error), noticed, reason
    return "OK", noticed, reason


def pull_now(here: nodes.Here) -> tuple[str, float, str]:
    """The outcome of a pull of what is known."""
    return timed(here, "pull")


def wait_settled(here: nodes.Here, comm_id: int) -> tuple[str, float, str]:
    """Wait until linking has ended."""
    try:
        here.live.wait_link(comm_id)
    except Exception:
        state = here.live.query_register_mem_status(comm_id).name
        return state, time.monotonic(), str(here.live.link_error(comm_id))
    return "OK", time.monotonic(), ""


def timed(here: nodes.Here, what: str, comm_id: int = 0) -> tuple[str, float, str]:
    """Outcome of one call."""
    try:
        if what == "pull":
            nodes.pull_cache(here, CacheKeyByIdAndIndex(1, 1, 0), "c")
        elif what == "unlink":
            here.live.unlink(comm_id)
        else:
            here.live.finalize()
    except Exception as error:
        return status_of(error), time.monotonic(), str(error)
    return "OK", time.monotonic(), ""


# -- what the peer does ----------------------------------------------------------------------


def hold_attach(here: nodes.Here) -> None:
    """From now on this engine does not get done with attaching."""
    engine = here.live._engine
    assert engine is not None
    transport = engine.transport
    here.any["attaching"], here.any["go on"] = threading.Event(), threading.Event()
    open_link = transport.open

    def opened(*args: Any) -> Any:
        link = open_link(*args)
        attach = link.attach

        def slowly(rank: int, offer: Any) -> None:
            here.any["attaching"].set()
            here.any["go on"].wait(30)
            attach(rank, offer)

        link.attach = slowly  # type: ignore[method-assign]
        return link

    transport.open = opened  # type: ignore[method-assign,assignment]


def let_attach(here: nodes.Here) -> None:
    """Let it get done with attaching, now and later."""
    here.any["go on"].set()


def await_attaching(here: nodes.Here) -> None:
    """Wait until it is held there."""
    assert here.any["attaching"].wait(20)


def exit_now(here: nodes.Here) -> None:
    """End the program with live links, as at the end of a script."""
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()


def finalize_after_release(here: nodes.Here) -> None:
    """Finalize while attaching is held, which is let go a moment later."""
    threading.Timer(0.3, here.any["go on"].set).start()
    here.live.finalize()


def _session(here: nodes.Here) -> Any:
    engine = here.live._engine
    assert engine is not None
    return next(iter(engine.views.values())).session


def cut(here: nodes.Here) -> None:
    """Cut the control connection."""
    _session(here)._sock.shutdown(socket.SHUT_RDWR)


def half_open(here: nodes.Here) -> None:
    """Keep the connection and never read it again."""
    session = _session(here)
    session._reactor.call(lambda: session._reactor.unwatch(session._sock.fileno()), 5)


def garbage(here: nodes.Here) -> None:
    """Send a frame that is no message."""
    session = _session(here)
    with session._send_lock:
        session._sock.send(b"\0\0\0\x10" + b"\xff" * 16)
