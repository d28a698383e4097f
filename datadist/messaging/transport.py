"""The base class for transports over engines that send and receive."""

from __future__ import annotations

import ctypes
import logging
import mmap
import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from datadist.base.shortage import explain
from datadist.messaging.dispatcher import Dispatcher
from datadist.messaging.engine import Engine, EngineError
from datadist.messaging.link import MessagingLink
from datadist.messaging.loop import LoopEnded
from datadist.messaging.pieces import MIN_PIECE
from datadist.transport import (
    Access,
    Capabilities,
    Group,
    LinkError,
    Peer,
    Placement,
    Region,
    RegistrationError,
    Transport,
    TransportError,
    TransportOptions,
)

__all__ = ["MessagingTransport"]

log = logging.getLogger("datadist.messaging")

PARALLEL = 64
FLUSH_SECONDS = 1.0
MS_ASYNC = 1


class MessagingTransport(Transport):
    """A transport whose owners move the bytes, over an engine that sends and receives.

    A plugin derives from it, sets ``api_version``, and defines ``probe`` and :meth:`make_engine`::

        class AcmeTransport(MessagingTransport):
            api_version = 2

            @classmethod
            def probe(cls):
                return Availability(True, "Acme over Ethernet")

            def make_engine(self, options):
                return AcmeEngine(options.extra.get("device", "lo"))

    One thread serves all links; all links with one peer process share one endpoint. Memory is any
    that the CPU can address; HOST and DEVICE are labels, unless the plugin overrides ``capabilities``
    and what belongs to memory.
    """

    same_host_only: bool = False
    """Whether the engine reaches processes of the same host only; :meth:`make_engine` may set it, as its
    options say."""

    @abstractmethod
    def make_engine(self, options: TransportOptions) -> Engine:
        """Open the engine; called once, by the constructor and so on the user's thread.

        Raises :class:`~datadist.transport.OptionError`,
        :class:`~datadist.transport.TransportError` or
        :class:`~datadist.messaging.engine.EngineError`.
        """

    def __init__(self, options: TransportOptions) -> None:
        self._closed = False
        try:
            self._engine = self.make_engine(options)
        except EngineError as error:
            raise TransportError(str(error)) from error
        try:
            _check_engine(self._engine)
            self._dispatcher = Dispatcher(self._engine)
            self._dispatcher.loop.start()
        except BaseException as error:
            self._engine.close()
            if isinstance(error, EngineError):
                raise TransportError(str(error)) from error
            if isinstance(error, (OSError, RuntimeError)):
                raise TransportError(f"no thread for the engine: {explain(error)}") from error
            raise

    @property
    def capabilities(self) -> Capabilities:
        """Everything but that the owner must run for others to reach its memory."""
        both = frozenset(Placement)
        return Capabilities(
            placements=both, foreign_memory=True, same_host_only=self.same_host_only,
            host_addressable=both, passive_target=False, parallel=PARALLEL,
            follows_addresses=True,
        )  # fmt: skip

    # -- memory ----------------------------------------------------------------------------------

    def allocate(self, size: int, placement: Placement) -> Region:
        """Anonymous memory, which is freed with the region and its keeper."""
        try:
            keeper = (ctypes.c_char * size).from_buffer(mmap.mmap(-1, size))
        except (OSError, OverflowError, ValueError) as error:
            raise MemoryError(f"{size} bytes: {error}") from error
        return Region(ctypes.addressof(keeper), size, placement, keeper)

    def register(self, address: int, size: int, placement: Placement) -> Region:
        """Any memory of the process; msync tells whether it is mapped."""
        first = address & -mmap.PAGESIZE
        area = ctypes.c_void_p(first), ctypes.c_size_t(address + size - first)
        if ctypes.CDLL(None).msync(*area, MS_ASYNC):
            raise RegistrationError(f"the {size} bytes at {address:#x} are not mapped here")
        return Region(address, size, placement)

    def release(self, region: Region) -> None:
        """The memory is freed with its last user."""
        region.keeper = None

    # -- peers and links ---------------------------------------------------------------------------

    def connect(self, peer: Peer) -> Any:
        """Keep the session with this peer between its links; it begins with the first offer."""
        self._dispatcher.loop.call(lambda: self._dispatcher.hold(peer.incarnation))
        return object()

    def peer_lost(self, peer: Peer) -> None:
        """End the sessions that began over this connection; a later one of the same peer stays."""
        self._dispatcher.loop.call(lambda: self._dispatcher.lose(peer))

    def disconnect(self, peer: Peer) -> None:
        """Undo :meth:`connect`."""
        self._dispatcher.loop.call(lambda: self._dispatcher.release(peer.incarnation))

    def open(self, group: Group, regions: Sequence[Region], access: Access) -> MessagingLink:
        """Nothing is sent."""
        ended = self._dispatcher.loop.ended
        if ended is not None:
            raise LinkError(f"the engine cannot be used any more: {ended}")
        return MessagingLink(group, regions, access, self._engine, self._dispatcher)

    def close(self) -> None:
        """Send what tells peers of the end, for a second at most, then end thread and engine."""
        if self._closed:
            return
        self._closed = True
        loop, until = self._dispatcher.loop, time.monotonic() + FLUSH_SECONDS
        try:
            while (
                not loop.ask(self._dispatcher.is_idle, FLUSH_SECONDS) and time.monotonic() < until
            ):
                time.sleep(0.005)
        except LoopEnded as error:
            log.debug("nothing more was sent: %s", error)
        if loop.stop():
            try:
                self._engine.close()
            except Exception:
                log.exception("unexpected error of an engine; please report it")
        else:
            log.warning("the engine is left open: a call of it did not end")


def _check_engine(engine: Engine) -> None:
    if engine.piece < MIN_PIECE or engine.window < 1:
        raise TransportError(
            f"{type(engine).__name__} has pieces of {engine.piece} bytes and a window of "
            f"{engine.window}; at least {MIN_PIECE} bytes and 1 are needed"
        )
