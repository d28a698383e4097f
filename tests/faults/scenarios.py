"""What the members of a fault test do, in their own processes."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datadist import (
    CacheDesc,
    CacheKeyByIdAndIndex,
    DataType,
    LayerSynchronizer,
    TransferWithCacheKeyConfig,
)
from datadist.control.session import Session
from datadist.control.tcp import Authentication
from datadist.transport import TransferTimeout
from tests import held, nodes, torn
from tests.nodes import Node
from tests.waiting import until

PIECE = 32 << 10
PAUSE = 0.005
TENSORS, SHAPE, SLOT = 4, [3, 128 << 10], 1
"""A cache of 6 MiB; the slot that moves, between two that do not, takes a slowed link 64 pieces."""
BEFORE_HOLD = 10
"""Pieces of a transfer that is held in its middle."""
BYTE_PAUSE = 0.0005


class SlowLink:
    """A transport's link over a slow wire: small pieces, with pauses between them."""

    def __init__(self, link: Any) -> None:
        self._link = link
        self.pieces = 0
        self.held, self.go_on = threading.Event(), threading.Event()
        """Set where a transfer that :func:`begin` began has come, and may go on."""
        self._hold_at = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def hold(self) -> None:
        """Have the next transfer wait in its middle."""
        self._hold_at = self.pieces + BEFORE_HOLD

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
                if self.pieces == self._hold_at:
                    self.held.set()
                    self.go_on.wait(nodes.SECONDS)
                time.sleep(PAUSE)


class Always(LayerSynchronizer):
    """Every layer is final."""

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        """At once."""
        return True


def prepare(here: nodes.Here, seed: int) -> None:
    """A cache with a pattern."""
    if here.live.backend == "hccl":
        from hccl_sim import engines

        here.any["framework"] = engines.Framework("hccl")
        desc = CacheDesc(TENSORS, SHAPE, DataType.DT_INT32)
        here.caches["c"] = here.live.cache_manager.allocate_cache(desc)
    else:
        nodes.make(here, "c", "cache", SHAPE, TENSORS)
    fill(here, seed)


def fill(here: nodes.Here, seed: int) -> None:
    """Write the cache, which no view reaches in the memory of an NPU."""
    if "framework" in here.any:
        from hccl_sim import engines

        engines.fill(here, "c", seed)
    else:
        nodes.fill(here, "c", seed)


def contents(here: nodes.Here) -> list[Any]:
    """A copy of the cache's tensors."""
    if "framework" in here.any:
        from hccl_sim import engines

        return engines.contents(here, "c")
    return nodes.read(here, "c")


def original(seed: int) -> list[NDArray[np.int32]]:
    """What :func:`fill` wrote."""
    return [nodes.pattern(seed, tensor, tuple(SHAPE)) for tensor in range(TENSORS)]


def after_move(target: int, source: int) -> list[NDArray[np.int32]]:
    """The cache that was filled by seed ``target`` once the slot has come from the other one."""
    return torn.moved(original(target), original(source), {SLOT: SLOT})


def check_moved(we: Node, peer: Node | None, moment: str, whole: bool) -> None:
    """Compare every byte at both ends after a transfer of ours, filled by seed 2, with the peer, by 1.

    ``peer`` is None where it is gone. ``whole``: the transfer was a success.
    """
    pulled = moment == "mid-pull"
    ours, theirs = original(2), original(1)
    found = we.do(contents)
    if pulled:
        torn.check_moved(found, ours, after_move(2, 1), "ours", whole)
    else:
        torn.check_unchanged(found, ours, "what we push")
    if peer is not None and pulled:
        torn.check_unchanged(peer.do(contents), theirs, "what is pulled")
    elif peer is not None:
        torn.check_moved(peer.do(contents), theirs, after_move(1, 2), "the peer's", whole)


def start_engine(here: nodes.Here, cluster: int, pool: int, **settings: Any) -> None:
    """An engine with a cache, in a process that SIGUSR1 ends as `sys.exit` would."""
    nodes.init(here, cluster, pool, **settings)
    prepare(here, cluster)
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))


def link_and_wait(here: nodes.Here, name: str, mapping: dict[int, int], table: str) -> int:
    """Link by a table and wait until it is OK."""
    comm_id = here.live.link(name, mapping, table)
    here.live.wait_link(comm_id)
    return comm_id


def slow_down(here: nodes.Here) -> None:
    """Make every link of this engine slow from now on."""
    engine = here.live._engine
    assert engine is not None
    for domain in engine._all_domains():
        assert domain.attempt is not None
        here.any["slow"] = domain.attempt.link = SlowLink(domain.attempt.link)  # type: ignore[assignment]


def move(here: nodes.Here, moment: str) -> None:
    """One transfer with the peer, from its beginning to its end."""
    key = CacheKeyByIdAndIndex(1, 1, SLOT)
    if moment == "mid-pull":
        nodes.pull_cache(here, key, "c", SLOT)
    elif moment == "mid-push":
        nodes.push_cache(here, key, "c", SLOT)
    else:
        _send_layers(here)


def begin(here: nodes.Here, moment: str) -> None:
    """Start a transfer of that kind in a thread; it waits in its middle until :func:`go_on`."""

    def run() -> None:
        try:
            move(here, moment)
            here.any["outcome"] = ("OK", time.monotonic(), "")
        except Exception as error:
            here.any["outcome"] = (status_of(error), time.monotonic(), str(error))

    slow: SlowLink = here.any["slow"]
    slow.hold()
    here.any["thread"] = thread = threading.Thread(target=run)
    thread.start()
    until(lambda: slow.held.is_set() or not thread.is_alive())
    assert slow.held.is_set(), here.any["outcome"]


def go_on(here: nodes.Here, comm_id: int | None = None) -> None:
    """Let that transfer go on, once the link is known to have broken where it is given."""
    if comm_id is not None:
        until(lambda: here.live.link_error(comm_id) is not None)
    here.any["slow"].go_on.set()


def _send_layers(here: nodes.Here) -> None:
    key = CacheKeyByIdAndIndex(1, 1, SLOT)
    config = TransferWithCacheKeyConfig(key, range(2), range(2), SLOT)
    task = here.live.cache_manager.transfer_cache_async(here.caches["c"], Always(), [config])
    (code,) = task.get_results(20_000)
    if code is None:
        raise TimeoutError("the task did not end")
    if code.name != "LLM_SUCCESS":
        raise Code(code)


class Code(Exception):
    """What a layer-wise transfer ended with."""

    def __init__(self, code: Any) -> None:
        super().__init__(code.name)
        self.status_code = code


def status_of(error: BaseException) -> str:
    """The status code's name, else the type's."""
    code = getattr(error, "status_code", None)
    return str(code.name) if code is not None else type(error).__name__


def outcome(here: nodes.Here, timeout: float = 30) -> tuple[str, float, str]:
    """Status, time (CLOCK_MONOTONIC, which processes share) and text of what :func:`begin` began.

    It goes on now at the latest.
    """
    if "slow" in here.any:
        go_on(here)
    here.any["thread"].join(timeout)
    assert not here.any["thread"].is_alive(), "the transfer hangs"
    result: tuple[str, float, str] = here.any["outcome"]
    return result


def wait_until_broken(here: nodes.Here, comm_id: int) -> tuple[str, float, str]:
    """Wait for link_error; then the status of a pull, and when the error was there."""
    until(lambda: here.live.link_error(comm_id) is not None, what="the fault was not noticed")
    noticed, reason = time.monotonic(), str(here.live.link_error(comm_id))
    assert here.live.query_register_mem_status(comm_id).name == "OK"
    try:
        nodes.pull_cache(here, CacheKeyByIdAndIndex(1, 1, SLOT), "c", SLOT)
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
            nodes.pull_cache(here, CacheKeyByIdAndIndex(1, 1, SLOT), "c", SLOT)
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
        link.attach_at_once = lambda rank, offer: False  # type: ignore[method-assign]
        return link

    transport.open = opened  # type: ignore[method-assign,assignment]


def let_attach(here: nodes.Here) -> None:
    """Let it get done with attaching, now and later."""
    here.any["go on"].set()


def await_loss(here: nodes.Here) -> None:
    """Wait until it has noticed that the control connection is lost."""
    engine = here.live._engine
    assert engine is not None
    until(lambda: not engine.views)


def await_attaching(here: nodes.Here) -> None:
    """Wait until it is held there."""
    assert here.any["attaching"].wait(nodes.SECONDS)


def give_time(here: nodes.Here) -> None:
    """Have links to come fail late only: those that must not, on a crowded machine."""
    engine = here.live._engine
    assert engine is not None
    engine.options = replace(engine.options, link_total_time=nodes.SECONDS)


def exit_now(here: nodes.Here) -> None:
    """End the program with live links, as at the end of a script."""
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()


def let_attach_once_it_ends(here: nodes.Here) -> None:
    """Let it get done with attaching when the link is being ended, which waits for that."""
    attempt = held.attempt_with(here, 2)

    def await_end() -> None:
        until(lambda: attempt.dead)
        here.any["go on"].set()

    threading.Thread(target=await_end, daemon=True).start()


def _session(here: nodes.Here) -> Any:
    engine = here.live._engine
    assert engine is not None
    deadline = time.monotonic() + nodes.SECONDS
    while not engine.views:
        assert time.monotonic() < deadline, "there is no control connection"
        time.sleep(0.001)
    return next(iter(engine.views.values())).session


NONSENSE = b"\0\0\0\x10" + b"\xff" * 64
"""A frame that is no message, long enough for a MAC behind it."""


def give_up(here: nodes.Here) -> None:
    """End the control connection ourselves, as when the peer left too much unread."""
    session = _session(here)
    session._reactor.call(lambda: session.close("made by the test"), 5)


def cut(here: nodes.Here) -> None:
    """Cut the control connection."""
    _session(here)._sock.shutdown(socket.SHUT_RDWR)


def half_open(here: nodes.Here) -> None:
    """Keep the connection and never read it again."""
    session: Any = _session(here)

    def stop_reading() -> None:
        if session._rest is not None:
            session._rest.cancel()  # it would go on where it pauses now
        session._update_events = lambda: None  # nothing that is sent has it watched again
        session._reactor.unwatch(session._sock.fileno())

    session._reactor.call(stop_reading, 5)


def garbage(here: nodes.Here) -> None:
    """Send a frame that is no message."""
    session = _session(here)
    with session._send_lock:
        session._sock.send(NONSENSE)


class SlowSocket:
    """A connection that sends one byte at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def send(self, data: bytes, flags: int = 0) -> int:
        """All of it, slowly."""
        for at in range(len(data)):
            self.sendmsg([data[at : at + 1]], (), flags)
        return len(data)

    def sendmsg(self, data: Sequence[Any], rights: Sequence[Any], flags: int = 0) -> int:
        """One byte."""
        time.sleep(BYTE_PAUSE)
        return self._sock.sendmsg([data[0][:1]], rights, flags)


def slow(here: nodes.Here) -> None:
    """Send one byte at a time from now on, also over connections to come."""
    for made in (Session, Authentication):
        begin = made.__init__

        def slowly(self: Any, reactor: Any, sock: Any, *more: Any, begin: Any = begin) -> None:
            begin(self, reactor, sock if isinstance(sock, SlowSocket) else SlowSocket(sock), *more)

        made.__init__ = slowly  # type: ignore[method-assign]
    engine = here.live._engine
    assert engine is not None
    for view in engine.views.values():
        view.session._sock = SlowSocket(view.session._sock)  # type: ignore[assignment]


def answer_badly(here: nodes.Here, fault: str, port: int) -> None:
    """Be the program that answers at rank 0's address: to two calls of it, in a bad way."""
    kept = here.any["kept"] = []
    with socket.create_server(("127.0.0.1", port)) as listener:
        for _ in range(2):
            sock, _ = listener.accept()
            if fault == "half-open":
                kept.append(sock)
                return
            if fault == "garbage":
                sock.sendall(NONSENSE)
            sock.close()
