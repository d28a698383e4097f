"""Owners that give up, peers that misbehave, and a thread of the service that is late."""

from __future__ import annotations

import itertools
import socket
import threading
import time
import weakref
from collections.abc import Iterable
from contextlib import ExitStack

import nixl_skips
import numpy as np
import pytest
from datadist_nixl import service as services
from datadist_nixl import transport as transports
from datadist_nixl.asking import Asker
from datadist_nixl.library import Agent, NixlError
from datadist_nixl.memory import NixlRegion, Ranges
from datadist_nixl.service import Service
from datadist_nixl.serving import GREETING, Server
from datadist_nixl.side import Side
from datadist_nixl.stream import HEADER, Stream
from datadist_nixl.wire import GREETING_BYTES, Kind, hello, pack_metadata, pack_request
from nixl_local import End, linked

from datadist.base import threads
from datadist.transport import (
    Access,
    PeerLost,
    Placement,
    TransferTimeout,
    TransportError,
    TransportOptions,
)
from tests import descriptors
from tests.waiting import SECONDS, until

pytestmark = nixl_skips.needed

SIZE = 1 << 16


def service_of(end: End) -> Service:
    return end.transport._service


def asker(end: End) -> Asker:
    return end.link._askers[1 - end.rank]


def on_owner(end: End, function: str) -> None:
    """Call a method of each connection of an owner, on its thread."""
    service = service_of(end)
    assert service.ask(lambda: service.for_servers(lambda s: getattr(s, function)()), SECONDS)


def test_writes_go_on_after_the_owner_gave_up_its_end_between_two_of_them() -> None:
    with linked(SIZE) as (one, two):
        for number in range(3):
            one.bytes[:] = number + 1
            one.move("write", two, [(0, 0, SIZE)])
            assert (two.bytes == number + 1).all()
            on_owner(two, "_give_up_target")


def test_an_owner_that_talks_without_pause_does_not_move_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounds = itertools.count()

    def look() -> bool:
        assert next(rounds) < 1000, "the deadline is over"
        time.sleep(0.001)
        return True

    with linked(SIZE) as (one, two):
        one.move("read", two, [(0, 0, 64)])
        with monkeypatch.context() as patches:
            patches.setattr(asker(one)._requests, "look", look)
            with pytest.raises(TransferTimeout):
                one.move("read", two, [(0, 0, 64)], timeout=0.05)


def test_a_link_that_is_not_used_stays_when_others_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "STRANGER_SECONDS", 0.2)
    with linked(SIZE) as (one, two):
        time.sleep(0.5)
        assert service_of(two).ask(lambda: None, SECONDS)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
            other.connect("\0" + service_of(two).address.removeprefix("unix:"))
            time.sleep(0.2)
            one.move("read", two, [(0, 0, 64)])


def test_memory_stays_until_the_thread_has_let_go_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports, "RELEASE_SECONDS", 0.1)
    with linked(SIZE) as (_, two):
        region = two.transport.allocate(SIZE, Placement.HOST)
        mapping = weakref.ref(region.keeper)
        go = threading.Event()

        def wait() -> None:
            go.wait(SECONDS)

        service_of(two).call(wait)
        with pytest.raises(TransportError, match="has not let go"):
            two.transport.release(region)
        assert mapping() is not None
        go.set()
        assert service_of(two).ask(lambda: None, SECONDS)


def test_what_is_left_while_the_thread_ends_is_given_up() -> None:
    class Left:
        given_up = False

        def tend(self) -> bool:
            return True

        def abandon(self) -> None:
            self.given_up = True

    with ExitStack() as stack:
        service = service_of(End(stack, 0, SIZE, Access.READ))
        service._stopping = True
        service.call(lambda: None)
        service._thread.join(SECONDS)
        left = Left()
        service.tend(left)
        service.stop()
        assert left.given_up


def test_an_error_in_what_is_left_harms_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    class Left:
        def tend(self) -> bool:
            raise KeyError

        def abandon(self) -> None:
            pass

    with linked(SIZE) as (one, two):
        service_of(two).tend(Left())
        assert service_of(two).ask(lambda: None, SECONDS)
        one.move("read", two, [(0, 0, 64)])
    assert "please report it" in caplog.text


def test_an_asker_that_talks_without_pause_leaves_the_thread_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of its messages may make a new agent of NIXL: one call takes one where time is over."""
    monkeypatch.setattr("datadist_nixl.stream.TURN_SECONDS", -1.0)
    made: list[int] = []

    def make_agent() -> Agent:
        made.append(1)
        raise NixlError("not here")

    here, there = socket.socketpair()
    with there:
        server = Server(Stream(here, GREETING), bytes, {}, make_agent)
        there.send(HEADER.pack(GREETING, Kind.HELLO, 0) + hello(b"g" * GREETING_BYTES))
        there.send((HEADER.pack(5, Kind.MEMORY, 0) + pack_metadata(1, b".")) * 2)
        server.serve()
        assert (server.greeted, len(made), server.busy) == (True, 0, True)
        server.advance()
        assert (len(made), server.busy) == (1, True)
        server.advance()
        assert (len(made), server.busy) == (2, False)
        server.close()


def test_an_asker_has_one_agent_at_a_time() -> None:
    """An owner connects to each that it is told of: many would take its descriptors."""
    with linked(SIZE) as (one, two):
        one.move("read", two, [(0, 0, 64)])
        owner, agent = service_of(two), two.transport._make_agent()
        (server,) = owner._servers.values()
        (metadata,) = agent.register([two.region])
        asker(one)._stream.put(Kind.MEMORY, 0, pack_metadata(server._their_generation, metadata))
        with pytest.raises(PeerLost):
            one.move("read", two, [(0, 0, 64)])
        agent.close()


def test_a_start_that_is_interrupted_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threads.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    # What is loaded once opens and closes descriptors.
    transports.NixlTransport(TransportOptions()).close()
    monkeypatch.setattr(threads, "start", interrupted)
    before = threading.active_count(), descriptors.count()
    with pytest.raises(KeyboardInterrupt):
        transports.NixlTransport(TransportOptions())
    until(lambda: threading.active_count() <= before[0])
    assert descriptors.falls_to(before[1])


def test_many_regions_are_not_sorted_again_with_each_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []

    def counted(rows: Iterable[tuple[int, int, NixlRegion]]) -> Ranges[NixlRegion]:
        made.append(1)
        return Ranges(rows)

    monkeypatch.setattr(transports, "Ranges", counted)
    with linked(SIZE) as (one, two):
        for region in [one.transport.allocate(4096, Placement.HOST) for _ in range(50)]:
            one.transport.release(region)
        one.move("read", two, [(0, 0, 64)])
        assert len(made) == 1


# -- peers that speak the protocol, and misbehave ----------------------------------------------------


class Peer:
    """A process that has an offer, and a connection with that."""

    def __init__(self, stack: ExitStack, service: Service, greeting: bytes) -> None:
        self.service = service
        self.socket = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        self.socket.settimeout(SECONDS)
        self.socket.connect("\0" + service.address.removeprefix("unix:"))
        self.send(Kind.HELLO, 0, hello(greeting))
        self.fence(0)
        *_, self.server = list(service._servers.values())  # the last one that was made

    def send(self, kind: Kind, number: int, body: bytes = b"") -> None:
        self.socket.sendall(HEADER.pack(len(body), kind, number) + body)

    def receive(self) -> tuple[Kind, int]:
        """The next answer, without its body."""
        size, kind, number = HEADER.unpack(self._exactly(HEADER.size))
        self._exactly(size)
        return Kind(kind), number

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.socket.recv(size - len(data))
            assert more, "the owner has closed the connection"
            data += more
        return data

    def fence(self, number: int) -> None:
        """Ask something, and take the answer."""
        self.send(Kind.FENCE, number)
        assert self.receive() == (Kind.FENCED, number)


def test_an_owner_sleeps_while_answers_are_left_unread() -> None:
    many = 1000
    with ExitStack() as stack:
        service = service_of(End(stack, 0, SIZE, Access.READ))
        peer = Peer(stack, service, service.greetings.make())
        for number in range(many):
            peer.send(Kind.FENCE, number)
        until(lambda: bool(peer.server.unsent))
        assert service.ask(lambda: None, SECONDS)
        assert peer.server.unsent
        assert service._timeout(0.0) == -1
        assert [peer.receive() for _ in range(many)] == [(Kind.FENCED, n) for n in range(many)]
        peer.fence(many)
        assert not peer.server.watched


def test_an_owner_looks_ever_more_seldom_after_a_peer_that_does_not_end_its_write() -> None:
    with ExitStack() as stack:
        end = End(stack, 0, SIZE, Access.READ_WRITE)
        service = service_of(end)
        (side,) = service.sides.values()
        peer, other = (Peer(stack, service, service.greetings.make()) for _ in range(2))
        request = np.array([end.region.address]), np.array([64])
        peer.send(Kind.WRITE, 7, pack_request(side.secret, "DRAM", 0, request))
        assert peer.receive()[0] is Kind.TARGET
        assert peer.receive() == (Kind.GO, 7)
        assert service.ask(lambda: None, SECONDS)
        waits = []
        for seconds in (1, 10, 100):
            peer.server.last = time.monotonic() - seconds
            waits.append(service._timeout(0.0))
            other.fence(seconds)  # the events of others change nothing
        assert waits == [0.001, 0.01, 0.1]


def test_a_process_has_few_connections(caplog: pytest.LogCaptureFixture) -> None:
    """The oldest one is closed for a new one, and the owner says why; that of others stay."""
    with ExitStack() as stack:
        service = service_of(End(stack, 0, SIZE, Access.READ))
        other = Peer(stack, service, service.greetings.make())
        greeting = service.greetings.make()
        peers = [Peer(stack, service, greeting) for _ in range(services.MAX_OF_PEER + 2)]
        assert [peer.socket.recv(1) for peer in peers[:2]] == [b"", b""]
        for peer in [other, *peers[2:]]:
            peer.fence(3)
        assert len(service._servers) == services.MAX_OF_PEER + 1
    assert caplog.text.count(f"its process has made {services.MAX_OF_PEER} newer ones") == 2


def test_a_greeting_that_was_not_made_here_opens_nothing() -> None:
    with ExitStack() as stack:
        service = service_of(End(stack, 0, SIZE, Access.READ))
        good = service.greetings.make()
        for bad in (
            bytes(len(good)),
            good[:-1] + bytes([good[-1] ^ 1]),
            bytes([good[0] ^ 1]) + good[1:],
        ):
            with pytest.raises((AssertionError, ConnectionError)):
                Peer(stack, service, bad)
        Peer(stack, service, good)


def test_many_sides_that_end_are_ended_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    with ExitStack() as stack:
        service = service_of(End(stack, 0, SIZE, Access.READ))
        monkeypatch.setattr(service, "end_sides", lambda sides: passes.append(len(sides)))
        go = threading.Event()

        def wait() -> None:
            go.wait(SECONDS)

        service.call(wait)
        for rank in range(50):
            service.end_soon(Side(rank, [], Access.READ))
        go.set()
        assert service.ask(lambda: None, SECONDS)
        assert passes == [50]
        monkeypatch.undo()
