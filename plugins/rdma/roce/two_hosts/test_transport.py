"""The transport between two hosts, without core: what the network does to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from roce import spi
from roce.nodes import RemoteNode, lab, start_here, wait_for_other
from roce.spi import MIB

from tests.nodes import Node, RemoteError

SIZE = 4 * MIB
DATA = spi.expected(1, SIZE)
HOSTS = ("10.99.0.1", "10.99.0.2")
HOSTS6 = ("fd00:99::1", "fd00:99::2")
PATIENCE = 0.47
"""4.096 us x 2^14 x 7: silence after which a peer is lost."""
SLACK = 6.0
"""For emulated machines on a busy host."""

Record = Callable[[str, object], None]


class Two:
    """Rank 0 here, which moves, and rank 1 in the other machine, whose memory is moved."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.mover: Node = start_here({})
        self.local = self.mover.do(spi.start, SIZE, options)
        self.start_owner()

    def start_owner(self) -> None:
        """Start the owner, anew after its machine was off."""
        self.owner = RemoteNode({})
        self.remote = self.owner.do(spi.start, SIZE, self.options)
        self.owner.do(spi.fill, 1)

    def connect(self, name: str, access: str = "read", hosts: tuple[str, str] = HOSTS) -> None:
        """Link the two."""
        spi.connect(self.mover, self.owner, name, access, hosts)

    def disconnect(self, name: str) -> None:
        """Close the link on both sides."""
        self.mover.do(spi.close_link, name)
        self.owner.do(spi.close_link, name)

    def vectors(self, *segments: tuple[int, int, int]) -> tuple[list[int], list[int], list[int]]:
        """Addresses and lengths of (offset here, offset there, bytes)."""
        local, remote, length = zip(*segments, strict=True)
        return [self.local + n for n in local], [self.remote + n for n in remote], list(length)

    def read_all(self, name: str, timeout: float = 60) -> float:
        """Read everything in blocks that change places, and check it; returns the seconds."""
        self.mover.do(spi.clear)
        count = SIZE // 8192
        blocks = [(n * 8192, (n ^ 1) * 8192, 8192) for n in range(count)]
        took = self.mover.do(spi.move, name, 1, "read", *self.vectors(*blocks), timeout)
        got = np.frombuffer(self.mover.do(spi.content), np.uint8).reshape(count // 2, 2, 8192)
        assert (got[:, ::-1].reshape(-1) == DATA).all()
        return float(took)

    def begin_long_read(self, name: str) -> None:
        """Begin a read that takes minutes, to be interrupted."""
        segment = (0, 0, MIB)
        self.mover.begin(spi.try_move, name, 1, "read", *self.vectors(*[segment] * 10_000), 300.0)
        time.sleep(1)

    def close(self) -> None:
        """End both."""
        self.mover.do(spi.stop)
        self.mover.close()
        self.owner.close()


@pytest.fixture(scope="module")
def two() -> Iterator[Two]:
    """Two processes on two hosts with the transport open."""
    wait_for_other()
    pair = Two()
    yield pair
    pair.close()


@pytest.mark.parametrize("hosts", [HOSTS, HOSTS6], ids=["IPv4", "IPv6"])
def test_the_route_to_the_peer_chooses_the_address(two: Two, hosts: tuple[str, str]) -> None:
    name = f"route-{hosts[0]}"
    two.connect(name, "read_write", hosts)
    two.read_all(name)
    two.mover.do(spi.move, name, 1, "write", *two.vectors((0, MIB, MIB)))
    there = np.frombuffer(two.owner.do(spi.content), np.uint8)
    here = np.frombuffer(two.mover.do(spi.content), np.uint8)
    assert (there[MIB : 2 * MIB] == here[:MIB]).all()
    assert (there[2 * MIB :] == DATA[2 * MIB :]).all()
    two.owner.do(spi.fill, 1)
    (line,) = two.mover.do(spi.log_of, f"link {name} to rank 1")
    assert f"({hosts[0]}) to {hosts[1]}, MTU 4096" in line
    two.disconnect(name)


def test_the_traffic_class_is_on_the_wire() -> None:
    seen = {}
    for traffic_class in (None, 104):
        two = Two(traffic_class=traffic_class, service_level=3)
        two.connect("marked")
        lab(do="watch")
        two.read_all("marked")
        packets = lab(do="seen")["packets"]
        seen[traffic_class] = {(who, tos) for who, tos, _, _ in packets}
        assert sum(count for _, _, code, count in packets if code == 0x0C) == SIZE // 8192
        two.close()
    assert seen == {None: {("a", 0), ("b", 0)}, 104: {("a", 104), ("b", 104)}}


def test_lost_packets_only_slow_it_down(two: Two, record_property: Record) -> None:
    two.connect("lossy")
    whole = two.read_all("lossy")
    lab(do="wire", cut=False, loss=0.01)
    slowed = two.read_all("lossy", timeout=120)
    lab(do="watch")
    lost = lab(do="seen")["lost"]
    assert lost > 0
    record_property(
        "1 % of packets lost: 4 MiB take", f"{slowed:.2f} s ({lost} lost), else {whole:.2f} s"
    )
    lab(do="wire", cut=False, loss=0.0)
    two.read_all("lossy")
    two.disconnect("lossy")


def test_a_short_cut_of_the_wire_is_survived(two: Two) -> None:
    two.connect("short")
    two.mover.begin(spi.move, "short", 1, "read", *two.vectors(*[(0, 0, MIB)] * 60), 120.0)
    time.sleep(0.5)
    lab(do="wire", cut=True, loss=0.0)
    time.sleep(0.1)
    lab(do="wire", cut=False, loss=0.0)
    two.mover.result(130)
    two.read_all("short")
    two.disconnect("short")


def test_a_cut_wire_ends_the_read_and_the_next_link_works(
    two: Two, record_property: Record
) -> None:
    two.connect("cut")
    two.begin_long_read("cut")
    lab(do="wire", cut=True, loss=0.0)
    cut = time.monotonic()
    kind, text, usable, _ = two.mover.result(60)
    took = time.monotonic() - cut
    assert (kind, usable) == ("PeerLost", False), text
    record_property("wire cut in mid-read: PeerLost after", f"{took:.2f} s")
    assert PATIENCE / 2 < took < PATIENCE * 4 + SLACK
    lab(do="wire", cut=False, loss=0.0)
    two.disconnect("cut")
    two.connect("mended")
    two.read_all("mended")
    two.disconnect("mended")


def test_an_address_that_nobody_has_fails_the_link(two: Two, record_property: Record) -> None:
    two.mover.do(spi.open_link, "nobody", 0, "read", HOSTS[1])
    offer = two.owner.do(spi.open_link, "nobody", 1, "read", HOSTS[0])
    absent = offer.replace(b"0a630002", b"0a63004d")  # 10.99.0.77
    assert absent != offer
    begun = time.monotonic()
    with pytest.raises(RemoteError, match="cannot connect to rank 1 at 10") as caught:
        two.mover.do(spi.attach, "nobody", 1, absent)
    assert caught.value.kind == "LinkError"
    assert "10.99.0.77" in caught.value.text
    assert "timed out" in caught.value.text
    took = time.monotonic() - begun
    record_property("address that nobody has: LinkError after", f"{took:.2f} s")
    assert took < 10 + SLACK
    two.disconnect("nobody")


def test_power_loss_of_the_peer_and_its_return(two: Two, record_property: Record) -> None:
    two.connect("doomed")
    two.begin_long_read("doomed")
    lab(do="power_off")
    off = time.monotonic()
    kind, text, usable, _ = two.mover.result(60)
    took = time.monotonic() - off
    assert (kind, usable) == ("PeerLost", False), text
    record_property("peer's power lost in mid-read: PeerLost after", f"{took:.2f} s")
    assert took < PATIENCE * 4 + SLACK
    two.mover.do(spi.close_link, "doomed")
    lab(do="power_on")
    wait_for_other()
    two.start_owner()
    two.connect("returned")
    two.read_all("returned")
    two.disconnect("returned")
