"""The transport SPI: the interface that a plugin implements; core knows nothing else of a plugin.

Its terms are memory, ranks, addresses and deadlines. It does not know cluster ids, cache keys and
blocks. A plugin is a class derived from :class:`Transport`, published under the entry-point group
``datadist.transports``; the entry point's name is the backend name that users select.

Rules for plugin code: calls end by their deadline. They release the GIL while they wait or copy,
unless that takes only some microseconds. Any thread may call. Reads and writes run in parallel:
up to :attr:`Capabilities.parallel` per link and rank, any number over all ranks and links. Plugins
raise only the error classes of this module. Any other exception is reported to the user as a defect
of the plugin.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from datadist.base.enums import NamedInt
from datadist.base.known_way import KnownCall, KnownWay
from datadist.base.lazy_module import LazyModule
from datadist.base.names import NamedMembers
from datadist.base.picklable import PicklableError

if TYPE_CHECKING:
    import typing_extensions as extensions

    from datadist import rank_table
    from datadist.rank_table import RankTable
else:
    extensions = LazyModule("typing_extensions")
    rank_table = LazyModule("datadist.rank_table")

__all__ = [
    "API_VERSION",
    "ENTRY_POINT_GROUP",
    "FORCE_SECONDS",
    "MAX_SPREAD",
    "Access",
    "AddressError",
    "Availability",
    "Capabilities",
    "Combining",
    "Group",
    "InFlight",
    "KnownCall",
    "KnownWay",
    "Link",
    "LinkError",
    "Offer",
    "OptionError",
    "Peer",
    "PeerLost",
    "Placement",
    "RankTable",
    "Region",
    "RegistrationError",
    "TransferError",
    "TransferTimeout",
    "Transport",
    "TransportError",
    "TransportOptions",
    "Unsupported",
]

API_VERSION = 2
"""Version of this interface; core loads only plugins whose ``api_version`` equals it."""

ENTRY_POINT_GROUP = "datadist.transports"

FORCE_SECONDS = 30.0
"""After so long core has a link end a transfer that is still in flight (:meth:`Link.force`)."""


MAX_SPREAD = 128
"""So many possible numbers there are at most for each listed one (:meth:`Transport.convert_list`)."""


def __getattr__(name: str) -> Any:
    """Load the class of rank tables at its first use, since importing pydantic is slow."""
    if name == "RankTable":
        return rank_table.RankTable
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Placement(NamedInt, metaclass=NamedMembers):
    """Where memory lives: in the host, or in the accelerator."""

    HOST = 0
    DEVICE = 1


class Access(Enum, metaclass=NamedMembers):
    """What peers may do with the regions of a link."""

    READ = "read"
    READ_WRITE = "read_write"


class Combining(Enum, metaclass=NamedMembers):
    """Where a transport can be one of two that serve a communication domain together.

    Such a backend is named ``near+far``: the first one links peers on this host, the second one peers
    that were met over the network.
    """

    NEAR = "near"
    """``auto`` may put it first. The user may name it at either place."""
    FAR = "far"
    """``auto`` may put it second. The user may name it at either place."""
    NAMED = "named"
    """Only where the user names it."""
    NEVER = "never"
    """It needs all members of a domain."""


class InFlight(Protocol):
    """A read or write that goes on although its call has ended; see :meth:`Link.force`."""

    def settled(self) -> bool:
        """Whether nothing of it touches memory any more. From any thread, never blocks."""


class TransportError(PicklableError):
    """Base class of all errors of a transport; it and its subclasses can be pickled."""

    in_flight: InFlight | None = None
    """Set by a read or write that could not be stopped: core keeps the local ranges from being used
    again, and after a write keeps the peer waiting for us, until it has settled. When that takes
    long, core calls :meth:`Link.force`."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Without what is in flight here."""
        make, (kind, args, state) = super().__reduce__()
        state.pop("in_flight", None)
        return make, (kind, args, state)


class RegistrationError(TransportError):
    """Memory could not be allocated, registered or exposed."""


class LinkError(TransportError):
    """A link could not be set up. ``rank`` is the peer it concerns, if one is known."""

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class OptionError(TransportError):
    """A value that the user gave is wrong; the text names the option, the value and what is expected."""


class AddressError(TransportError):
    """A range is outside what the peer offered, or the peer's memory is not accessible."""


class Unsupported(TransportError):
    """This transport does not do what was asked."""


class TransferError(TransportError):
    """A read or write failed. ``link_usable`` tells whether the next one may succeed."""

    def __init__(self, message: str, *, link_usable: bool = False) -> None:
        super().__init__(message)
        self.link_usable = link_usable


class TransferTimeout(TransferError):
    """A read or write did not end by its deadline."""


class PeerLost(TransferError):
    """The peer is lost; no transfer over this link and rank is possible any more."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message, link_usable=False)
        self.rank = rank


@dataclass(frozen=True)
class Availability:
    """Answer of :meth:`Transport.probe`: usable here, and the reason or what was found."""

    usable: bool
    reason: str


@dataclass(frozen=True)
class Capabilities:
    """What a transport can do; core and the conformance kit decide by nothing else what to call."""

    placements: frozenset[Placement]
    """Placements that :meth:`Transport.allocate` and :meth:`Transport.register` accept."""
    foreign_memory: bool
    """Whether :meth:`Transport.register` takes memory that the transport did not allocate."""
    same_host_only: bool
    """Whether all ranks of a link must run on one host."""
    host_addressable: frozenset[Placement] = frozenset({Placement.HOST})
    """Placements whose memory CPU code can touch (NumPy views, copies by the base class)."""
    one_sided_write: bool = True
    """Whether :meth:`Link.write` works."""
    alignment: int = 1
    """Alignment in bytes that registered addresses need, and that allocated ones have."""
    max_registered: Mapping[Placement, int] = field(default_factory=dict)
    """Most bytes that may be registered per placement, pool included; no entry means no limit."""
    self_bootstrapping: bool = False
    """Whether the transport connects the ranks itself, inside :meth:`Link.join`.

    If the rank table has one server, core connects the ranks first, and they join last. With
    several servers the order is open, :meth:`Link.join`, :meth:`Link.exchange`, offer, attach: core
    learns the peers from the exchange.
    """
    parallel: int = 1
    """Most reads and writes that may be in flight per link and rank, 1 or more; core and the
    conformance kit call no more at a time."""
    ordered_reads: bool = False
    """Whether the last segment of a read is read after the bytes of all its other segments."""
    revokes_access: bool = True
    """Whether :meth:`Link.close` ends the access of peers, so that it names only ranks whose writes
    may still be under way. If not, it names every rank that was granted READ_WRITE and got an offer."""
    passive_target: bool = True
    """Whether a peer's memory is reached without that peer's CPU making progress."""
    watches_control: bool = False
    """Whether :meth:`Link.read` tells if :attr:`Peer.control_fd` was readable after the last byte
    was read.

    It also promises that a read of memory that its owner withdraws meanwhile does not break the
    link or the peer: the read raises, or returns any bytes. Small pulls are then much faster, since
    core need not check for messages of the owner before and after each pull.
    """
    opens_at_once: bool = False
    """Whether :meth:`Transport.connect`, :meth:`Transport.disconnect`, :meth:`Link.region_added` and
    :meth:`Transport.open` take some hundred microseconds at most, wait for nothing and start no thread
    of Python; the last one for some hundred regions.

    Core then calls all but the second on the control thread, which serves all links: to hand them to a
    worker and back takes longer.
    """
    follows_addresses: bool = False
    """Whether peers reach what is mapped at an exposed address at the time of a transfer.

    If not, they reach the memory that was there when the region was registered. Core then refuses to
    register memory at an address that an open link still exposes from an earlier registration: other
    memory may be mapped there by now.
    """


@dataclass(frozen=True)
class TransportOptions:
    """Typed options, from the user's configuration and the environment."""

    device_id: int = 0
    """``LLMConfig.device_id``."""
    listen_address: str | None = None
    """The address of ``LLMConfig.listen_ip_info``, by which peers on other hosts reach this one. Core
    listens there itself, on a port that is not told: a transport listens on another one."""
    traffic_class: int | None = None
    """``LLMConfig.rdma_traffic_class``."""
    service_level: int | None = None
    """``LLMConfig.rdma_service_level``."""
    retry_count: int = 1
    """``LLMConfig.link_retry_count``."""
    link_timeout: float = 120.0
    """Seconds that linking may take in all."""
    auth_key: bytes | None = field(default=None, repr=False)
    """``DATADIST_AUTH_KEY``; without it nothing may listen beyond loopback."""
    local_comm_res: str | None = None
    """JSON from the user that describes this engine's device (``llm.LocalCommRes``), for links
    without a rank table; if it is None or empty, the transport determines that itself.
    """
    extra: Mapping[str, str] = field(default_factory=dict)
    """Options ``datadist.<backend>.<name>`` of the user, under ``<name>``."""


class Region:
    """A range of memory that a transport can reach; plugins may derive from it.

    ``keeper`` is any object that keeps the memory mapped while it is referenced, or None. Core's
    array views hold it, so that a view outlives :meth:`Transport.release` without a crash.
    """

    __slots__ = ("address", "keeper", "placement", "size")

    def __init__(
        self, address: int, size: int, placement: Placement, keeper: object | None = None
    ) -> None:
        self.address = address
        self.size = size
        self.placement = placement
        self.keeper = keeper

    def wait_filled(self, timeout: float) -> None:
        """Wait until its pages exist, and the transport no longer replaces them by faster ones.

        At most ``timeout`` seconds. The region can be used before. Core does not wait; `datadist bench`
        does. The base class returns at once. Raises :class:`RegistrationError` where the pages cannot
        be had.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address:#x}, {self.size} bytes, {self.placement})"


@dataclass(frozen=True)
class Offer:
    """What a peer needs to reach our memory: bytes, and descriptors that core sends along.

    Ownership of descriptors is passed on: core owns the descriptors of an offer and closes them
    after sending; :meth:`Link.attach` owns those that it receives. A link whose offer exceeds the
    limits fails. Core closes what nobody took on a thread of its own, since `close` may hang for
    descriptors that another process made; a link that refuses an offer should do so too.
    """

    MAX_DATA: ClassVar[int] = 10 << 20
    """Most bytes of ``data``: all of an offer travels in one message."""
    MAX_REGIONS: ClassVar[int] = 1 << 17
    """Most regions of an engine, and so of an offer: pools and registered ranges."""
    MAX_FDS: ClassVar[int] = 128
    """Most descriptors; to a peer on another host: none."""

    data: bytes
    fds: Sequence[int] = ()


@dataclass(frozen=True)
class Peer:
    """A member of a link; pid and pidfd come from the kernel and exist on the same host only.

    The pid is None where the peer is in a pid namespace that is not visible from ours. The pidfd is None
    where the kernel gives no descriptor of the process; then the end of ``control_fd`` tells its end.
    """

    rank: int
    incarnation: str
    """Unique for one initialised engine; distinguishes a restarted peer from its predecessor.

    Empty for a peer that core does not know yet when it opens a link of a self-bootstrapping
    transport. Then pid, pidfd and address are None too.
    """
    pid: int | None = None
    pidfd: int | None = None
    """Core's descriptor of the process, valid while the link is open; None for ourselves."""
    address: str | None = None
    """Network address, when the peer was met over the network."""
    control_fd: int | None = None
    """Core's connection to the peer. It is readable if data, or the end of the connection, has
    arrived that core has not read yet. Plugins may only poll it, and only during a read (see
    :attr:`Capabilities.watches_control`). None for ourselves and for peers unknown to core.
    """
    connection: Any = None
    """What :meth:`Transport.connect` returned for this peer; the same object in all links with it."""


@dataclass(frozen=True)
class Group:
    """The members of one link; equal on all ranks, except ``rank`` and local descriptors."""

    name: str
    """At most 127 bytes, equal on all ranks, unique per process and device among open links.

    Where a self-bootstrapping transport has to find the peers, the name comes again when the same
    ranks link by the same name and table after they unlinked.
    """
    rank: int
    peers: Mapping[int, Peer]
    """Every member by rank, ourselves included."""
    table: rank_table.RankTable | None
    """Normal form of the rank table; None if the members linked by address."""
    deadline: float
    """``time.monotonic()`` by which the link must be ready."""

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.peers)

    def remaining(self) -> float:
        """Seconds left for setting up the link, never negative."""
        return max(0.0, self.deadline - time.monotonic())


class Link(ABC):
    """One communication domain of a transport: this rank's paths to every other rank."""

    def capabilities_of(self, rank: int) -> Capabilities | None:
        """What this link can do with ``rank``; constant while it is open.

        None, as the base class returns, means :attr:`Transport.capabilities`. Core asks once, after
        :meth:`Transport.open`.
        """
        return None

    def backend_of(self, rank: int) -> str | None:
        """The name of the backend that links us with ``rank``; None means that of the engine."""
        return None

    @abstractmethod
    def offer(self, rank: int) -> Offer:
        """What ``rank`` needs to reach our memory. Local and fast; called once per peer.

        Called on the control thread, which serves all links: it must not block.

        Raises :class:`LinkError` or :class:`RegistrationError`.
        """

    @abstractmethod
    def attach(self, rank: int, offer: Offer) -> None:
        """Take the offer of ``rank`` and own its descriptors, also when it fails.

        Local work; may be slow (mapping, populating), never waits for the peer. Called on a
        worker thread. Raises :class:`LinkError`.
        """

    def attach_at_once(self, rank: int, offer: Offer) -> bool:
        """:meth:`attach`, if that waits for nothing, takes some hundred microseconds and does not fail.

        Called first, on the control thread, which serves all links. False, as the base class returns:
        a worker has to attach, which also tells what is wrong. Then nothing was done, and the
        descriptors are as they were. Must not raise. No descriptor of a peer may be closed here of
        which this would be the last one in use, nor one that is not memory: that may block.
        """
        return False

    def join(self, timeout: float) -> None:  # noqa: B027 - optional by design
        """Connect to the peers inside the transport's own library; the base class does nothing.

        Only for self-bootstrapping transports, before or after the offers were swapped
        (:attr:`Capabilities.self_bootstrapping`). Called on a thread of its own; must notice
        :meth:`close` from another thread within seconds. Raises :class:`LinkError`.
        """

    def exchange(self, data: bytes) -> list[bytes]:
        """After :meth:`join`, swap a small blob with every rank; the result is in rank order.

        A blob has at most 8 KiB; ours is part of the result. Called on the thread of :meth:`join`,
        and like that must end by the group's deadline and notice :meth:`close`.

        Raises :class:`LinkError` where a member left: core closes the link then, and opens another
        one of the same name until the deadline. Every other error is final.
        """
        raise Unsupported("this transport does not exchange blobs")

    @abstractmethod
    def read(
        self,
        rank: int,
        local: extensions.Buffer,
        remote: extensions.Buffer,
        length: extensions.Buffer,
        timeout: float,
    ) -> bool | None:
        """Copy every segment from the memory of ``rank`` into ours, or raise.

        Returns None. If ``watches_control`` is declared, it returns whether the peer's
        ``control_fd`` was readable after the last byte was read, and True if that is unknown, as
        for a peer without one.

        ``local``, ``remote`` and ``length`` are C-contiguous int64 buffers of equal item count
        n >= 1: our addresses, the owner's addresses, bytes (each > 0). ``timeout`` in seconds.
        Local ranges lie in regions of this transport that were not released, whether or not this
        link exposes them; core has checked that. Called on threads of the user and of core. The end
        of the peer's process is noticed within about a second, however far the deadline is.

        Raises :class:`AddressError`, before any byte is moved, if a remote range is outside of the
        offer; the link stays usable. Raises :class:`TransferTimeout`, :class:`PeerLost`,
        :class:`TransferError`; after each of them nothing that this call started touches our memory
        any more, unless its :attr:`~TransportError.in_flight` says otherwise. An exception of a signal
        handler passes through; where the transfer goes on it gets the attribute too.
        """

    @abstractmethod
    def write(
        self,
        rank: int,
        local: extensions.Buffer,
        remote: extensions.Buffer,
        length: extensions.Buffer,
        timeout: float,
    ) -> None:
        """As :meth:`read`, from our memory into that of ``rank``; needs READ_WRITE access.

        Returns when the bytes are in place there, so that the peer sees them at once. Raises
        :class:`Unsupported` if the peer granted READ only. Where the owner moves the bytes, it checks
        the ranges and the access itself: it must not trust who asks. After a failure nothing that this
        call started writes the peer's memory any more, unless its :attr:`~TransportError.in_flight`
        says otherwise: also where the owner moves the bytes, and takes them later.
        """

    def known_way(self, way: KnownWay) -> KnownCall | None:
        """A call that transfers few blocks over a route that core has looked up, in one step.

        ``call(theirs, ours, timeout)`` moves block ``theirs[i]`` of the peer to block ``ours[i]``, or the
        other way if ``way.write``, and returns the seconds that it took. It returns None, and raises
        nothing, where core has to go its own way, over :meth:`read` or :meth:`write`, which also reports
        what is wrong. That is where

        - the lists are not two ``list`` of equal length, not empty, of exactly ``int`` that are blocks
          of the caches; or a block that is written is listed twice;
        - a condition of ``way`` does not hold before the first byte moves;
        - the peer's ``control_fd`` is readable: after the last byte of a read, before the first one of
          a write; or it is None;
        - the transfer failed, is refused, or may take longer than some microseconds. Bytes of a read
          may have arrived then.

        From the look at the conditions until the call returns, no other thread of Python runs: it holds
        the GIL, and runs no code of Python. So nothing that is checked changes meanwhile, and core takes
        no permit for it (:attr:`Capabilities.parallel`). It ends with the link: after :meth:`abort` or
        :meth:`close` it returns None. Any thread may call it.

        None, as the base class returns: there is no such call. Core asks again for each route.
        """
        return None

    @abstractmethod
    def abort(self, rank: int) -> bool | None:
        """End operations with ``rank``, for good: those in flight fail within milliseconds.

        From any thread, never blocks, idempotent. Used for unlink, finalize and a peer's death. If
        it can, a transport also revokes the peer's access to our memory: a peer whose connection is
        lost may be alive and writing.

        Returns None; True where this process itself is still writing bytes of ``rank`` into our memory
        at this moment. Core then calls again, a little later, before it reuses memory of a peer that
        has ended.
        """

    def force(self, rank: int) -> None:
        """Have everything in flight with ``rank`` settle soon, at the cost of the connection to it.

        Core calls it when a transfer that ended with :attr:`TransportError.in_flight` has not settled
        :data:`FORCE_SECONDS` later, and before it closes the link. On a worker; bounded to seconds;
        idempotent. Afterwards no transfer over this link and rank is possible. Transfers over other
        links with the same peer may raise :class:`PeerLost`, and so may those with other ranks of this
        link, where a library can only give up the connections to all of them.

        Raises :class:`TransferError` where that path has ended, but what is in flight goes on: core waits
        until it has settled. Raises :class:`Unsupported`, as the base class does, where nothing can be
        done but wait; the path stays as it is.
        """
        raise Unsupported("this transport cannot end a transfer that is in flight")

    def region_added(self, region: Region) -> None:  # noqa: B027 - optional by design
        """A region was allocated or registered after this link was opened; before its first use.

        Called once per region, on the thread that registers, or at the end of the opening for
        what came meanwhile (then on the control thread where :attr:`Capabilities.opens_at_once` says
        that this is quick); never beside another call of this method or :meth:`region_removed`.
        Transfers of this link may use it as local memory; peers do not reach it over this link.
        Local and quick; the base class does nothing. Raises :class:`RegistrationError`: the
        registration fails.
        """

    def region_removed(self, region: Region) -> None:  # noqa: B027 - optional by design
        """A region of :meth:`region_added` is about to be released; no transfer uses it.

        Called once, before :meth:`Transport.release`; not once :meth:`close` was called. Must not
        raise. The base class does nothing.
        """

    @abstractmethod
    def close(self) -> frozenset[int]:
        """Give up the link: local, idempotent, bounded to seconds even with dead peers.

        It also ends operations in flight, and works on a link that is not complete. After it
        returns, nothing that was started here accesses memory, but for what is in flight. Returns the
        ranks that may still write *our* memory, but no rank that was granted READ only. Core keeps
        that memory until they answer or are gone.
        """


class Transport(ABC):
    """A way to move memory between processes; core makes one instance per engine."""

    api_version: ClassVar[int]
    """The :data:`API_VERSION` the plugin was written for."""
    priority: ClassVar[int] = 0
    """Orders the choice of ``auto``; the highest usable one wins. Third parties: below 10."""
    options: ClassVar[Mapping[str, str] | None] = None
    """Names of the options, with a description each; None where they are not declared.

    The option ``datadist.<backend>.<name>`` can also be set by the environment,
    ``DATADIST_<BACKEND>_<NAME>``. Core merges both into :attr:`TransportOptions.extra`.
    """

    combining: ClassVar[Combining] = Combining.NAMED
    """Whether it can serve a domain together with another transport."""

    @classmethod
    @abstractmethod
    def probe(cls) -> Availability:
        """Whether this machine can use the transport, and why not. Quick; never raises."""

    @abstractmethod
    def __init__(self, options: TransportOptions) -> None:
        """Open the device. Vendor libraries must not be loaded before.

        Raises :class:`OptionError` for wrong options (see ``datadist.plugin_options``), else
        :class:`TransportError` if there is no usable device.
        """

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this instance can do; constant."""

    @classmethod
    def measure(cls) -> Mapping[str, str]:
        """What the transport can measure of this machine, in words by name, for `datadist doctor`.

        Takes at most some 100 ms. Called where :meth:`probe` says usable; never raises. The base class
        has nothing.
        """
        return {}

    @staticmethod
    def convert_list(
        values: list[int],
        limit: int,
        stride: int,
        base: int,
        vector: extensions.Buffer,
        distinct: bool,
        /,
    ) -> int:
        """Turn a long list of blocks into addresses, where native code does that faster than Python.

        Write ``base + stride * value`` of each value into ``vector``, a writable C-contiguous buffer of
        int64, and return how many values are the one before them plus 1. Do that only if ``vector`` has
        as many items as ``values``, each of which is exactly an ``int`` (no truth value, no subclass,
        nothing else with ``__index__``) from 0 to ``limit`` - 1 and, if ``distinct``, listed once. Return
        -1 otherwise, whatever ``vector`` holds by then: core goes through the list itself, and reports
        what is wrong. With ``stride`` 1 and ``base`` 0 it is what ``array("Q").fromlist`` does.

        All sums fit. ``limit`` is below 2**63 and, if ``distinct``, at most :data:`MAX_SPREAD` times the
        number of values. The list is of the user, whose threads may change it meanwhile. Any thread may
        call, for any engine of the process. Raises nothing but ``MemoryError``. The base class leaves all
        lists to core.
        """
        return -1

    def check_table(self, table: rank_table.RankTable, rank: int) -> None:  # noqa: B027 - optional
        """What this transport needs of a rank table; core has checked its structure.

        Raises :class:`LinkError` naming the field. The base class needs nothing.
        """

    @abstractmethod
    def allocate(self, size: int, placement: Placement) -> Region:
        """Zeroed memory of ``size`` bytes that this transport can expose to peers.

        Raises :class:`RegistrationError`, or ``MemoryError`` when there is not enough.
        """

    @abstractmethod
    def register(self, address: int, size: int, placement: Placement) -> Region:
        """Make memory that the user owns reachable; ranges never overlap earlier ones.

        Raises :class:`RegistrationError` if the memory is not mapped, or not in that placement.
        """

    def registering(self) -> contextlib.AbstractContextManager[None]:
        """Context of several calls of :meth:`register`; the memory mappings do not change in it.

        A transport that has to read the mappings of the process can read them once. One thread at a
        time; the base class does nothing.
        """
        return contextlib.nullcontext()

    @abstractmethod
    def release(self, region: Region) -> None:
        """Undo :meth:`allocate` or :meth:`register`; no open link uses the region.

        Called in the user's call, or on a worker thread after a link was closed. Raises
        :class:`TransportError` where the device does not let go.
        """

    def copy(
        self,
        dst: extensions.Buffer,
        src: extensions.Buffer,
        length: extensions.Buffer,
    ) -> None:
        """Copy between local regions of any placement: int64 buffers as in :meth:`Link.read`.

        The base class handles memory that the CPU can address. Raises :class:`TransportError`.
        """
        views = (memoryview(dst).cast("B").cast("q"), memoryview(src).cast("B").cast("q"))
        for to, frm, n in zip(*views, memoryview(length).cast("B").cast("q"), strict=True):
            ctypes.memmove(to, frm, n)

    def copies(
        self,
    ) -> Mapping[str, Callable[[extensions.Buffer, extensions.Buffer, extensions.Buffer], None]]:
        """What :meth:`copy` may use, by name, each to be measured by itself; the base class has nothing.

        Called by `datadist bench` only.
        """
        return {}

    def remap(self, regions: Sequence[Region]) -> None:
        """Make device memory reachable again after it was recreated at the same addresses.

        ``regions`` are ranges inside registered memory. Raises :class:`Unsupported`, as the base
        class does, where the transport cannot do that.
        """
        raise Unsupported("this transport does not remap registered memory")

    def connect(self, peer: Peer) -> Any:
        """What all links with one peer process share, such as an endpoint; the base class has nothing.

        Core calls neither this nor :meth:`peer_lost` nor :meth:`disconnect` where the class overrides
        none of the three.

        Called on a worker (or the control thread, see :attr:`Capabilities.opens_at_once`) before the
        first link with a peer is opened, and again once it was lost
        or disconnected: by incarnation, there is one at a time that is not lost. The result is
        :attr:`Peer.connection` in the group of each link with that peer. Local and quick: the
        peer's offers come later. Not called for ourselves, nor by self-bootstrapping transports
        whose peers are not known yet. Raises :class:`LinkError`.
        """
        return None

    def peer_lost(self, peer: Peer) -> None:  # noqa: B027 - optional by design
        """Core has lost a peer: its process has ended, or its session has. The base class does nothing.

        Called once for what :meth:`connect` returned, between that and :meth:`disconnect`. On the
        control thread, which serves all links: it must not block, and must not raise. Each link
        with that peer gets :meth:`Link.abort` as well.
        """

    def disconnect(self, peer: Peer) -> None:  # noqa: B027 - optional by design
        """Give back what :meth:`connect` returned (:attr:`Peer.connection`).

        Called once, on the thread that has closed the last link with that peer, or in `finalize`.
        Bounded to seconds, also where the peer is dead; must not raise.
        """

    @abstractmethod
    def open(self, group: Group, regions: Sequence[Region], access: Access) -> Link:
        """Make this rank's side of a link. Local and quick.

        Called on worker threads, several of which may be opening links over the same regions, or on the
        control thread (:attr:`Capabilities.opens_at_once`).
        ``regions`` are those that peers may touch for the link's life, with ``access``.
        Raises :class:`LinkError` or :class:`RegistrationError`.
        """

    @abstractmethod
    def close(self) -> None:
        """Free everything, after all links were closed; idempotent."""

    def describe(self) -> Mapping[str, Any]:
        """Facts for the log (device, library versions); may be empty.

        Core logs them (INFO) after :meth:`__init__`.
        """
        return {}
