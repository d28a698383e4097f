"""The transport class: what `datadist` finds by the entry point ``nixl``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from datadist.base.shortage import explain
from datadist.transport import (
    Access,
    Availability,
    Capabilities,
    Combining,
    Group,
    LinkError,
    Peer,
    Placement,
    Region,
    Transport,
    TransportError,
    TransportOptions,
)
from datadist_nixl import library, memory, options
from datadist_nixl.asking import Asker
from datadist_nixl.cuda import Cuda
from datadist_nixl.library import Agent, NixlError
from datadist_nixl.link import NixlLink
from datadist_nixl.memory import NixlRegion, Ranges
from datadist_nixl.service import Service, connect
from datadist_nixl.stream import Stream
from datadist_nixl.wire import MAX_METADATA

if TYPE_CHECKING:
    from typing_extensions import Buffer

PARALLEL = 16
RELEASE_SECONDS = 5.0


class PeerConnection:
    """What all links with one peer process share: the connection over which we ask it."""

    def __init__(self, service: Service, make_agent: Callable[[], Agent]) -> None:
        self._service = service
        self._make_agent = make_agent
        self._lock = threading.Lock()
        self.greeting = service.greetings.make()
        """With which the peer asks us."""
        self.askers: tuple[Asker, ...] = ()
        """The last one is in use, unless it has ended."""

    def asker(self, address: str, greeting: bytes) -> Asker:
        """The connection to the peer. Raises ``OSError``."""
        with self._lock:
            if not (self.askers and self.askers[-1].usable):
                stream = Stream(connect(address), MAX_METADATA)
                near = address.startswith("unix:")
                asker = Asker(stream, greeting, near, self._make_agent, self._service.tend)
                self.askers = (*self.askers, asker)
            return self.askers[-1]

    def lose(self) -> None:
        """Core has lost the peer; never blocks."""
        for asker in self.askers:
            asker.lose()

    def close(self) -> None:
        """No link uses it any more."""
        askers, self.askers = self.askers, ()
        for asker in askers:
            asker.close()


class NixlTransport(Transport):
    """Zero-copy writes by NIXL over UCX: owners write what is asked for, and allow writes of peers.

    Options: see :data:`datadist_nixl.options.KNOWN`, under ``datadist.nixl.<name>``.
    """

    api_version: ClassVar[int] = 2
    priority: ClassVar[int] = 9
    combining: ClassVar[Combining] = Combining.FAR
    options: ClassVar[Mapping[str, str]] = options.KNOWN

    @classmethod
    def probe(cls) -> Availability:
        """Usable where NIXL is installed."""
        found = library.find()
        if found is None:
            return Availability(False, "NIXL is not installed: pip install --no-deps nixl-cu12")
        return Availability(True, f"NIXL ({found}) over UCX")

    def __init__(self, options_: TransportOptions) -> None:
        self._options = options.parse(options_)
        try:
            self._api = library.load()
            self._cuda = Cuda(options_.device_id) if self._options.cuda else None
            self._make_agent().close()  # finds now what would fail at the first transfer
            self._service = Service(self._options, self._make_agent)
        except NixlError as error:
            raise TransportError(str(error)) from error
        except (OSError, RuntimeError) as error:
            raise TransportError(f"the nixl transport does not start: {explain(error)}") from error
        self._lock = threading.Lock()
        self._regions: dict[NixlRegion, None] = {}
        self._ranges: Ranges[NixlRegion] | None = None
        """Of all regions; None where it has to be made again."""
        self._connections: set[PeerConnection] = set()
        self._closed = False
        self._start()

    def _start(self) -> None:
        try:
            self._service.start()
        except BaseException as error:
            self._service.stop()
            if isinstance(error, RuntimeError):
                raise TransportError(f"the nixl transport does not start: {error}") from error
            raise

    def _make_agent(self) -> Agent:
        return Agent(self._api, self._options.device, self._options.transports)

    @property
    def capabilities(self) -> Capabilities:
        """Owners must run: they write what is read, and allow what is written."""
        both = frozenset(Placement)
        return Capabilities(
            placements=both, foreign_memory=True, same_host_only=False, passive_target=False,
            host_addressable=frozenset({Placement.HOST}) if self._cuda else both,
            parallel=PARALLEL, watches_control=True,
            follows_addresses=self._options.transports == options.TCP,
        )  # fmt: skip

    # -- memory ----------------------------------------------------------------------------------

    def allocate(self, size: int, placement: Placement) -> Region:
        """Anonymous memory; NIXL learns of it with the first transfer that touches it."""
        if placement is Placement.DEVICE and self._cuda is not None:
            return self._add(self._cuda.allocate(size))
        return self._add(memory.allocate(size, placement))

    def register(self, address: int, size: int, placement: Placement) -> Region:
        """Memory of the user."""
        if placement is Placement.DEVICE and self._cuda is not None:
            return self._add(self._cuda.region(address, size))
        return self._add(memory.region(address, size, placement))

    def copy(self, dst: Buffer, src: Buffer, length: Buffer) -> None:
        """By the CPU, or by the driver where memory of devices is in use."""
        if self._cuda is None:
            super().copy(dst, src, length)
            return
        columns = [memoryview(each).cast("B").cast("q").tolist() for each in (dst, src, length)]
        self._cuda.copy(list(zip(*columns, strict=True)))

    def _add(self, region: NixlRegion) -> NixlRegion:
        with self._lock:
            self._ranges = None
            self._regions[region] = None
        return region

    def release(self, region: Region) -> None:
        """Forget it; own memory is unmapped when no view uses it any more."""
        assert isinstance(region, NixlRegion)
        with self._lock:
            self._ranges = None
            self._regions.pop(region, None)
        for connection in list(self._connections):
            for asker in connection.askers:
                asker.deregister(region)

        def deregister() -> None:  # holds the region, and with it own memory
            self._service.for_servers(lambda server: server.deregister(region))

        if not self._service.ask(deregister, RELEASE_SECONDS):
            raise TransportError(
                f"the thread of nixl has not let go of it within {RELEASE_SECONDS:.0f} s: keep memory "
                "of your own mapped (a peer may still be sent bytes of it)"
            )
        region.keeper = None

    def _local(self) -> Ranges[NixlRegion]:
        """All regions; made at the first use after a change, since many may come at once."""
        ranges = self._ranges
        if ranges is None:
            with self._lock:
                ranges = Ranges((region.address, region.size, region) for region in self._regions)
                self._ranges = ranges
        return ranges

    # -- peers and links ---------------------------------------------------------------------------

    def connect(self, peer: Peer) -> PeerConnection:
        """The connection is made when the peer's first offer tells where."""
        connection = PeerConnection(self._service, self._make_agent)
        self._connections.add(connection)
        return connection

    def peer_lost(self, peer: Peer) -> None:
        """Fail what waits for it."""
        peer.connection.lose()

    def disconnect(self, peer: Peer) -> None:
        """Close the connection."""
        self._connections.discard(peer.connection)
        peer.connection.close()

    def open(self, group: Group, regions: Sequence[Region], access: Access) -> NixlLink:
        """Nothing is sent."""
        if self._closed:
            raise LinkError("the transport is closed")
        own = [region for region in regions if isinstance(region, NixlRegion)]
        return NixlLink(self._local, group, own, access, self._service)

    def close(self) -> None:
        """End the thread, connections and agents."""
        if self._closed:
            return
        self._closed = True
        for connection in list(self._connections):
            connection.close()
        self._connections.clear()
        self._service.stop()
        if self._cuda is not None:
            self._cuda.close()

    def describe(self) -> Mapping[str, Any]:
        """What UCX uses, and where we are asked."""
        return {
            "device": self._options.device,
            "transports": self._options.transports,
            "asked at": self._service.address,
        }
