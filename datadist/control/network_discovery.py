"""Discovery of engines on different hosts; ensures exactly one session per pair.

Either end may dial, since often only one of them can be reached. The dialler sends hello, and the
listener answers with its own hello. The dialler then knows the peer. It accepts the connection with
`Welcome`, or closes it if the two have a session already. If both ends dial at once, the connection
of the engine with the smaller incarnation is used. Engines that share a runtime directory connect
through it instead.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from datadist.base.addresses import canonical, is_address
from datadist.base.seen_cases import SeenCases
from datadist.control.hostport import HostPort
from datadist.control.job import described
from datadist.control.listener import Listener
from datadist.control.messages import MAX_HELLO, WIRE_VERSION, Hello, Message, Welcome
from datadist.control.places import Places
from datadist.control.reactor import Reactor, Timer
from datadist.control.runtime_dir import Address, RuntimeDir
from datadist.control.session import Session
from datadist.control.tcp import HANDSHAKE_SECONDS, Dial, NetworkSettings, TcpSession

log = logging.getLogger("datadist.control")

Done = Callable[[Address | str], None]
"""Called with the engine that a dial reached, or with the reason why it failed."""

AGAIN, AGAIN_SECONDS = 3, 0.05
MAX_REPORTED = 256
MAX_MET = 64
"""Connections that proved the key and are no session yet; of more one has to go."""
MAX_MET_PER_HOST = 32
MAX_UNNEEDED = 128
"""Sessions over the network that no link of ours needs; of more one has to go."""
MAX_UNNEEDED_PER_HOST = 32
MAX_SESSIONS_PER_HOST = 256


@dataclass
class _PendingSession:
    """An authenticated connection that is not a session yet."""

    timer: Timer
    done: Done | None
    """Of the caller of :meth:`NetworkDiscovery.contact`; None where the peer dialled."""
    cluster_id: int | None
    again: Callable[[], None] | None = None
    """Dials once more."""
    hello: Hello | None = None
    """The peer's, where it dialled."""


class LocalDiscovery(Protocol):
    """The half of :class:`~datadist.control.discovery.Discovery` that is on this host."""

    address: Address
    directory: RuntimeDir
    sessions: dict[str, Session]

    def hello(self, dial_back: bool = False) -> Hello:
        """The message that says who we are."""

    def is_listed(self, address: Address) -> bool:
        """Whether the engine listens in our runtime directory."""

    def contact(self, address: Address) -> bool:
        """Get a session with the engine there."""

    def needed(self, session: Session) -> bool:
        """Whether a link of ours needs the session."""

    def adopt(self, session: Session, hello: Hello) -> None:
        """Make a connection the session with the engine that said ``hello`` over it."""


class NetworkDiscovery:
    """The network half of :class:`~datadist.control.discovery.Discovery`; runs on the reactor."""

    def __init__(
        self, reactor: Reactor, discovery: LocalDiscovery, settings: NetworkSettings
    ) -> None:
        self._reactor = reactor
        self._discovery = discovery
        self._settings = settings
        self._listeners: dict[HostPort, tuple[Listener, int]] = {}
        self._dials: set[Dial] = set()
        self._met: dict[Session, _PendingSession] = {}
        self._places = Places[Session](MAX_MET_PER_HOST, MAX_MET)
        """Of those that dialled us."""
        self._expected: dict[object, frozenset[str]] = {}
        self._reported = SeenCases(MAX_REPORTED)
        """Incarnations of engines that were refused."""
        self._closed = False

    # -- listening ---------------------------------------------------------------------------

    def listen(self, endpoint: HostPort) -> Listener:
        """The listener at an address, opened once and counted; give it back with :meth:`unlisten`.

        Raises :class:`~datadist.control.listener.NetworkError`.
        """
        found = self._listeners.get(endpoint)
        if found is None:
            listener = Listener(
                self._reactor, endpoint, self._settings, self._accepted, self.expects
            )
            log.info("listening at %s", listener.endpoint)
            found = (listener, 0)
        self._listeners[endpoint] = (found[0], found[1] + 1)
        return found[0]

    def unlisten(self, endpoint: HostPort) -> None:
        """Undo one :meth:`listen` with the same argument; the last one closes."""
        listener, users = self._listeners.pop(endpoint)
        if users > 1:
            self._listeners[endpoint] = (listener, users - 1)
        else:
            listener.close()

    def expect(self, holder: object, hosts: Iterable[str | None]) -> None:
        """Members may come from these addresses until :meth:`forget`; what is none is left out.

        Strangers of other addresses never take the places of those.
        """
        self._expected[holder] = frozenset(canonical(h) for h in hosts if h and is_address(h))

    def forget(self, holder: object) -> None:
        """Undo :meth:`expect` with the same holder, if there was one."""
        self._expected.pop(holder, None)

    def expects(self, host: str) -> bool:
        """Whether a member is expected from an address, or one that a link needs is there."""
        if any(host in hosts for hosts in self._expected.values()):
            return True
        sessions = self._discovery.sessions.values()
        return any(s.address == host and self._discovery.needed(s) for s in sessions)

    # -- dialling ----------------------------------------------------------------------------

    def contact(
        self,
        endpoint: HostPort,
        cluster_id: int | None,
        done: Done,
        seconds: float = HANDSHAKE_SECONDS,
        again: int = AGAIN,
    ) -> None:
        """Dial an address; ``done(engine)`` when the two have met or will, else ``done(reason)``.

        A session that is new arrives by the meeting's ``on_session``, after ``done``. An engine of
        another cluster than ``cluster_id`` is not wanted, if that is given. Connecting may take
        ``seconds``, and so may the handshake. Who hangs up may have preferred its own connection, or
        have had too many of strangers, and is dialled ``again`` so many times.
        """
        if self._closed:
            return

        def once_more() -> None:
            self.contact(endpoint, cluster_id, done, seconds, again - 1)

        def connected(session: TcpSession) -> None:
            self._dials.discard(dial)
            self._meet(session, done, cluster_id, once_more if again else None)
            session.send(self._discovery.hello())

        def failed(reason: str) -> None:
            self._dials.discard(dial)
            if dial.hung_up and again:
                self._reactor.later(AGAIN_SECONDS, once_more)
            else:
                done(reason)

        dial = Dial(self._reactor, endpoint, self._settings, connected, failed, seconds)
        self._dials.add(dial)

    def close(self) -> None:
        """Stop everything but the sessions."""
        self._closed = True
        for listener, _ in self._listeners.values():
            listener.close()
        self._listeners.clear()
        for dial in self._dials:
            dial.cancel()
        self._dials.clear()
        for session in list(self._met):
            self._hang_up(session, "this engine was finalized")

    def abandon(self) -> None:
        """In a forked child: close the descriptors."""
        for listener, _ in self._listeners.values():
            listener.abandon()
        for dial in self._dials:
            dial.abandon()
        for session in self._met:
            session.on_closed = None
            session.abandon()

    # -- getting acquainted --------------------------------------------------------------------

    def _accepted(self, session: TcpSession) -> None:
        host = str(session.address)
        if len(self._sessions_of(host)) >= MAX_SESSIONS_PER_HOST:
            self._refuse(session, f"there are {MAX_SESSIONS_PER_HOST} sessions with {host} already")
            return
        oldest = self._places.crowded(host)
        if oldest is not None:
            self._refuse(oldest, "it was the oldest of many connections that are no session yet")
        self._places.add(session, host)
        self._meet(session, None, None, None)

    def _refuse(self, session: Session, reason: str) -> None:
        """Hang up on who has proved the key; one host's are logged once."""
        if self._reported.is_new(session.address):
            log.warning("refused a connection of %s: %s", session.peer, reason)
        if session in self._met:
            self._hang_up(session, reason)
        else:
            session.close(reason)

    def _sessions_of(self, host: str) -> list[Session]:
        return [s for s in self._discovery.sessions.values() if s.address == host]

    def _meet(
        self,
        session: TcpSession,
        done: Done | None,
        cluster_id: int | None,
        again: Callable[[], None] | None,
    ) -> None:
        left = HANDSHAKE_SECONDS
        if done is None:  # its proof and its hello share one time
            left = max(0.0, session.since + HANDSHAKE_SECONDS - time.monotonic())
        timer = self._reactor.later(left, lambda: session.close("it did not say hello in time"))
        session.limit = MAX_HELLO
        self._met[session] = _PendingSession(timer, done, cluster_id, again)
        session.on_message = self._on_message
        session.on_closed = self._on_closed
        session.start()

    def _forget(self, session: Session) -> _PendingSession:
        met = self._met.pop(session)
        met.timer.cancel()
        self._places.discard(session)
        return met

    def _hang_up(self, session: Session, reason: str, met_engine: Address | None = None) -> None:
        """Close a connection that is not a session yet; report ``met_engine`` or the reason to the
        caller.
        """
        met = self._forget(session)
        session.on_closed = None
        session.close(reason)
        log.debug("no session with %s: %s", session.peer, reason)
        if met.done is not None:
            met.done(reason if met_engine is None else met_engine)

    def _on_closed(self, session: Session, reason: str) -> None:
        met = self._forget(session)
        log.debug("no session with %s: %s", session.peer, reason)
        if met.again is not None:
            self._reactor.later(AGAIN_SECONDS, met.again)
        elif met.done is not None:
            met.done(reason)

    def _on_message(self, session: Session, message: Message, _fds: list[int]) -> None:
        met = self._met[session]
        if isinstance(message, Hello) and met.hello is None:
            problem = self._problem(session, message, met)
            if problem is not None:
                self._hang_up(session, problem)
            elif met.done is None:
                self._answer(session, met, message)
            else:
                self._decide(session, message)
        elif isinstance(message, Welcome) and met.hello is not None:
            self._take(session, met.hello)
        else:
            self._hang_up(session, f"it breaks the protocol: it said {message.kind} out of turn")

    def _problem(self, session: Session, hello: Hello, met: _PendingSession) -> str | None:
        problem = self._difference(session, hello)
        if problem is not None:
            if met.done is None:
                session.send(self._discovery.hello())  # so that the other end can say so too
                if self._reported.is_new(hello.incarnation):  # it tries again and again
                    log.warning("%s", problem)
            return problem
        if hello.incarnation == self._discovery.address.incarnation:
            return "this engine itself answers there"
        if met.cluster_id not in (None, hello.cluster_id):
            return f"cluster {hello.cluster_id} answers there, not cluster {met.cluster_id}"
        return None

    def _difference(self, session: Session, hello: Hello) -> str | None:
        """Why the two can never have a session."""
        who, own_job = f"cluster {hello.cluster_id} ({session.peer})", self._discovery.directory.job
        if hello.wire != WIRE_VERSION:
            return (
                f"{who} speaks control protocol {hello.wire}, this engine {WIRE_VERSION}: install the "
                "same datadist release at both ends"
            )
        if hello.job != own_job:
            return (
                f"{who} belongs to {described(hello.job)}, this engine to {described(own_job)}: set the "
                "same DATADIST_JOB at both ends"
            )
        return None

    def _answer(self, session: Session, met: _PendingSession, hello: Hello) -> None:
        """As the listener: send hello; the dialler decides."""
        address = Address(hello.cluster_id, hello.incarnation)
        for earlier in self._dialled_by(session, hello):
            self._hang_up(earlier, "it dialled again")
        met.hello = hello
        self._places.show(session)
        session.incarnation = hello.incarnation
        if self._discovery.is_listed(address):
            session.send(self._discovery.hello(dial_back=True))
            self._hang_up(session, "it is on this host: meeting in the runtime directory")
            self._discovery.contact(address)
        else:
            session.send(self._discovery.hello())

    def _dialled_by(self, session: Session, hello: Hello) -> list[Session]:
        """Connections that the engine has dialled from the same host, and that are no session yet."""
        return [
            other
            for other, met in self._met.items()
            if met.hello is not None
            and other.incarnation == hello.incarnation
            and other.address == session.address
        ]

    def _decide(self, session: Session, hello: Hello) -> None:
        """As the dialler: accept the connection, or close it in favour of another one."""
        peer, engine = hello.incarnation, Address(hello.cluster_id, hello.incarnation)
        rivals = [s for s, met in self._met.items() if met.hello and s.incarnation == peer]
        if hello.dial_back:
            self._hang_up(session, "it meets us in the runtime directory", engine)
        elif peer in self._discovery.sessions:
            self._hang_up(session, "there is a session already", engine)
        elif rivals and self._discovery.address.incarnation > peer:
            self._hang_up(session, "its own connection comes first", engine)
        else:
            for rival in rivals:
                self._hang_up(rival, "our own connection comes first")
            session.send(Welcome())
            self._take(session, hello)

    def _take(self, session: Session, hello: Hello) -> None:
        met = self._forget(session)
        if met.done is not None:  # first, or nobody would hold the session yet
            met.done(Address(hello.cluster_id, hello.incarnation))
        self._discovery.adopt(session, hello)
        self._end_unneeded()

    def _end_unneeded(self) -> None:
        """Of sessions that no link needs, end the oldest where there are too many."""
        unneeded = [
            s
            for s in self._discovery.sessions.values()
            if s.address is not None and not self._discovery.needed(s)
        ]
        counts = Counter(s.address for s in unneeded)
        crowded = [s for s in unneeded if counts[s.address] > MAX_UNNEEDED_PER_HOST]
        if not crowded and len(unneeded) > MAX_UNNEEDED:
            crowded = sorted(unneeded, key=lambda s: -counts[s.address])
        if crowded:
            self._refuse(crowded[0], "it has too many sessions that no link needs")
