"""One connection to one peer engine: framed messages with descriptors, and its end."""

from __future__ import annotations

import array
import itertools
import logging
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from datadist.base.callers import pass_on
from datadist.base.exclusive import NON_BLOCKING, ROUNDS
from datadist.base.flag import Flag
from datadist.base.texts import in_seconds
from datadist.control.account import LimitExceeded
from datadist.control.closing import unread
from datadist.control.messages import HEADER, MAX_FDS, MAX_FRAME, Message, Sent, decode, encode
from datadist.control.process import open_peer, peer_of
from datadist.control.reactor import READ, WRITE, Reactor, Timer, Unanswered
from datadist.control.turns import Credit, Share

log = logging.getLogger("datadist.control")

MAX_QUEUED = 256 << 20
"""Most bytes that are queued for a peer that does not read; above that the session ends."""
MAX_QUEUED_FRAMES = 1 << 18
"""The same for frames, of which each costs 400 bytes besides its own."""
CHUNK = 1 << 18
"""Bytes read at once."""
TOGETHER = 16
"""Frames that are sent at once, at most."""
KERNEL_FDS = 253
"""Descriptors that one message of the kernel may carry (SCM_MAX_FD). It drops those for which there is
no room, on the thread that receives, which then may wait for what they do when they are closed."""
TRUNCATED = int(socket.MSG_CTRUNC)
"""As a plain number: with the enumeration's member `&` makes an object of Python code each time."""
DRAIN_SECONDS = 0.25
"""Processor time that :meth:`Session.drain` may take."""
STALLED_SECONDS = 0.1
"""A peer that has taken nothing for so long is not waited for."""


def close_all(fds: Iterable[int]) -> None:
    """Close every descriptor."""
    for fd in fds:
        os.close(fd)


class Descriptor:
    """A descriptor that closes with the last reference to this object."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class _Frame:
    """What is to be sent; ``end`` is its place in all that is ever sent."""

    __slots__ = ("data", "end", "fds")

    def __init__(self, frame: bytes, fds: list[int]) -> None:
        self.data = memoryview(frame)
        self.fds = fds
        self.end = 0


class Session:
    """A connected socket, read on the reactor; :meth:`send` works from any thread.

    The kernel reports ``peer_pid`` and ``peer_uid`` (SO_PEERCRED); the pid is None where the peer is in
    a pid namespace that is not visible here. ``on_message(session, message,
    fds)`` owns the descriptors it is given, and what it raises ends the
    session. ``on_closed(session, reason)`` comes once. What arrives is handled in turns (see
    :mod:`datadist.control.turns`), so that a peer that talks without pause keeps nobody waiting.

    This is the session of two processes on one host. :class:`~datadist.control.tcp.TcpSession` is
    the one over the network: no pid, no descriptors, an ``address``.
    """

    peer_pid: int | None = None
    peer_uid: int | None = None
    process: Descriptor | None = None
    """The peer's process, until the session is closed; links keep a reference for longer.

    None over the network, and where the kernel gives none: then the end of the connection tells the
    end of the process.
    """
    address: str | None = None
    """The peer's network address, where it was met over the network."""

    inline = True
    """Whether the thread that calls :meth:`send` sends, unless others do."""

    def __init__(self, reactor: Reactor, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._arrivals = select.epoll()  # asked often: a third of the time of FIONREAD
        self._arrivals.register(sock, select.EPOLLIN)
        self._reactor = reactor
        self._identify()
        self.incarnation = ""
        self.cluster_id = -1
        self.program = ""
        """What runs at the other end, for people."""
        self.closed = False
        self.orderly = False
        self.limit = MAX_FRAME
        """Largest frame that is accepted."""
        self.on_message: Callable[[Session, Message, list[int]], None] | None = None
        self.on_closed: Callable[[Session, str], None] | None = None
        self.dispatching = False
        """Whether something that was read is being handled, or waits for its turn."""
        self.credit = Credit()
        self._handling = False
        self._posted = False
        """Whether the next turn comes without an event of the socket."""
        self._rest: Timer | None = None
        """Ends the time in which the socket is not read."""
        self._ending = False
        self._received = 0
        """Bytes, so far."""
        self._marks: deque[tuple[int, Callable[[], object]]] = deque()
        """Calls to make once what was received by then has been handled."""
        self._inbox = bytearray()
        self._fds: deque[int] = deque()
        self._unsealed: deque[_Frame] = deque()
        self._outbox: deque[_Frame] = deque()
        self._sent = [0]
        """Bytes of each call of the kernel, as noted in C, so that no exception comes before."""
        self._sent_at = time.monotonic()
        self._sending = False
        self._send_posted = False
        """Whether :meth:`_send_what_waits` is posted."""
        self._send_lock = threading.RLock()

    @property
    def peer(self) -> str:
        """The process at the other end, for people."""
        return "a process of another pid namespace" if not self.peer_pid else f"pid {self.peer_pid}"

    @property
    def peer_and_program(self) -> str:
        """The same, with the program that runs there."""
        return f"{self.peer}, {self.program}" if self.program else self.peer

    @property
    def unseen(self) -> bool:
        """Whether the peer is a process of this host that the kernel gives no descriptor of."""
        return self.address is None and self.process is None

    @property
    def takes_descriptors(self) -> bool:
        """Whether :meth:`send` can pass descriptors."""
        return True

    @property
    def control_fd(self) -> int:
        """The socket's descriptor: readable when something has arrived, also the end."""
        return self._sock.fileno()

    def _identify(self) -> None:
        pid, self.peer_uid = peer_of(self._sock)
        self.peer_pid = pid or None
        process = open_peer(self._sock, pid)
        self.process = None if process is None else Descriptor(process)

    def start(self) -> None:
        """Begin to read; on the reactor's thread."""
        self._reactor.watch(self._sock.fileno(), READ, self._on_events)
        if self.process is not None:
            self._reactor.watch(self.process.fd, READ, self._on_exit)

    def send(self, message: Sent, fds: Sequence[int] = ()) -> None:
        """Send or queue; never blocks. Always takes ownership of ``fds``. Does nothing on a closed
        session.

        Raises ``ValueError`` for a message that exceeds a frame.
        """
        self._queue(message, fds)
        if not (self.inline or self._reactor.is_current_thread()):
            self._reactor.post(self._send_waiting)
            return
        try:
            self._send_waiting()
        except BaseException:
            self._reactor.post(self._send_waiting)
            raise

    def send_soon(self, message: Sent, fds: Sequence[int] = ()) -> None:
        """:meth:`send`, on the reactor's thread together with what else this turn sends: one call of the
        kernel, and one wake-up of the peer.
        """
        if not self._reactor.is_current_thread():
            self.send(message, fds)
            return
        self._queue(message, fds)
        if not self._send_posted:
            self._reactor.post(self._send_what_waits)
            self._send_posted = True

    def _send_what_waits(self) -> None:
        self._send_posted = False
        if self._unsealed:  # nobody has sent it meanwhile
            self._send_waiting()

    def _queue(self, message: Sent, fds: Sequence[int]) -> None:
        try:
            frame = encode(message)
        except BaseException:
            close_all(fds)
            raise
        self._unsealed.append(_Frame(frame, list(fds)))

    def _send_waiting(self) -> None:
        """Seal and send what waits; waits for nobody.

        Who is in the middle of that, another thread, or this one before a handler of a signal or
        `__del__` came in between, looks once more afterwards. An exception of theirs may come at any
        moment.
        """
        broken: list[str] = []
        for _ in range(ROUNDS):
            if not self._send_once(broken) or not self._unsealed or broken:
                break
        else:
            self._reactor.post(self._send_waiting)  # others go on; this thread has sent its own
        why = broken[0] if broken else self._excess()
        if why is not None:
            self._reactor.post(lambda: self._give_up(why))
        elif self._outbox:
            self._reactor.post(self._update_events)

    def _send_once(self, broken: list[str]) -> bool:
        """Whether nobody is in the middle of that; why the connection is broken goes to ``broken``."""
        held: list[bool] = []
        try:
            held += map(self._send_lock.acquire, NON_BLOCKING)
            if True not in held or self._sending:
                return False
            self._sending = True
            try:
                self._seal_waiting()
                broken += filter(None, [self._flush()])
            finally:
                self._sending = False
        finally:
            if True in held:
                self._send_lock.release()
        return True

    def _seal_waiting(self) -> None:
        for _ in range(len(self._unsealed)):
            frame = self._unsealed[0]
            if self.closed:
                fds, frame.fds = frame.fds, []
                close_all(fds)
            elif not (self._outbox and self._outbox[-1] is frame):
                frame.data = memoryview(self._seal(bytes(frame.data)))
                frame.end = len(frame.data) + (
                    self._outbox[-1].end if self._outbox else sum(self._sent)
                )
                self._outbox.append(frame)
            self._unsealed.popleft()

    @property
    def _queued(self) -> int:
        """Bytes that the peer has to take yet."""
        try:
            return self._outbox[-1].end - sum(self._sent)
        except IndexError:
            return 0

    def settled(self) -> bool:
        """Whether everything that arrived so far has been handled; from any thread."""
        if self.closed:
            return True
        try:
            waiting = self._arrivals.poll(0, 1)
        except (OSError, ValueError) as error:  # closed meanwhile
            pass_on(error)
            return True
        return not waiting and not self.dispatching

    def catch_up(self, timeout: float) -> None:
        """Wait until what has arrived by now was handled; from any thread.

        Raises :class:`Unanswered` where that takes longer than ``timeout`` seconds.
        """
        deadline, done = time.monotonic() + timeout, Flag()
        self._reactor.call(lambda: self._when_heard(done.set), timeout)
        if not done.wait(max(0.0, deadline - time.monotonic())):
            raise Unanswered(
                f"{self.peer_and_program} sends more than is handled within {in_seconds(timeout)}"
            )

    def drain(self) -> None:
        """Handle what has arrived by now and no more, on the reactor's thread.

        Ends early where that takes long, or was called while a message of this session is handled.
        """
        heard: list[bool] = []
        self._when_heard(lambda: heard.append(True))
        began = time.thread_time()
        while not (heard or self._handling) and time.thread_time() - began < DRAIN_SECONDS:
            self._take_share()

    def close(self, reason: str) -> None:
        """Close and report once, on the reactor's thread; unsent frames are dropped."""
        with self._send_lock:
            if self.closed:
                return
            self.closed = True
            pending = [fd for frame in self._outbox for fd in frame.fds]
            self._outbox.clear()
        self._send_waiting()  # drops what is not sealed yet
        self._reactor.unwatch(self._sock.fileno())
        if self.process is not None:
            self._reactor.unwatch(self.process.fd)
        self._arrivals.close()
        self._reactor.closer.close_socket(self._sock)
        close_all(pending)
        self._reactor.closer.discard(self._fds)
        self._fds.clear()
        self._inbox.clear()
        self.dispatching = False
        try:
            if self.on_closed is not None:
                self.on_closed(self, reason)
        finally:
            self.process = None
            while self._marks:
                self._marks.popleft()[1]()

    def discard(self, fds: Iterable[int]) -> None:
        """Close descriptors that the peer sent; that may block, so not on this thread."""
        self._reactor.closer.discard(fds)

    def abandon(self) -> None:
        """In a forked child: close the socket, without locks, which other threads may have held."""
        self.closed = True
        self._arrivals.close()
        self._sock.close()

    def _excess(self) -> str | None:
        """What the peer leaves unread beyond its limits."""
        if self._queued > MAX_QUEUED:
            return f"it left {self._queued} bytes unread, more than {MAX_QUEUED}"
        if len(self._outbox) > MAX_QUEUED_FRAMES:
            return f"it left {len(self._outbox)} messages unread, more than {MAX_QUEUED_FRAMES}"
        return None

    def sending(self) -> int:
        """What :meth:`hears` needs to know of all that was sent by now."""
        unsealed = sum(len(frame.data) + self._tag_size for frame in list(self._unsealed))
        return sum(self._sent) + self._queued + unsealed

    def hears(self, mark: int) -> bool:
        """Whether what was sent before ``mark`` is on its way still, to a peer that reads."""
        return (
            not self.closed
            and sum(self._sent) - self._underway() < mark
            and time.monotonic() - self._sent_at < STALLED_SECONDS
        )

    def _underway(self) -> int:
        """Bytes that the kernel has taken and the peer does not see yet."""
        return 0

    def _flush(self) -> str | None:
        while self._outbox:
            frame = self._outbox[0]
            self._sent = [sum(self._sent)]
            left = frame.end - self._sent[0]
            if left < len(frame.data):  # descriptors go with the first byte of their frame
                fds, frame.fds = frame.fds, []
                close_all(fds)
            if left <= 0:
                self._outbox.popleft()
                continue
            ours = array.array("i", frame.fds)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, ours)] if ours else []
            try:
                send = self._sock.sendmsg
                data = [frame.data[len(frame.data) - left :], *self._following()]
                self._sent += map(send, (data,), (rights,), (socket.MSG_NOSIGNAL,))
            except BlockingIOError as error:
                pass_on(error)
                return None
            except OSError as error:
                pass_on(error)
                return self._explain("sending", error)
            self._sent_at = time.monotonic()
        return None

    def _following(self) -> Iterator[memoryview]:
        """Frames that can go with the first one: descriptors go with the begin of their own frame."""
        for frame in itertools.islice(self._outbox, 1, TOGETHER):
            if frame.fds:
                return
            yield frame.data

    def _update_events(self) -> None:
        if self.closed:
            return
        events = (0 if self._rest else READ) | (WRITE if self._outbox else 0)
        if events:
            self._reactor.watch(self._sock.fileno(), events, self._on_events)
        else:
            self._reactor.unwatch(self._sock.fileno())

    def _on_events(self, events: int) -> None:
        if events & WRITE:
            self._send_waiting()
            self._update_events()
        if events & READ and not (self._posted or self._rest):
            self._take_share()

    def _give_up(self, reason: str) -> None:
        """Close, once what lies there was heard: a goodbye says more than the failure to send."""
        if not self._ending:
            self._ending = True
            self._when_heard(lambda: self.close(reason))

    def _on_exit(self, _events: int) -> None:
        if self.process is not None:
            self._reactor.unwatch(self.process.fd)
        self._give_up("its process ended")

    # -- what arrives, in turns --------------------------------------------------------------

    def _when_heard(self, call: Callable[[], object]) -> None:
        """Make a call once what has arrived by now was handled, or the session is closed."""
        if self.closed:
            call()
            return
        self._marks.append((self._received + (unread(self._sock) or 0), call))
        if not self._handling:
            self._take_share()

    def _go_on(self) -> None:
        self._posted = False
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None
            self._update_events()
        self._take_share()

    def _take_share(self) -> None:
        """Handle a bounded part of what has arrived; what is left comes in the next turn."""
        if self.closed or self._handling:
            return
        share, self._handling, self.dispatching = Share(), True, True
        reason: str | None = None
        try:
            reason = self._receive(share)
        except Exception as error:
            reason = f"what it sent could not be handled: {type(error).__name__}: {error}"
            log.exception("unexpected error in the control plane; please report it")
        finally:
            self._handling = False
        if self.closed:
            return
        if reason is not None:
            self.close(reason)
            return
        self.dispatching = more = self._frame_end(0) is not None
        self._pass_marks()
        if not self.closed:
            self._plan_next(more, self.credit.spend(share.spent))

    def _plan_next(self, more: bool, rest: float) -> None:
        if rest and not self._marks:
            self._rest = self._rest or self._reactor.later(rest, self._go_on)
            self._update_events()
        elif (more or self._marks) and not self._posted:
            self._posted = True
            self._reactor.post(self._go_on)

    def _pass_marks(self) -> None:
        handled = self._received - len(self._inbox)
        while self._marks:
            target, call = self._marks[0]
            if self._received <= target or (self.dispatching and handled < target):
                return
            self._marks.popleft()
            call()

    def _receive(self, share: Share) -> str | None:
        """Handle frames that are here, then read more, as far as the share goes; why to end."""
        while True:
            reason = self._dispatch(share)
            if reason is not None or self.closed or share.over:
                return reason
            try:
                data, fds, flags = self._receive_some()
            except BlockingIOError:  # all that was there is here: who waits for that much has it
                if self._marks:
                    self._marks = deque((-1, call) for _, call in self._marks)
                return None
            except OSError as error:
                return self._explain("receiving", error)
            self._fds.extend(fds)
            if flags & TRUNCATED:
                return "descriptors it sent were lost (is the descriptor limit reached here?)"
            if not data:
                return "it closed the connection"
            self._inbox += data
            self._received += len(data)
            share.nbytes -= len(data)
            if len(data) < CHUNK and not self._marks:  # epoll tells of what is left
                return self._dispatch(share)

    def _receive_some(self) -> tuple[bytes, list[int], int]:
        data, fds, flags, _ = socket.recv_fds(
            self._sock, CHUNK, KERNEL_FDS, socket.MSG_CMSG_CLOEXEC
        )
        return data, fds, flags

    def _frame_end(self, start: int) -> int | None:
        """Where the frame that begins at ``start`` ends; None where more of it is to come.

        A frame that is too large ends at its header.
        """
        if len(self._inbox) - start < HEADER.size:
            return None
        (size,) = HEADER.unpack_from(self._inbox, start)
        if size > self.limit:
            return start + HEADER.size
        end = start + HEADER.size + int(size) + self._tag_size
        return end if len(self._inbox) >= end else None

    def _dispatch(self, share: Share) -> str | None:
        """Handle complete frames, as far as the share goes; why to end the session."""
        start = 0
        while (end := self._frame_end(start)) is not None and not share.over:
            share.frames -= 1
            reason = self._handle(start, end)
            if reason is not None or self.closed:
                return reason
            start = end
        del self._inbox[:start]
        if end is None and len(self._fds) > MAX_FDS:  # those of one frame may be ahead of its end
            return "it sent descriptors that no message names"
        return None

    def _handle(self, start: int, end: int) -> str | None:
        """Handle the frame there; why to end the session."""
        view, stop = self._inbox, end - self._tag_size
        (size,) = HEADER.unpack_from(view, start)
        if size > self.limit:
            return f"it sent a frame of {size} bytes, more than {self.limit}"
        if not self._unseal(view, start, stop):
            return "a frame was changed, repeated or lost on the way (its MAC is wrong)"
        try:
            message = decode(view[start + HEADER.size : stop])
        except ValueError as error:
            return f"it sent a frame that is not valid: {error}"
        fds = self._take_fds(message)
        if fds is None:
            return "it sent fewer descriptors than it said"
        if self.on_message is not None:
            try:
                self.on_message(self, message, fds)
            except LimitExceeded as error:
                log.warning(
                    "cluster %d (%s) has more than one peer may have, and its session ends: %s",
                    self.cluster_id,
                    self.peer_and_program,
                    error,
                )
                return str(error)
            except Exception as error:
                log.exception("a message of cluster %d (%s) could not be handled; please report it",
                              self.cluster_id, self.peer_and_program)  # fmt: skip
                return f"its {message.kind} could not be handled: {type(error).__name__}: {error}"
        return None

    def _take_fds(self, message: Message) -> list[int] | None:
        count = message.fds if message.kind == "offer" else 0
        if len(self._fds) < count:
            return None
        return [self._fds.popleft() for _ in range(count)]

    # What a session over the network does differently: see TcpSession.

    _tag_size = 0

    def _seal(self, frame: bytes) -> bytes:
        return frame

    def _unseal(self, inbox: bytearray, start: int, end: int) -> bool:
        return True

    def _explain(self, doing: str, error: OSError) -> str:
        return f"{doing} failed: {error}"

    def __repr__(self) -> str:
        return f"Session(cluster {self.cluster_id}, {self.peer})"
