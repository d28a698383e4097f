"""The transport between processes of one host with soft-RoCE, without core."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from roce import spi
from roce.nodes import start_here
from roce.spi import MIB

from tests.nodes import Node, RemoteError

SIZE = 4 * MIB
DEAD_SECONDS = 0.47
"""4.096 us x 2^14 x 7: after this an adapter gives a silent peer up."""
SLACK = 15.0
"""For an emulated machine whose host is busy."""


class Two:
    """Rank 0, which moves, and rank 1, whose memory is moved."""

    def __init__(self, **options: Any) -> None:
        self.mover, self.owner = start_here({}), start_here({})
        self.local = self.mover.do(spi.start, SIZE)
        self.remote = self.owner.do(spi.start, SIZE)
        self.owner.do(spi.fill, 1)

    def move(self, name: str, verb: str, *segments: tuple[int, int, int]) -> float:
        """Segments of (offset here, offset there, bytes)."""
        vectors = self.vectors(*segments)
        return float(self.mover.do(spi.move, name, 1, verb, *vectors))

    def fail(
        self, name: str, verb: str, *segments: tuple[int, int, int], timeout: float = 20
    ) -> Any:
        """As :meth:`move`, for a move that must fail: type, text, link_usable, seconds."""
        return self.mover.do(spi.try_move, name, 1, verb, *self.vectors(*segments), timeout)

    def vectors(self, *segments: tuple[int, int, int]) -> tuple[list[int], list[int], list[int]]:
        """Addresses and lengths."""
        local, remote, length = zip(*segments, strict=True)
        return [self.local + n for n in local], [self.remote + n for n in remote], list(length)

    def here(self) -> NDArray[np.uint8]:
        """The mover's memory."""
        return np.frombuffer(self.mover.do(spi.content), np.uint8)

    def there(self) -> NDArray[np.uint8]:
        """The owner's memory."""
        return np.frombuffer(self.owner.do(spi.content), np.uint8)


@pytest.fixture(scope="module")
def two() -> Iterator[Two]:
    """Two processes with the transport open."""
    pair = Two()
    with ExitStack() as stack:
        for node in (pair.mover, pair.owner):
            stack.callback(node.close)
            stack.callback(node.do, spi.stop)
        yield pair


@pytest.fixture
def link(two: Two, request: pytest.FixtureRequest) -> Iterator[str]:
    """A link of the two; peers may write where the test's name says so."""
    name = request.node.name
    two.mover.do(spi.clear)
    spi.connect(two.mover, two.owner, name, "read_write" if "write" in name else "read")
    yield name
    assert [node.do(spi.close_link, name) for node in (two.mover, two.owner)] == [[], []]


DATA = spi.expected(1, SIZE)


def test_one_unaligned_segment(two: Two, link: str) -> None:
    two.move(link, "read", (100, 7, 1001))
    got = two.here()
    assert (got[100:1101] == DATA[7:1008]).all()
    assert not got[:100].any()
    assert not got[1101:].any()


def test_scattered_blocks_leave_their_neighbours_alone(two: Two, link: str) -> None:
    order = np.random.default_rng(5).permutation(SIZE // 8192)
    blocks = [(int(n) * 8192 + 2048, int(m) * 8192 + 1024, 4096) for n, m in enumerate(order)]
    two.move(link, "read", *blocks)
    got, expected = two.here(), np.zeros(SIZE, np.uint8)
    for to, frm, size in blocks:
        expected[to : to + size] = DATA[frm : frm + size]
    assert (got == expected).all()


def test_segments_longer_than_a_request_are_split(two: Two, link: str) -> None:
    two.move(link, "read", (1, 3, 3 * MIB + 5), (3 * MIB + 100, 50, 10))
    got = two.here()
    assert (got[1 : 3 * MIB + 6] == DATA[3 : 3 * MIB + 8]).all()
    assert (got[3 * MIB + 100 : 3 * MIB + 110] == DATA[50:60]).all()
    assert not got[3 * MIB + 6 : 3 * MIB + 100].any()


def test_many_small_segments_pass_the_window_many_times(two: Two, link: str) -> None:
    count = 3000
    blocks = [(n * 128, (count - n) * 128, 64) for n in range(count)]
    two.move(link, "read", *blocks)
    got = two.here()[: count * 128].reshape(count, 128)
    there = DATA[128 : (count + 1) * 128].reshape(count, 128)[::-1]
    assert (got[:, :64] == there[:, :64]).all()
    assert not got[:, 64:].any()


def test_write_scattered_blocks(two: Two, link: str) -> None:
    two.mover.do(spi.fill, 2)
    data = spi.expected(2, SIZE)
    try:
        blocks = [(n * 16384, (200 - n) * 16384 + 8, 10_000) for n in range(200)]
        two.move(link, "write", *blocks)
        expected = DATA.copy()
        for frm, to, size in blocks:
            expected[to : to + size] = data[frm : frm + size]
        assert (two.there() == expected).all()
    finally:
        two.owner.do(spi.fill, 1)


def test_readers_cannot_be_written_to(two: Two, link: str) -> None:
    kind, text, _, _ = two.fail(link, "write", (0, 0, 100))
    assert (kind, "read access only" in text) == ("Unsupported", True)
    # A peer that does not care is stopped by the owner's adapter.
    two.mover.do(spi.pretend_writable, link, 1)
    kind, text, usable, _ = two.fail(link, "write", (0, 0, 100))
    assert (kind, usable) == ("TransferError", False), text
    assert (two.there() == DATA).all()


@pytest.mark.parametrize("offset", [-1, SIZE - 50, SIZE + 4096, 1 << 62])
def test_outside_the_offer_nothing_moves(two: Two, link: str, offset: int) -> None:
    kind, text, _, _ = two.fail(link, "read", (0, 0, 100), (200, offset, 100))
    assert kind == "AddressError"
    assert f"100 bytes at {two.remote + offset:#x}" in text
    assert not two.here().any()
    two.move(link, "read", (0, 0, 100))


def test_local_memory_must_be_registered(two: Two, link: str) -> None:
    kind, text, _, _ = two.fail(link, "read", (SIZE, 0, 100))
    assert (kind, "registered here" in text) == ("AddressError", True)
    two.move(link, "read", (0, 0, 100))


def test_memory_of_the_user_both_ways() -> None:
    two = Two()
    try:
        for node, attribute in ((two.mover, "local"), (two.owner, "remote")):
            setattr(two, attribute, node.do(spi.register, 50_001))
        two.owner.do(spi.fill, 3, "region_array")
        spi.connect(two.mover, two.owner, "both", "read_write")
        two.move("both", "read", (1, 0, 50_000))
        got = np.frombuffer(two.mover.do(spi.content, "region_array"), np.uint8)
        assert (got[1:] == spi.expected(3, 50_001)[:50_000]).all()
        two.move("both", "write", (1, 1, 50_000))
        got = np.frombuffer(two.owner.do(spi.content, "region_array"), np.uint8)
        assert (got[1:] == spi.expected(3, 50_001)[:50_000]).all()
    finally:
        for node in (two.mover, two.owner):
            node.do(spi.stop)
            node.close()


def test_the_owner_needs_no_processor(two: Two, link: str) -> None:
    two.owner.pause()
    try:
        two.move(link, "read", (0, 0, SIZE))
    finally:
        two.owner.resume()
    assert (two.here() == DATA).all()


def test_a_peer_that_checks_nothing_is_stopped_by_the_adapter(two: Two, link: str) -> None:
    two.mover.do(spi.shift_window, link, 1, 4096)
    kind, text, usable, took = two.fail(link, "read", (0, SIZE - 100, 200))
    assert (kind, usable) == ("TransferError", False)
    assert "remote access error" in text
    assert took < SLACK
    again = two.fail(link, "read", (0, 0, 10))
    assert (again[0], again[2]) == ("TransferError", False)


def test_timeout_leaves_the_link_usable_when_the_rest_ends_soon(two: Two, link: str) -> None:
    blocks = [(n * 1024, n * 1024, 1024) for n in range(SIZE // 1024)]
    kind, _, usable, took = two.fail(link, "read", *blocks, timeout=0.02)
    assert (kind, usable) == ("TransferTimeout", True)
    assert took < SLACK
    two.mover.do(spi.clear)
    two.move(link, "read", (0, 0, 100))
    got = two.here()
    assert (got[:100] == DATA[:100]).all()
    assert not got[100:].any()


def test_abort_ends_what_is_in_flight(two: Two, link: str) -> None:
    blocks = [(n * 64, n * 64, 64) for n in range(SIZE // 64)]
    args = (link, 1, "read", *two.vectors(*blocks), 60)
    kind, text, usable, took = two.mover.do(spi.abort_during, *args)
    assert (kind, usable) == ("TransferError", False), text
    assert "was aborted" in text
    assert took < SLACK
    got = two.here()
    assert (got[:64] == DATA[:64]).all()
    assert not got[-64:].any(), "the read was over before it was aborted"
    assert two.fail(link, "read", (0, 0, 10))[0] == "TransferError"


def test_after_close_nobody_is_served(two: Two) -> None:
    spi.connect(two.mover, two.owner, "closing", "read_write")
    two.move("closing", "write", (0, 0, 100))
    assert two.owner.do(spi.close_link, "closing") == []
    two.owner.do(spi.fill, 1)
    kind, text, usable, took = two.fail("closing", "write", (0, 0, 100))
    assert (kind, usable) == ("PeerLost", False), text
    assert took > DEAD_SECONDS / 2
    assert (two.there() == DATA).all()
    two.mover.do(spi.close_link, "closing")
    assert two.mover.do(spi.log_of, "defect") == []


def test_links_run_side_by_side(two: Two) -> None:
    names = [f"side{n}" for n in range(4)]
    for name in names:
        spi.connect(two.mover, two.owner, name)
    before = two.mover.do(spi.resources)
    two.mover.do(spi.move_parallel, names, 1, "read", *two.vectors((0, 0, MIB)))
    assert (two.here()[:MIB] == DATA[:MIB]).all()
    assert two.mover.do(spi.falls_to, before)
    for name in names:
        two.mover.do(spi.close_link, name)
        two.owner.do(spi.close_link, name)


def test_links_take_no_descriptor_and_leave_nothing(two: Two) -> None:
    before = two.mover.do(spi.resources)
    names = [f"many{n}" for n in range(30)]
    for name in names:
        spi.connect(two.mover, two.owner, name)
    assert two.mover.do(spi.falls_to, before)
    for name in names:
        two.mover.do(spi.close_link, name)
        two.owner.do(spi.close_link, name)
    assert two.mover.do(spi.falls_to, before)


def test_offers_are_checked(two: Two) -> None:
    two.mover.do(spi.open_link, "bad", 0, "read")
    for offer, text in (
        (b"{", "not valid"),
        (b'{"version":1}', "it is 1, this release needs 2"),
        (b"[" * 10_000, "not valid"),
    ):
        with pytest.raises(RemoteError, match=text) as caught:
            two.mover.do(spi.attach, "bad", 1, offer)
        assert caught.value.kind == "LinkError"
    two.mover.do(spi.close_link, "bad")


def test_a_dead_peer_is_noticed_without_burning_a_processor() -> None:
    two = Two()
    try:
        spi.connect(two.mover, two.owner, "dying")
        two.move("dying", "read", (0, 0, 100))
        two.owner.kill()
        blocks = two.vectors(*((n * 4096, n * 4096, 4096) for n in range(500)))
        seen = two.mover.do(spi.watch_self, "dying", 1, "read", *blocks, 20)
        assert seen["kind"] == "PeerLost", seen
        assert DEAD_SECONDS / 2 < seen["took"] < DEAD_SECONDS * 4 + SLACK, seen
        assert seen["cpu"] < seen["took"] / 2, seen
        assert seen["ticks"] > 10, seen
        two.mover.do(spi.close_link, "dying")
        # The survivor links with a successor.
        two.owner.close()
        two.owner = start_here({})
        two.remote = two.owner.do(spi.start, SIZE)
        two.owner.do(spi.fill, 4)
        spi.connect(two.mover, two.owner, "again")
        two.move("again", "read", (0, 0, SIZE))
        assert (two.here() == spi.expected(4, SIZE)).all()
    finally:
        two.mover.do(spi.stop)
        for node in (two.mover, two.owner):
            node.close()


def test_registration_errors_name_the_cause(two: Two) -> None:
    text = two.mover.do(spi.try_register, 0x1000, 12345)
    assert "12345 bytes at 0x1000" in text
    assert "errno 14" in text
    assert "mapped" in text


def test_the_limit_of_locked_memory_is_named() -> None:
    node = start_here({})
    try:
        text = node.do(spi.start_limited, 65536, MIB)
        assert "errno 12" in text
        assert "ulimit -l), which is 64 KiB for user 65534" in text
    finally:
        node.close()


@pytest.mark.parametrize(
    ("extra", "address"),
    [({"gid_index": "2"}, "fd00:99::1"), ({"device": "rxe0", "port": "1"}, "10.99.0.1")],
)
def test_the_address_can_be_chosen(extra: dict[str, str], address: str) -> None:
    nodes: list[Node] = [start_here({}), start_here({})]
    try:
        first, second = (node.do(spi.start, MIB, {"extra": extra}) for node in nodes)
        nodes[1].do(spi.fill, 6)
        spi.connect(nodes[0], nodes[1])
        nodes[0].do(spi.move, "l", 1, "read", [first], [second], [5000])
        assert nodes[0].do(spi.content)[:5000] == spi.expected(6, MIB)[:5000].tobytes()
        (line,) = nodes[0].do(spi.log_of, "link l to rank 1")
        assert f"rxe0 port 1 GID {1 if '.' in address else 2} ({address}) to {address}" in line
        assert "MTU 4096" in line
        for node in nodes:
            node.do(spi.stop)
    finally:
        for node in nodes:
            node.close()


def _table(device_ip: str) -> str:
    devices = [{"device_id": str(r), "rank_id": str(r), "device_ip": device_ip} for r in (0, 1)]
    server = {"server_id": "host", "device": devices}
    return json.dumps(
        {"version": "1.0", "status": "completed", "server_count": "1", "server_list": [server]}
    )


def test_addresses_may_come_and_go(two: Two) -> None:
    table = _table("10.99.5.1")
    ends = list(enumerate((two.mover, two.owner)))
    subprocess.run(["ip", "addr", "add", "10.99.5.1/24", "dev", "dummy0"], check=True)
    try:
        offers = [
            node.do(spi.open_link, "new", rank, "read", None, table, timeout=60)
            for rank, node in ends
        ]
        two.mover.do(spi.attach, "new", 1, offers[1])
        two.owner.do(spi.attach, "new", 0, offers[0])
        two.move("new", "read", (0, 0, 1000))
        (line,) = two.mover.do(spi.log_of, "link new to rank 1")
        assert "GID 3 (10.99.5.1) to 10.99.5.1" in line
        for _, node in ends:
            node.do(spi.close_link, "new")
    finally:
        subprocess.run(["ip", "addr", "del", "10.99.5.1/24", "dev", "dummy0"], check=True)
    with pytest.raises(RemoteError, match="device_ip of rank 0: 10") as caught:
        two.mover.do(spi.open_link, "old", 0, "read", None, table)
    assert caught.value.kind == "LinkError"


@pytest.mark.parametrize(
    ("extra", "kind", "text"),
    [
        ({"gid_index": "40"}, "TransportError", "gid_index 40"),
        ({"device": "mlx5_7"}, "TransportError", "10.99.0.1 (rxe0 port 1 GID 1)"),
        ({"colour": "red"}, "OptionError", "unknown option datadist.rdma.colour"),
        ({"retry_count": "8"}, "OptionError", "'8'"),
    ],
)
def test_what_does_not_exist_is_said(two: Two, extra: dict[str, str], kind: str, text: str) -> None:
    node = start_here({})
    try:
        with pytest.raises(RemoteError) as caught:
            node.do(spi.start, MIB, {"extra": extra})
        assert caught.value.kind == kind
        assert text in caught.value.text
    finally:
        node.close()
