"""Two transports as one: peers on this host are linked by the first, peers elsewhere by the second.

A peer is near if core met it over the Unix socket, and far if core met it over the network
(:attr:`Peer.address`). There is no fallback from one to the other. The first transport allocates
memory, the second one registers it as well, so that both reach every region.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

from datadist.transport import (
    API_VERSION,
    Access,
    Availability,
    Capabilities,
    Combining,
    Group,
    KnownCall,
    KnownWay,
    Link,
    Offer,
    OptionError,
    Peer,
    Placement,
    RankTable,
    Region,
    RegistrationError,
    Transport,
    TransportError,
    TransportOptions,
    Unsupported,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["SEPARATOR", "CombinedTransport", "combine", "why_not"]

SEPARATOR = "+"
"""Between the names of the two, as in ``shm+rdma``; also before the name of an option, a dot."""


@dataclass(frozen=True)
class Part:
    """One of the two, as it is loaded."""

    name: str
    transport_class: type[Transport]


class CombinedRegion(Region):
    """Memory that both transports know."""

    __slots__ = ("far", "near")

    def __init__(self, near: Region, far: Region) -> None:
        super().__init__(near.address, near.size, near.placement, near.keeper)
        self.near = near
        self.far = far
        if far.keeper is None:
            far.keeper = near.keeper  # where the second does not let go, the memory stays mapped

    def wait_filled(self, timeout: float) -> None:
        """As that of the transport that made the memory."""
        self.near.wait_filled(timeout)


class CombinedLink(Link):
    """A link of each transport, as far as it has peers."""

    def __init__(self, paths: Mapping[int, _Path], near: Link | None, far: Link | None) -> None:
        self._paths = paths
        """By rank."""
        self._links = {rank: path.link for rank, path in paths.items()}
        self._near = near
        self._far = far

    def capabilities_of(self, rank: int) -> Capabilities | None:
        path = self._paths[rank]
        return path.link.capabilities_of(rank) or path.transport.capabilities

    def backend_of(self, rank: int) -> str | None:
        return self._paths[rank].name

    def offer(self, rank: int) -> Offer:
        return self._links[rank].offer(rank)

    def attach(self, rank: int, offer: Offer) -> None:
        self._links[rank].attach(rank, offer)

    def attach_at_once(self, rank: int, offer: Offer) -> bool:
        return self._links[rank].attach_at_once(rank, offer)

    def read(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> bool | None:
        return self._links[rank].read(rank, local, remote, length, timeout)

    def write(
        self, rank: int, local: Buffer, remote: Buffer, length: Buffer, timeout: float
    ) -> None:
        self._links[rank].write(rank, local, remote, length, timeout)

    def known_way(self, way: KnownWay) -> KnownCall | None:
        return self._links[way.rank].known_way(way)

    def abort(self, rank: int) -> bool | None:
        return self._links[rank].abort(rank)

    def force(self, rank: int) -> None:
        self._links[rank].force(rank)

    def region_added(self, region: Region) -> None:
        """By both, or by none."""
        assert isinstance(region, CombinedRegion)
        parts = [(self._near, region.near), (self._far, region.far)]
        links = [(link, part) for link, part in parts if link is not None]
        told: list[None] = []
        try:
            for link, part in links:
                told += map(link.region_added, (part,))  # noted in C, as in `_known_to_both`
        except BaseException:
            for link, part in links[: len(told)]:
                link.region_removed(part)
            raise

    def region_removed(self, region: Region) -> None:
        assert isinstance(region, CombinedRegion)
        try:
            if self._near is not None:
                self._near.region_removed(region.near)
        finally:
            if self._far is not None:
                self._far.region_removed(region.far)

    def close(self) -> frozenset[int]:
        writers: list[frozenset[int]] = []
        try:
            if self._near is not None:
                writers.append(self._near.close())
        finally:
            if self._far is not None:
                writers.append(self._far.close())
        return frozenset().union(*writers)


@dataclass(frozen=True)
class _Path:
    """How a peer is reached."""

    name: str
    transport: Transport
    link: Link


class CombinedTransport(Transport):
    """The base of the classes that :func:`combine` makes."""

    api_version: ClassVar[int] = API_VERSION
    combining: ClassVar[Combining] = Combining.NEVER
    near: ClassVar[Part]
    far: ClassVar[Part]

    @classmethod
    def probe(cls) -> Availability:
        """Both must be usable."""
        states = [(part, part.transport_class.probe()) for part in (cls.near, cls.far)]
        refused = [f"{part.name}: {state.reason}" for part, state in states if not state.usable]
        reasons = refused or [f"{part.name}: {state.reason}" for part, state in states]
        return Availability(not refused, "; ".join(reasons))

    def __init__(self, options: TransportOptions) -> None:
        near, far = _options_of(options, self.near.name, self.far.name)
        self._parts: list[Transport] = []
        try:
            # Noted in C, as in `_known_to_both`.
            self._parts += map(self.near.transport_class, (near,))
            self._parts += map(self.far.transport_class, (far,))
            self._can = _common(self.near.name, self._near, self.far.name, self._other)
        except BaseException:
            self.close()
            raise

    @property
    def capabilities(self) -> Capabilities:
        """What both can do; a link knows what counts for each peer."""
        return self._can

    @property
    def _near(self) -> Transport:
        return self._parts[0]

    @property
    def _other(self) -> Transport:
        return self._parts[1]

    def _of(self, peer: Peer) -> Transport:
        return self._near if peer.address is None else self._other

    def check_table(self, table: RankTable, rank: int) -> None:
        """By each transport that will link peers of this table."""
        servers = [device.server for device in table.devices]
        here = table.device(rank).server
        if servers.count(here) > 1:
            self._near.check_table(table, rank)
        if any(server != here for server in servers):
            self._other.check_table(table, rank)

    # -- memory ----------------------------------------------------------------------------------

    def allocate(self, size: int, placement: Placement) -> Region:
        """By the first; the second one registers it.

        Raises :class:`RegistrationError` where the first aligns it less than the second needs.
        """
        return self._known_to_both(map(self._near.allocate, (size,), (placement,)), aligned=True)

    def register(self, address: int, size: int, placement: Placement) -> Region:
        """By both."""
        return self._known_to_both(map(self._near.register, (address,), (size,), (placement,)))

    def _known_to_both(self, call: Iterator[Region], aligned: bool = False) -> Region:
        """What the call of the first returns, registered with the second; or neither."""
        made: list[Region] = []
        try:
            made += call  # noted in C: an exception of a handler loses no region
            near = made[0]
            if aligned and near.address % self._can.alignment:
                raise RegistrationError(
                    f"{self.near.name} allocated memory at {near.address:#x}, and {self.far.name} needs "
                    f"addresses that are multiples of {self._can.alignment}: name one of them alone"
                )
            made += map(self._other.register, (near.address,), (near.size,), (near.placement,))
            return CombinedRegion(*made)
        except BaseException:
            with (
                contextlib.ExitStack() as stack
            ):  # the second lets go first; both, also if one raises
                for transport, region in zip((self._near, self._other), made, strict=False):
                    stack.callback(transport.release, region)
            raise

    def registering(self) -> contextlib.AbstractContextManager[None]:
        """Of both."""
        return _Both(self._near.registering(), self._other.registering())

    def release(self, region: Region) -> None:
        """By both, also where one does not let go."""
        assert isinstance(region, CombinedRegion)
        try:
            self._other.release(region.far)
        finally:
            self._near.release(region.near)

    def copy(self, dst: Buffer, src: Buffer, length: Buffer) -> None:
        self._near.copy(dst, src, length)

    def remap(self, regions: Sequence[Region]) -> None:
        """By both. Raises :class:`Unsupported`, before anything is done, where one of them has no way."""
        for part in (self.near, self.far):
            if part.transport_class.remap is Transport.remap:
                raise Unsupported(f"{part.name} does not remap registered memory")
        self._near.remap(regions)
        self._other.remap(regions)

    # -- peers -----------------------------------------------------------------------------------

    def connect(self, peer: Peer) -> Any:
        return self._of(peer).connect(peer)

    def peer_lost(self, peer: Peer) -> None:
        self._of(peer).peer_lost(peer)

    def disconnect(self, peer: Peer) -> None:
        self._of(peer).disconnect(peer)

    def open(self, group: Group, regions: Sequence[Region], access: Access) -> Link:
        """A link of each transport that has peers in the group."""
        parts = [each for each in regions if isinstance(each, CombinedRegion)]
        near: list[Link] = []
        far: list[Link] = []
        try:
            members = _members(group, self._near, self._of)
            if len(members.peers) > 1:
                own = [region.near for region in parts]
                near += map(self._near.open, (members,), (own,), (access,))
            others = _members(group, self._other, self._of)
            if len(others.peers) > 1:
                own = [region.far for region in parts]
                far += map(self._other.open, (others,), (own,), (access,))
            paths = {
                rank: _Path(self.near.name, self._near, each)
                for each in near
                for rank in members.peers
            }
            paths |= {
                rank: _Path(self.far.name, self._other, each)
                for each in far
                for rank in others.peers
            }
            paths.pop(group.rank, None)
            return CombinedLink(paths, next(iter(near), None), next(iter(far), None))
        except BaseException:
            for link in [*near, *far]:
                link.close()
            raise

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # the second first; both, also if one raises
            for transport in self._parts:
                stack.callback(transport.close)

    def describe(self) -> Mapping[str, Any]:
        return {
            f"{part.name}.{name}": value
            for part, transport in ((self.near, self._near), (self.far, self._other))
            for name, value in transport.describe().items()
        }


class _Both(contextlib.AbstractContextManager[None]):
    """Two contexts as one; no generator, in which an exception of a handler may leave them open."""

    def __init__(self, *contexts: contextlib.AbstractContextManager[None]) -> None:
        self._stack = contextlib.ExitStack()
        self._contexts = contexts

    def __enter__(self) -> None:
        self._stack.__enter__()
        try:
            for context in self._contexts:
                self._stack.enter_context(context)
        except BaseException:
            self._stack.close()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)


def combine(
    near_name: str, near: type[Transport], far_name: str, far: type[Transport]
) -> type[CombinedTransport]:
    """The transport ``near_name+far_name``."""
    attributes = {
        "near": Part(near_name, near),
        "far": Part(far_name, far),
        "priority": near.priority,
        "convert_list": staticmethod(near.convert_list),
        "options": {
            f"{name}.{option}": text
            for name, part in ((near_name, near), (far_name, far))
            for option, text in (part.options or {}).items()
        },
        "__doc__": f"{near_name} for peers on this host, {far_name} for the others.",
    }
    return type("CombinedTransport", (CombinedTransport,), attributes)


def why_not(near_name: str, near: type[Transport], far_name: str, far: type[Transport]) -> str:
    """Why these classes cannot be combined; empty where they can."""
    if near_name == far_name:
        return f"{near_name} is named twice: name it alone"
    for name, part in ((near_name, near), (far_name, far)):
        if part.combining is Combining.NEVER:
            return f"{name} links all members of a domain, or none: name it alone"
    return ""


def _options_of(
    options: TransportOptions, near: str, far: str
) -> tuple[TransportOptions, TransportOptions]:
    """The options of each; what the user gave is named ``<transport>.<option>``."""
    given: dict[str, dict[str, str]] = {near: {}, far: {}}
    for key, value in options.extra.items():
        name, _, option = key.partition(".")
        if name not in given or not option:
            raise OptionError(
                f"there is no option {key} of {near}{SEPARATOR}{far}: expected {near}.<option> or "
                f"{far}.<option>"
            )
        given[name][option] = value
    return replace(options, extra=given[near]), replace(options, extra=given[far])


def _common(near_name: str, near: Transport, far_name: str, far: Transport) -> Capabilities:
    """What both can do. Raises :class:`TransportError` where they do not fit together."""
    first, second = near.capabilities, far.capabilities
    if second.same_host_only:
        raise TransportError(
            f"{far_name} links processes of one host only: name it first, or alone"
        )
    for name, can in ((near_name, first), (far_name, second)):
        if can.self_bootstrapping:
            raise TransportError(f"{name} brings all members together itself: name it alone")
    if not second.foreign_memory:
        raise TransportError(f"{far_name} reaches only memory that it allocates: name it alone")
    placements = frozenset(
        placement
        for placement in first.placements & second.placements
        if (placement in first.host_addressable) == (placement in second.host_addressable)
    )
    if not placements:
        raise TransportError(f"{near_name} and {far_name} have no placement of memory in common")
    return Capabilities(
        placements=placements,
        foreign_memory=first.foreign_memory,
        same_host_only=False,
        host_addressable=first.host_addressable & second.host_addressable & placements,
        one_sided_write=first.one_sided_write and second.one_sided_write,
        alignment=max(first.alignment, second.alignment),
        max_registered=_lower(first.max_registered, second.max_registered),
        parallel=min(first.parallel, second.parallel),
        ordered_reads=first.ordered_reads and second.ordered_reads,
        revokes_access=first.revokes_access and second.revokes_access,
        passive_target=first.passive_target and second.passive_target,
        watches_control=first.watches_control and second.watches_control,
        opens_at_once=first.opens_at_once and second.opens_at_once,
        follows_addresses=first.follows_addresses and second.follows_addresses,
    )


def _lower(first: Mapping[Placement, int], second: Mapping[Placement, int]) -> dict[Placement, int]:
    limits = [*first.items(), *second.items()]
    return {kind: min(n for each, n in limits if each is kind) for kind, _ in limits}


def _members(group: Group, transport: Transport, of: Callable[[Peer], Transport]) -> Group:
    """The group as one of the transports sees it: ourselves, and the peers that it links."""

    def chosen() -> Iterator[tuple[int, Peer]]:
        for rank, peer in group.peers.items():
            if rank == group.rank or of(peer) is transport:
                yield rank, peer

    return replace(group, peers=dict(chosen()))
