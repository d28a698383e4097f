"""Discovery of engines on one host; ensures exactly one session per pair.

Each engine listens under its own name from `init` to `finalize`. Of a pair, the engine with the
smaller incarnation dials. The other engine can ask to be dialled back: it connects, sends hello
with ``dial_back``, and disconnects. So a pair never has two sessions, whichever engine starts. For
engines of other hosts see :mod:`datadist.control.network_discovery`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path

from datadist.control.closing import MAX_WAITING
from datadist.control.endpoint import EndpointError, find, hint
from datadist.control.hostport import HostPort
from datadist.control.messages import (
    MAX_FRAME,
    MAX_HELLO,
    WIRE_VERSION,
    AskReport,
    Goodbye,
    Hello,
    Idle,
    Message,
)
from datadist.control.network_discovery import NetworkDiscovery
from datadist.control.own_directory import RuntimeDirError
from datadist.control.own_names import OwnNames
from datadist.control.process import own_program, peer_of, printable
from datadist.control.reactor import READ, Reactor, Timer
from datadist.control.runtime_dir import Address
from datadist.control.session import Session
from datadist.control.tcp import NetworkSettings
from datadist.control.turns import Credits

__all__ = ["Discovery", "EndpointError"]

log = logging.getLogger("datadist.control")

HANDSHAKE_SECONDS = 5.0
MAX_HANDSHAKES = 256
ACCEPTS = 16
"""Connections that are accepted in one turn."""
MAX_SESSIONS = 16
"""Sessions with one process, which has one engine."""
RETRY_SECONDS = 0.05
REFUSAL_SECONDS = 2.0
"""How long sending a refusal to a busy engine is retried."""


class Discovery:
    """Sessions by peer incarnation; every method but the constructor runs on the reactor.

    The owner sets ``on_session(session)``, ``on_message(session, message, fds)``,
    ``on_lost(session, reason, orderly)``, ``on_refused(hello, pid)``, which tells of an engine of
    our job that may not link, and ``on_ask_report(session)``. ``remote`` reaches other hosts; it is
    None without ``network``, and then no network socket is ever opened.
    """

    def __init__(
        self,
        reactor: Reactor,
        cluster_id: int,
        path: Path | None,
        network: NetworkSettings | None = None,
        job: str = "",
    ) -> None:
        self._reactor = reactor
        self._names = OwnNames(path, job, Address(cluster_id, secrets.token_hex(16)))
        self.address, self.directory = self._names.address, self._names.directory
        self.claims = self._names.claims
        self._looking = False
        self._unkept = ""
        self.remote = None if network is None else NetworkDiscovery(reactor, self, network)
        self.sessions: dict[str, Session] = {}
        self.strangers: dict[int, str] = {}
        """Clusters whose engine is here but belongs to another user, and which user that is."""
        self._dialling: set[str] = set()
        self._handshakes: dict[Session, Timer] = {}
        self._holds: dict[str, set[object]] = {}
        self._idle: set[str] = set()
        self._peer_idle: set[str] = set()
        self._reported_full = False
        self._credits = Credits()
        self.on_session: Callable[[Session], None] = lambda _s: None
        self.on_message: Callable[[Session, Message, list[int]], None] = lambda _s, _m, _f: None
        self.on_lost: Callable[[Session, str, bool], None] = lambda _s, _r, _o: None
        self.on_refused: Callable[[Hello, int | None], None] = lambda _h, _p: None
        self.on_ask_report: Callable[[Session], None] = lambda _s: None

    def start(self) -> None:
        """Begin to accept, and to look after our names in the runtime directory."""
        self._accept()
        self._reactor.later(self._names.look_seconds, self._look)

    def _accept(self) -> None:
        self._reactor.watch(self._listener.fileno(), READ, self._on_accept)

    @property
    def _listener(self) -> socket.socket:
        return self._names.listener

    @property
    def _is_open(self) -> bool:
        return self._listener.fileno() >= 0

    # -- our names in the runtime directory --------------------------------------------------

    def _look(self) -> None:
        """Look whether they are all there, on a helper: a file system may hang."""

        def look() -> None:
            try:
                complete = self.has_names()
            finally:
                self._looking = False
            if not complete:
                self._reactor.post(self._keep_names)

        if not self._is_open:
            return
        if not self._looking:
            self._looking = True
            self._reactor.helpers.submit(look, owner=self)
        self._reactor.later(self._names.look_seconds, self._look)

    def has_names(self) -> bool:
        """Whether our names are in the runtime directory, as far as that can be seen; from any thread."""
        try:
            return self._names.touch()
        except OSError:  # no descriptor is left, say
            return True

    def _keep_names(self) -> None:
        try:
            self.keep_names()
        except (OSError, RuntimeDirError) as error:
            if str(error) != self._unkept:
                self._unkept = str(error)
                log.warning(
                    "peers may not find this engine, whose names in %s were removed: %s",
                    self.directory.place, error,
                )  # fmt: skip

    def keep_names(self) -> None:
        """Make our names in the runtime directory again where somebody removed them.

        Raises :class:`RuntimeDirError` or ``OSError``.
        """
        if self._is_open:
            self._names.renew(self._replace_listener)
            self._unkept = ""

    def _replace_listener(self, before: socket.socket) -> None:
        self._reactor.unwatch(before.fileno())
        self._reactor.closer.close_listener(before)
        self._accept()
        for address in list(self.directory.engines()):  # who looked for us in vain
            self.contact(address)

    # -- finding others ----------------------------------------------------------------------

    def contact_cluster(self, cluster_id: int) -> bool:
        """Connect to every engine with that cluster id that is running now.

        An engine that starts later connects to us when it links. False if the search failed, since
        no descriptor was left.
        """
        try:
            found = list(self.directory.engines())
        except OSError as error:
            log.warning("cannot look for cluster %d: %s (see `ulimit -n`)", cluster_id, error)
            return False
        for address in found:
            if address.cluster_id == cluster_id:
                self.contact(address)
        return True

    def listen_at(self, ip: str | None, port: int | None) -> None:
        """Let peers find this engine at ``ip:port``, and there only; None for nowhere, 0 for a free port.

        With a ``remote`` they may be on other hosts.
        An endpoint with the same port stays as it is (LLM-DataDist API, switch_role).
        Raises :class:`EndpointError`; the engine listens nowhere then.
        """
        self._names.listen_at(ip, port, self.remote)

    def listens_at(self) -> HostPort | None:
        """Where peers find this engine; any thread may ask."""
        endpoint = self._names.endpoint
        return None if endpoint is None else endpoint.place

    def find(self, ip: str, port: int) -> Address | None:
        """The engine of our job and host that listens at ``ip:port``, or None.

        Raises :class:`EndpointError` where that is not one engine.
        """
        return find(self.directory, ip, port, self.remote is not None)

    def hint(self, port: int) -> str:
        """A hint about engines that listen at the port but cannot be reached."""
        return hint(self.directory, port)

    def contact(self, address: Address) -> bool:
        """Request a session with the engine, by dialling or by a dial-back request; ends in
        ``on_session``.

        False if certainly no engine is there, or one of another user (see ``strangers``).
        """
        peer = address.incarnation
        if peer in self.sessions or peer in self._dialling or peer == self.address.incarnation:
            return True
        try:
            sock = self.directory.connect(address)
        except BlockingIOError:  # its backlog is full
            self._dialling.add(
                peer
            )  # who asks to be dialled back again meanwhile begins no second try
            self._reactor.later(RETRY_SECONDS, lambda: self._contact_again(address))
            return True
        except OSError as error:
            log.warning("cannot connect to cluster %d: %s", address.cluster_id, error)
            return False
        if sock is None:
            return False
        if self._refuse_stranger(sock, address.cluster_id):
            return False
        if self.address.incarnation < peer:
            self._dialling.add(peer)
            self._begin(sock, peer)
        else:
            self._request_dial_back(sock)
        return True

    def _refuse_stranger(self, sock: socket.socket, cluster_id: int) -> bool:
        """Whether an engine belongs to another user: it would refuse us, and we refuse it."""
        pid, user = peer_of(sock)
        if user == os.geteuid():
            self.strangers.pop(cluster_id, None)
            return False
        who = f"pid {pid}" if pid else "a process of another pid namespace"
        self.strangers[cluster_id] = f"{who} of user {user}, this engine is of user {os.geteuid()}"
        self._reactor.closer.close_socket(sock)
        return True

    def _contact_again(self, address: Address) -> None:
        self._dialling.discard(address.incarnation)
        if self._is_open:
            self.contact(address)

    def tell_refused(self) -> None:
        """Tell every engine of our job that ours was refused: they may be linked with the wrong
        engine.
        """
        deadline = time.monotonic() + REFUSAL_SECONDS
        with contextlib.suppress(OSError):
            for address in list(self.directory.engines()):
                if address != self.address:
                    self._tell_refused(address, deadline)

    def _tell_refused(self, address: Address, deadline: float) -> None:
        try:
            sock = self.directory.connect(address)
        except BlockingIOError:  # its backlog is full
            if time.monotonic() < deadline:
                self._reactor.later(RETRY_SECONDS, lambda: self._tell_refused(address, deadline))
            return
        except OSError as error:
            log.warning("cannot tell cluster %d that this engine may not link: %s",
                        address.cluster_id, error)  # fmt: skip
            return
        if sock is not None:
            self._request_dial_back(sock, refused=True)

    def is_listed(self, address: Address) -> bool:
        """Whether the engine listens in our runtime directory."""
        try:
            if address not in self.directory.engines():
                return False
            sock = self.directory.connect(address)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if sock is not None:
            self._reactor.closer.close_socket(sock)
        return sock is not None

    def hold(self, session: Session, holder: object) -> None:
        """Keep the session until :meth:`release` with the same holder."""
        self._holds.setdefault(session.incarnation, set()).add(holder)
        self._idle.discard(session.incarnation)

    def release(self, session: Session, holder: object) -> None:
        """Undo :meth:`hold`; a session that neither end holds is closed."""
        holders = self._holds.get(session.incarnation, set())
        if holder in holders:
            holders.discard(holder)
            self._check_idle(session)

    def needed(self, session: Session) -> bool:
        """Whether somebody holds the session."""
        return bool(self._holds.get(session.incarnation))

    def close(self) -> None:
        """Stop listening, remove our name, send goodbye to all peers."""
        self._reactor.unwatch(self._listener.fileno())
        with contextlib.suppress(OSError):  # names that cannot be removed are swept later
            self.listen_at(None, None)
        self.directory.remove(self.address)
        self._reactor.closer.close_listener(self._listener)
        self.claims.close()
        if self.remote is not None:
            self.remote.close()
        for session in list(self.sessions.values()):
            session.send(Goodbye())
            session.close("this engine was finalized")
        for session in list(self._handshakes):
            session.close("this engine was finalized")
        self.directory.leave()

    def abandon(self) -> None:
        """In a forked child: close the descriptors without sending anything."""
        self._names.abandon()
        if self.remote is not None:
            self.remote.abandon()
        for session in (*self.sessions.values(), *self._handshakes):
            session.abandon()

    # -- handshake -------------------------------------------------------------------------

    def hello(self, dial_back: bool = False, refused: bool = False) -> Hello:
        """The message that says who we are."""
        return Hello(
            wire=WIRE_VERSION,
            incarnation=self.address.incarnation,
            cluster_id=self.address.cluster_id,
            dial_back=dial_back,
            refused=refused,
            job=self.directory.job,
            program=own_program(),
        )

    def _request_dial_back(self, sock: socket.socket, refused: bool = False) -> None:
        try:
            session = Session(self._reactor, sock)
        except OSError:
            self._reactor.closer.close_socket(sock)
            return
        session.send(self.hello(dial_back=True, refused=refused))
        session.close("knocked")

    def _begin(self, sock: socket.socket, dialled: str | None) -> None:
        try:
            session = Session(self._reactor, sock)
        except OSError as error:  # the peer is gone already, or no descriptor is left
            log.warning("cannot start a session: %s", error)
            self._reactor.closer.close_socket(sock)
            self._dialling.discard(dialled or "")
            return
        session.incarnation, session.limit = dialled or "", MAX_HELLO
        session.on_message = self._on_hello
        session.on_closed = self._on_failed_handshake
        timer = self._reactor.later(
            HANDSHAKE_SECONDS, lambda: session.close("it did not say hello in time")
        )
        self._handshakes[session] = timer
        if session.peer_uid != os.geteuid():
            log.warning("refused %s of user %d", session.peer, session.peer_uid)
            session.close("it belongs to another user")
            return
        if dialled:
            session.send(self.hello())
        session.start()

    def _on_accept(self, _events: int) -> None:
        for _ in range(ACCEPTS):
            if self._reactor.closer.full:
                self._report_full()
                self._pause_accepting()
                return
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                log.warning("cannot accept a connection: %s", error)
                self._pause_accepting()
                return
            self._evict_oldest()
            self._begin(sock, None)

    def _report_full(self) -> None:
        if not self._reported_full:
            self._reported_full = True
            log.warning(
                "%d descriptors that peers sent wait to be closed, one of which hangs: no connection is "
                "accepted while there are %d",
                self._reactor.closer.waiting, MAX_WAITING,
            )  # fmt: skip

    def _evict_oldest(self) -> None:
        """Close the oldest connection without hello above the limit: a peer sends hello at once."""
        if len(self._handshakes) >= MAX_HANDSHAKES:
            waiting = next((s for s in self._handshakes if not s.incarnation), None)
            if waiting is not None:
                waiting.close("too many others wait")

    def _pause_accepting(self) -> None:
        self._reactor.unwatch(self._listener.fileno())
        self._reactor.later(RETRY_SECONDS, self._resume_accepting)

    def _resume_accepting(self) -> None:
        if self._is_open:
            self._accept()

    def _on_failed_handshake(self, session: Session, reason: str) -> None:
        self._handshakes.pop(session).cancel()
        self._dialling.discard(session.incarnation)
        log.debug("no session with %s: %s", session.peer, reason)

    def _on_hello(self, session: Session, message: Message, fds: list[int]) -> None:
        self._reactor.closer.discard(fds)  # those of an offer that came before
        if isinstance(message, AskReport):
            self.on_ask_report(session)
        elif not isinstance(message, Hello):
            session.close(f"it said {message.kind} before hello")
        elif message.wire != WIRE_VERSION:
            log.warning(
                "cluster %d (%s) speaks control protocol %d, this engine %d: install the same "
                "datadist release at both ends",
                message.cluster_id, session.peer, message.wire, WIRE_VERSION,
            )  # fmt: skip
            session.close("it speaks another protocol version")
        elif message.job != self.directory.job:
            session.close("it belongs to another job")
        elif message.refused:
            session.close("it may not link")
            self.on_refused(message, session.peer_pid)
        elif message.dial_back:
            session.close("knocked")
            self.contact(Address(message.cluster_id, message.incarnation))
        elif session.incarnation and session.incarnation != message.incarnation:
            session.close("another engine answered than the one dialled")
        else:
            self._establish(session, message)

    def _establish(self, session: Session, hello: Hello) -> None:
        dialled = bool(session.incarnation)
        if not dialled:
            if hello.incarnation >= self.address.incarnation:
                session.close("it dialled although it should have knocked")
                return
            session.send(self.hello())
        self._handshakes.pop(session).cancel()
        self._dialling.discard(hello.incarnation)
        self.adopt(session, hello)

    def adopt(self, session: Session, hello: Hello) -> None:
        """Make a connection the session with the engine that said ``hello`` over it."""
        earlier = self.sessions.get(hello.incarnation)
        if earlier is not None:  # it said goodbye and came again
            earlier.drain()
            earlier.close("it connected again")
        if self._sessions_with(session.peer_pid) >= MAX_SESSIONS:
            session.on_closed = None
            log.warning("refused a session with cluster %d: its process (%s) has %d others",
                        hello.cluster_id, session.peer, MAX_SESSIONS)  # fmt: skip
            session.close("its process has too many others")
            return
        session.incarnation, session.cluster_id = hello.incarnation, hello.cluster_id
        session.program = printable(hello.program)
        session.on_message, session.on_closed = self._on_session_message, self._on_session_closed
        session.limit = MAX_FRAME
        session.credit = self._credits.of(session.peer_pid, session.address)
        self.sessions[session.incarnation] = session
        self.on_session(session)
        self._check_idle(session)

    def _sessions_with(self, pid: int | None) -> int:
        """How many there are with a process; None is one of a pid namespace that is not visible here."""
        return sum(session.peer_pid == pid for session in self.sessions.values()) if pid else 0

    # -- life of a session -----------------------------------------------------------------

    def _on_session_message(self, session: Session, message: Message, fds: list[int]) -> None:
        peer = session.incarnation
        if isinstance(message, Idle):
            self._peer_idle.add(peer)
            self._check_idle(session)
        elif isinstance(message, Goodbye):
            session.orderly = True
            session.close("it said goodbye")
        else:
            if message.kind in ("announce", "dial"):
                self._peer_idle.discard(peer)
            self.on_message(session, message, fds)

    def _check_idle(self, session: Session) -> None:
        peer = session.incarnation
        if session.closed or self._holds.get(peer):
            return
        if peer not in self._idle:
            self._idle.add(peer)
            session.send(Idle())
        if peer in self._peer_idle and self.address.incarnation < peer:
            session.send(Goodbye())
            session.orderly = True
            session.close("neither end needs it")

    def _on_session_closed(self, session: Session, reason: str) -> None:
        peer = session.incarnation
        log.debug("the session with %s ended: %s", session.peer, reason)
        if self.sessions.get(peer) is session:
            del self.sessions[peer]
        self._holds.pop(peer, None)
        self._idle.discard(peer)
        self._peer_idle.discard(peer)
        self.on_lost(session, reason, session.orderly)
