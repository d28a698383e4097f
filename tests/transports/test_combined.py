"""Two transports as one (combined.py): what reaches which, and what is left where one of them fails."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from datadist.rank_table import RankTable
from datadist.transport import (
    Access,
    Availability,
    Capabilities,
    Combining,
    Group,
    Link,
    LinkError,
    Offer,
    OptionError,
    Peer,
    Placement,
    Region,
    RegistrationError,
    Transport,
    TransportError,
    TransportOptions,
    Unsupported,
)
from datadist.transports import combined
from datadist.transports.combined import CombinedRegion, CombinedTransport, combine, why_not
from tests.interrupts import raising_at_jumps

CAN = Capabilities(
    placements=frozenset(Placement), foreign_memory=True, same_host_only=False,
    host_addressable=frozenset(Placement), parallel=4, ordered_reads=True, watches_control=True,
    follows_addresses=True,
)  # fmt: skip


class FakeLink(Link):
    """Notes what is called."""

    def __init__(self, owner: Fake, group: Group, regions: Sequence[Region]) -> None:
        self.owner, self.group, self.regions = owner, group, list(regions)

    def _note(self, what: str, *details: object) -> None:
        self.owner.did(what, *details)

    def offer(self, rank: int) -> Offer:
        return Offer(f"{self.owner.label} to {rank}".encode())

    def attach(self, rank: int, offer: Offer) -> None:
        self._note("attach", rank, offer.data)

    def read(self, rank: int, *_: object) -> bool | None:
        self._note("read", rank)
        return False

    def write(self, rank: int, *_: object) -> None:
        self._note("write", rank)

    def abort(self, rank: int) -> bool | None:
        self._note("abort", rank)
        return self.owner.label == "near"

    def force(self, rank: int) -> None:
        self._note("force", rank)

    def region_added(self, region: Region) -> None:
        self._note("added", region)

    def region_removed(self, region: Region) -> None:
        self._note("removed", region)

    def close(self) -> frozenset[int]:
        self._note("close link")
        return frozenset(self.group.peers) - {self.group.rank}


class Fake(Transport):
    """A transport that moves nothing and notes what is called; ``failing`` names what raises."""

    api_version: ClassVar[int] = 2
    label: ClassVar[str]
    can: ClassVar[Capabilities] = CAN
    log: ClassVar[list[Any]]
    failing: ClassVar[set[str]]
    usable: ClassVar[bool] = True

    @classmethod
    def probe(cls) -> Availability:
        return Availability(cls.usable, f"state of {cls.label}")

    def __init__(self, options: TransportOptions) -> None:
        self.given = dict(options.extra)
        self.did("start")

    def did(self, what: str, *details: object) -> None:
        """Note it, or fail."""
        self.log.append((self.label, what, *details))
        if what in self.failing:
            raise RegistrationError(f"{what} fails")

    @property
    def capabilities(self) -> Capabilities:
        return self.can

    def allocate(self, size: int, placement: Placement) -> Region:
        self.did("allocate", size)
        return Region(4096, size, placement, keeper="memory")

    def register(self, address: int, size: int, placement: Placement) -> Region:
        self.did("register", address, size)
        return Region(address, size, placement)

    def release(self, region: Region) -> None:
        self.did("release", region.address)

    def check_table(self, table: Any, rank: int) -> None:
        self.did("table", rank)

    def connect(self, peer: Peer) -> str:
        return f"{self.label} {peer.rank}"

    def peer_lost(self, peer: Peer) -> None:
        self.did("lost", peer.rank)

    def disconnect(self, peer: Peer) -> None:
        self.did("disconnect", peer.rank)

    def open(self, group: Group, regions: Sequence[Region], access: Access) -> Link:
        self.did("open", sorted(group.peers))
        return FakeLink(self, group, regions)

    def close(self) -> None:
        self.did("close")

    def describe(self) -> dict[str, str]:
        return {"fact": self.label}


@pytest.fixture
def log() -> list[Any]:
    """What was called, in order: the part, the call, its arguments."""
    return []


@pytest.fixture
def make(log: list[Any]) -> Callable[..., type[CombinedTransport]]:
    """Combine two fakes; attributes of one are given by its name."""

    def made(
        near: dict[str, Any] | None = None, far: dict[str, Any] | None = None
    ) -> type[CombinedTransport]:
        classes: list[Any] = []
        for label, given in (("near", near or {}), ("far", far or {})):
            attributes = {"label": label, "log": log, "failing": set(), **given}
            classes.append(type(label, (Fake,), attributes))
        return combine("near", classes[0], "far", classes[1])

    return made


Make = Callable[..., "type[CombinedTransport]"]


def test_lists_are_converted_by_the_first_if_it_has_a_way(make: Make) -> None:
    def convert(*_: object) -> int:
        return 7

    assert make(near={"convert_list": staticmethod(convert)}).convert_list is convert
    assert make(far={"convert_list": staticmethod(convert)}).convert_list is Transport.convert_list


def _start(kind: type[CombinedTransport], **extra: str) -> CombinedTransport:
    return kind(TransportOptions(extra=extra))


def _group(own: int = 0, near: Sequence[int] = (1,), far: Sequence[int] = (2, 3)) -> Group:
    peers = {own: Peer(own, "me")}
    peers |= {rank: Peer(rank, f"i{rank}", pid=7) for rank in near}
    peers |= {rank: Peer(rank, f"i{rank}", address="10.0.0.9") for rank in far}
    return Group("g", own, dict(sorted(peers.items())), None, time.monotonic() + 9)


def _open(transport: CombinedTransport, group: Group) -> tuple[Link, CombinedRegion]:
    region = transport.allocate(64, Placement.HOST)
    assert isinstance(region, CombinedRegion)
    return transport.open(group, [region], Access.READ_WRITE), region


# -- peers ---------------------------------------------------------------------------------------


def test_each_peer_is_linked_by_its_own_part(make: Make, log: list[Any]) -> None:
    link, region = _open(_start(make()), _group())
    assert [each for each in log if each[1] == "open"] == [
        ("near", "open", [0, 1]), ("far", "open", [0, 2, 3]),
    ]  # fmt: skip
    del log[:]
    for rank, part in ((1, "near"), (2, "far"), (3, "far")):
        assert link.backend_of(rank) == part
        assert link.offer(rank).data == f"{part} to {rank}".encode()
        link.attach(rank, Offer(b"x"))
        assert link.read(rank, b"", b"", b"", 1.0) is False
        link.write(rank, b"", b"", b"", 1.0)
        assert link.abort(rank) is (part == "near")
        link.force(rank)
        assert log == [
            (part, "attach", rank, b"x"), (part, "read", rank), (part, "write", rank),
            (part, "abort", rank), (part, "force", rank),
        ]  # fmt: skip
        del log[:]
    assert link.close() == {1, 2, 3}
    assert log == [("near", "close link"), ("far", "close link")]
    assert region.keeper == "memory"


@pytest.mark.parametrize(("near", "far", "opened"), [((1, 2), (), ["near"]), ((), (1, 2), ["far"])])
def test_a_part_without_peers_opens_nothing(
    make: Make, log: list[Any], near: Sequence[int], far: Sequence[int], opened: list[str]
) -> None:
    link, region = _open(_start(make()), _group(near=near, far=far))
    link.region_added(region)
    link.region_removed(region)
    assert [part for part, what, *_ in log if what in ("open", "added", "removed")] == opened * 3
    assert link.close() == {1, 2}


def test_what_belongs_to_a_peer_is_kept_by_its_part(make: Make, log: list[Any]) -> None:
    transport = _start(make())
    near, far = Peer(1, "a"), Peer(2, "b", address="10.0.0.2")
    assert [transport.connect(peer) for peer in (near, far)] == ["near 1", "far 2"]
    transport.peer_lost(far)
    transport.disconnect(far)
    transport.disconnect(near)
    assert log[2:] == [("far", "lost", 2), ("far", "disconnect", 2), ("near", "disconnect", 1)]


def test_a_link_says_what_counts_for_each_peer(make: Make) -> None:
    slow = replace(CAN, parallel=1, watches_control=False, ordered_reads=False)
    transport = _start(make(far={"can": slow}))
    link, _ = _open(transport, _group())
    assert (link.capabilities_of(1), link.capabilities_of(2)) == (CAN, slow)
    assert transport.capabilities == slow


def test_capabilities_of_a_part_that_is_asked_per_rank_count(make: Make) -> None:
    special = replace(CAN, parallel=9)

    class Asked(FakeLink):
        def capabilities_of(self, rank: int) -> Capabilities | None:
            return special

    def opens(self: Fake, group: Group, regions: Sequence[Region], access: Access) -> Link:
        return Asked(self, group, regions)

    link, _ = _open(_start(make(near={"open": opens})), _group())
    assert (link.capabilities_of(1), link.capabilities_of(2)) == (special, CAN)


@pytest.mark.parametrize(
    ("servers", "rank", "asked"),
    [
        ("aabb", 0, ["near", "far"]), ("aabb", 3, ["near", "far"]),
        ("ab", 0, ["far"]), ("aa", 1, ["near"]), ("aab", 2, ["far"]),
    ],
)  # fmt: skip
def test_a_table_is_checked_by_those_who_link_its_peers(
    make: Make, log: list[Any], servers: str, rank: int, asked: list[str]
) -> None:
    devices = tuple(SimpleNamespace(rank=n, server=server) for n, server in enumerate(servers))
    table: Any = RankTable(version="1.0", devices=devices)  # type: ignore[arg-type]
    transport = _start(make())
    del log[:]
    transport.check_table(table, rank)
    assert log == [(part, "table", rank) for part in asked]


# -- memory --------------------------------------------------------------------------------------


def test_both_know_a_region(make: Make, log: list[Any]) -> None:
    transport = _start(make())
    region = transport.allocate(64, Placement.HOST)
    mine = transport.register(8192, 32, Placement.DEVICE)
    transport.release(region)
    transport.release(mine)
    assert log[2:] == [
        ("near", "allocate", 64), ("far", "register", 4096, 64),
        ("near", "register", 8192, 32), ("far", "register", 8192, 32),
        ("far", "release", 4096), ("near", "release", 4096),
        ("far", "release", 8192), ("near", "release", 8192),
    ]  # fmt: skip


def test_memory_that_is_not_aligned_for_the_second_is_not_allocated(
    make: Make, log: list[Any]
) -> None:
    transport = _start(make(far={"can": replace(CAN, alignment=8192)}))
    with pytest.raises(RegistrationError, match="far needs addresses that are multiples of 8192"):
        transport.allocate(64, Placement.HOST)
    assert log[-1] == ("near", "release", 4096)
    assert (
        transport.register(4096, 64, Placement.HOST).address == 4096
    )  # the second checks that itself


@pytest.mark.parametrize("able", ["near", "far"])
def test_remapping_needs_both(make: Make, log: list[Any], able: str) -> None:
    """And does nothing where one of them has no way."""

    def remap(self: Fake, _: Sequence[Region]) -> None:
        self.did("remap")

    with pytest.raises(Unsupported, match="does not remap registered memory"):
        _start(make(**{able: {"remap": remap}})).remap([])
    assert ("near", "remap") not in log
    _start(make(near={"remap": remap}, far={"remap": remap})).remap([])
    assert log[-2:] == [("near", "remap"), ("far", "remap")]


def test_what_one_of_them_refuses_is_known_to_none(make: Make, log: list[Any]) -> None:
    transport = _start(make(far={"failing": {"register"}}))
    with pytest.raises(RegistrationError, match="register fails"):
        transport.allocate(64, Placement.HOST)
    assert log[-1] == ("near", "release", 4096)
    with pytest.raises(RegistrationError, match="register fails"):
        transport.register(8192, 64, Placement.HOST)
    assert log[-1] == ("near", "release", 8192)


def test_the_other_one_lets_go_too(make: Make, log: list[Any]) -> None:
    transport = _start(make(far={"failing": {"release", "close"}}))
    region = transport.allocate(64, Placement.HOST)
    with pytest.raises(RegistrationError, match="release fails"):
        transport.release(region)
    assert log[-1] == ("near", "release", 4096)
    with pytest.raises(RegistrationError, match="close fails"):
        transport.close()
    assert log[-1] == ("near", "close")


def test_memory_stays_mapped_for_the_second(make: Make) -> None:
    region = _start(make()).allocate(64, Placement.HOST)
    assert isinstance(region, CombinedRegion)
    assert region.far.keeper == region.near.keeper == "memory"


def test_both_let_go_where_a_region_is_interrupted(
    make: Make, log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one first, and the first one also where that raises."""
    transport = _start(make(far={"failing": {"release"}}))

    def interrupted(*_: object) -> CombinedRegion:
        raise KeyboardInterrupt

    monkeypatch.setattr(combined, "CombinedRegion", interrupted)
    with pytest.raises(RegistrationError, match="release fails"):
        transport.allocate(64, Placement.HOST)
    assert log[-2:] == [("far", "release", 4096), ("near", "release", 4096)]


def test_new_memory_is_known_to_both_links_or_to_none(make: Make, log: list[Any]) -> None:
    transport = _start(make(far={"failing": {"added"}}))
    link, region = _open(transport, _group())
    with pytest.raises(RegistrationError, match="added fails"):
        link.region_added(region)
    assert log[-3:] == [
        ("near", "added", region.near), ("far", "added", region.far),
        ("near", "removed", region.near),
    ]  # fmt: skip


def test_a_link_that_one_refuses_leaves_none(make: Make, log: list[Any]) -> None:
    transport = _start(make(far={"failing": {"open"}}))
    with pytest.raises(RegistrationError, match="open fails"):
        _open(transport, _group())
    assert log[-1] == ("near", "close link")


def test_copies_are_made_by_the_first(make: Make) -> None:
    first, second = array("q", [5]), array("q", [0])
    to, source = (array("q", [each.buffer_info()[0]]) for each in (second, first))
    _start(make()).copy(to, source, array("q", [8]))
    assert second[0] == 5


# -- starting ------------------------------------------------------------------------------------


def test_options_reach_the_part_that_they_name(make: Make) -> None:
    transport = _start(make(), **{"near.speed": "9", "far.device": "eth0.7"})
    assert transport._near.given == {"speed": "9"}  # type: ignore[attr-defined]
    assert transport._other.given == {"device": "eth0.7"}  # type: ignore[attr-defined]
    for wrong in ("speed", "other.speed", "near."):
        with pytest.raises(OptionError, match=r"expected near\.<option> or far\.<option>"):
            _start(make(), **{wrong: "1"})


def test_a_second_part_that_does_not_start_leaves_no_first(make: Make, log: list[Any]) -> None:
    with pytest.raises(RegistrationError, match="start fails"):
        _start(make(far={"failing": {"start"}}))
    assert log[-1] == ("near", "close")


def test_a_start_that_is_interrupted_leaves_neither_part(make: Make, log: list[Any]) -> None:
    def prepare() -> tuple[type[CombinedTransport], Iterator[Transport]]:
        kind = make()
        parts = iter([part.transport_class(TransportOptions()) for part in (kind.near, kind.far)])
        for part in (kind.near, kind.far):  # code in C, which no exception meets
            object.__setattr__(part, "transport_class", partial(next, parts))
        del log[:]
        return kind, parts

    moments = 0
    for where, (_, left) in raising_at_jumps(prepare, lambda state: _start(state[0])):
        if where.startswith(__file__):  # after the start
            continue
        moments += 1
        assert log == [("far", "close"), ("near", "close")][len(list(left)) :], where
    assert moments


@pytest.mark.parametrize(
    ("near", "far", "said"),
    [
        ({}, {"same_host_only": True}, "far links processes of one host only"),
        ({}, {"self_bootstrapping": True}, "far brings all members together itself"),
        ({"self_bootstrapping": True}, {}, "near brings all members together itself"),
        ({}, {"foreign_memory": False}, "far reaches only memory that it allocates"),
        (
            {"placements": frozenset({Placement.HOST})},
            {"placements": frozenset({Placement.DEVICE})},
            "no placement of memory in common",
        ),
    ],
)
def test_those_that_do_not_fit_together_do_not_start(
    make: Make, log: list[Any], near: dict[str, Any], far: dict[str, Any], said: str
) -> None:
    kind = make(near={"can": replace(CAN, **near)}, far={"can": replace(CAN, **far)})
    with pytest.raises(TransportError, match=said):
        _start(kind)
    assert [each for each in log if each[1] == "close"] == [("far", "close"), ("near", "close")]


def test_common_limits_are_the_lower_ones(make: Make) -> None:
    near = replace(CAN, max_registered={Placement.HOST: 9, Placement.DEVICE: 5}, alignment=64)
    far = replace(
        CAN, max_registered={Placement.HOST: 7}, host_addressable=frozenset({Placement.HOST}),
        alignment=8,
    )  # fmt: skip
    can = _start(make(near={"can": near}, far={"can": far})).capabilities
    assert can.max_registered == {Placement.HOST: 7, Placement.DEVICE: 5}
    assert can.placements == can.host_addressable == {Placement.HOST}
    assert (can.alignment, can.same_host_only) == (64, False)


def test_probe_needs_both(make: Make) -> None:
    assert make().probe() == Availability(True, "near: state of near; far: state of far")
    assert make(far={"usable": False}).probe() == Availability(False, "far: state of far")


def test_what_cannot_be_combined(make: Make) -> None:
    class Whole(Fake):
        combining: ClassVar[Combining] = Combining.NEVER

    assert "named twice" in why_not("a", Fake, "a", Fake)
    assert "whole links all members of a domain, or none" in why_not("a", Fake, "whole", Whole)
    assert "name it alone" in why_not("whole", Whole, "a", Fake)
    assert why_not("a", Fake, "b", Fake) == ""


def test_facts_name_their_part(make: Make) -> None:
    assert _start(make()).describe() == {"near.fact": "near", "far.fact": "far"}


def test_errors_of_a_part_pass(make: Make) -> None:
    class Refusing(FakeLink):
        def attach(self, rank: int, offer: Offer) -> None:
            raise LinkError("not with me", rank)

    def opens(self: Fake, group: Group, regions: Sequence[Region], access: Access) -> Link:
        return Refusing(self, group, regions)

    link, _ = _open(_start(make(near={"open": opens})), _group())
    with pytest.raises(LinkError, match="not with me"):
        link.attach(1, Offer(b""))
    link.attach(2, Offer(b""))
