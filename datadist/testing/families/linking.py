"""Links: made by 2 to 4 ranks, side by side, and refused."""

from __future__ import annotations

import itertools
import time

import pytest

from datadist.testing import memory_operations, operations
from datadist.testing.families.kit import KINDS, Kit, memory_of, pair
from datadist.testing.rules import rule
from datadist.testing.testbed import Linked, Memory, Testbed
from datadist.transport import Access, AddressError, LinkError, Offer, TransferError, TransportError

MANY = 24


class Linking(Kit):
    """`open`, `offer`, `attach`, `join`, `close`."""

    @rule("Link.attach", "Link.read")
    @pytest.mark.parametrize("size", [2, 3, 4])
    def test_all_pairs_at_once(self, testbed: Testbed, size: int) -> None:
        """Every rank reads from every other one, all at the same time."""
        members = testbed.processes(size)
        source = {rank: testbed.allocate(members[rank]) for rank in members}
        target = {rank: testbed.allocate(members[rank]) for rank in members}
        linked = testbed.link(members, {rank: [m] for rank, m in source.items()})
        reads = _read_all_pairs(linked, target, source)
        for rank, segments in reads.items():
            target[rank].check(
                [target[rank].expected_write(source[other], [s]) for other, s in segments.items()]
            )
            source[rank].check()
        linked.close_all()

    @rule("Link.close")
    def test_two_links_at_once(self, testbed: Testbed) -> None:
        """Two links of the same ranks; closing one does not affect the other."""
        members = testbed.processes(2)
        mine, theirs = testbed.allocate(members[0]), testbed.allocate(members[1])
        exposed = {0: [mine], 1: [theirs]}
        first, second = testbed.link(members, exposed), testbed.link(members, exposed)
        segments = [(0, 500, 100)]
        outcome = first.move(0, 1, mine, theirs, segments)
        outcome.must_succeed("over the first of two links")
        first.close_all()
        outcome = second.move(0, 1, mine, theirs, segments)
        outcome.must_succeed("after another link was closed")
        second.close_all()

    @rule("Transport.open")
    def test_links_are_opened_at_once(self, testbed: Testbed) -> None:
        """The first ones over new memory, by several threads."""
        members = testbed.processes(2)
        for _ in range(5):
            memory = {rank: [testbed.allocate(members[rank])] for rank in members}
            for linked in testbed.open_at_once(4, members, memory):
                linked.close_all()

    @rule("Transport.connect", "Link.close")
    def test_many_links_share_a_peer(self, testbed: Testbed) -> None:
        """Closed in another order than made; those that are left go on."""
        members = testbed.processes(2)
        mine, theirs = testbed.allocate(members[0]), testbed.allocate(members[1])
        count = 4 if testbed.capabilities.self_bootstrapping else MANY
        links = [testbed.link(members, {0: [mine], 1: [theirs]}) for _ in range(count)]
        order = [*links[1::2], *links[0::2]]
        while order:
            order.pop().close_all()
            for linked in order:
                outcome = linked.move(0, 1, mine, theirs, [(0, 0, 64)])
                outcome.must_succeed(f"{len(order)} links are left")

    @rule("Link.offer", "Offer")
    def test_an_offer_can_be_carried(self, testbed: Testbed) -> None:
        """Core sends it in one message."""
        members = testbed.processes(2)
        memory = [testbed.allocate(members[0]) for _ in range(4)]
        access = Access.READ_WRITE if testbed.ask_link().one_sided_write else Access.READ
        linked = testbed.open(members, {0: memory}, access)
        with testbed.offered(linked, 0, 1) as (data, fds):
            assert len(data) <= Offer.MAX_DATA, f"{len(data)} bytes are too many"
            assert len(fds) <= Offer.MAX_FDS, f"{len(fds)} descriptors are too many"
        linked.close_all()

    @rule("Link.attach", "Link.attach_at_once")
    def test_attaching_does_not_wait_for_the_peer(self, testbed: Testbed) -> None:
        """A peer that was stopped after its offer does not block others."""
        if testbed.capabilities.self_bootstrapping:
            pytest.skip("capabilities.self_bootstrapping is True: join waits, and has a timeout")
        members = testbed.processes(2)
        memory = testbed.allocate(members[1])
        linked = testbed.open(members, {1: [memory]})
        with testbed.offered(linked, 1, 0) as (data, fds):
            members[1].pause()
            try:
                outcome = members[0].do(
                    operations.attach, linked.name, 1, data, fds=fds, timeout=10
                )
            finally:
                members[1].resume()
        outcome.must_succeed("attaching the offer of a peer that was stopped")
        linked.close_all()

    @rule("Link.join", "Link.read", "Link.close")
    def test_an_absent_rank_is_no_reason_to_hang(self, testbed: Testbed) -> None:
        """If the peer never came, transfers fail and the link can be closed."""
        members = testbed.processes(2)
        mine = testbed.allocate(members[0])
        linked = testbed.open(members, {0: [mine]})
        with testbed.offered(linked, 0, 1):
            pass
        if testbed.capabilities.self_bootstrapping:
            outcome = members[0].do(operations.join, linked.name, 3.0 * testbed.scale, timeout=30)
            outcome.must_be(LinkError, "join without the peer")
        outcome = linked.move(0, 1, mine, mine, [(0, 0, 8)], timeout=2)
        outcome.must_be(TransportError, "reading from a peer that never came")
        linked.close_all()

    @rule("Link.join")
    def test_join_notices_close(self, testbed: Testbed) -> None:
        """Unlinking while the library waits for a peer ends within seconds."""
        if not testbed.capabilities.self_bootstrapping:
            pytest.skip("capabilities.self_bootstrapping is False")
        members = testbed.processes(2)
        linked = testbed.open(members, {})
        members[0].do(operations.start, "join", operations.join, linked.name, 60.0 * testbed.scale)
        time.sleep(0.5)
        linked.close(0)
        outcome = members[0].do(operations.finish, "join", 10.0 * testbed.scale, timeout=20)
        outcome.must_be(LinkError, "join of a link that was closed")
        linked.close_all()

    @rule("Link.exchange")
    def test_exchange_is_in_rank_order(self, testbed: Testbed) -> None:
        """Blobs of all ranks, our own included."""
        if not testbed.capabilities.self_bootstrapping:
            pytest.skip("capabilities.self_bootstrapping is False")
        members = testbed.processes(3)
        linked = testbed.link(members, {})
        blobs = [b"rank %d" % rank for rank in members]
        for rank, process in members.items():
            process.begin(operations.exchange, linked.name, blobs[rank])
        for rank, process in members.items():
            came = process.result()
            assert came == blobs, f"exchange returned {came} at rank {rank}, expected {blobs}"
        linked.close_all()

    @rule("Link.attach", "Link.attach_at_once")
    @pytest.mark.parametrize("damage", ["empty", "cut", "random", "no descriptors"])
    def test_offers_that_are_none_are_refused(self, testbed: Testbed, damage: str) -> None:
        """With `LinkError`; the link can still be closed."""
        members = testbed.processes(2)
        memory = testbed.allocate(members[1])
        linked = testbed.open(members, {1: [memory]})
        with testbed.offered(linked, 1, 0) as (data, fds):
            if not data:
                pytest.skip("offers of this transport carry nothing that could be wrong")
            if damage == "no descriptors" and not fds:
                pytest.skip("offers of this transport carry no descriptors")
            bad = {"empty": b"", "cut": data[: len(data) // 2], "random": b"\xff\x00" * 40}
            sent = [] if damage == "no descriptors" else fds
            outcome = members[0].do(
                operations.attach, linked.name, 1, bad.get(damage, data), fds=sent
            )
        outcome.must_be(LinkError, f"an offer with damage {damage!r}")
        linked.close_all()

    @rule("Transport.open", "AddressError")
    def test_memory_beside_the_link_is_not_reached(self, testbed: Testbed) -> None:
        """Only the regions with which a link was opened are the peers'."""
        members = testbed.processes(2)
        mine, shown, hidden = (testbed.allocate(members[rank]) for rank in (0, 1, 1))
        linked = testbed.link(members, {0: [mine], 1: [shown]})
        late = testbed.allocate(members[1])
        for memory in (hidden, late):
            outcome = linked.move(0, 1, mine, memory, [(0, 0, 100)])
            outcome.must_be(AddressError, "memory that was not exposed")
        outcome = linked.move(0, 1, mine, shown, [(0, 0, 100)])
        outcome.must_succeed("exposed memory after wrong addresses")
        mine.check([mine.expected_write(shown, [(0, 0, 100)])])
        linked.close_all()

    @rule("Link.region_added", "Link.region_removed", "Link.read")
    @pytest.mark.parametrize("kind", KINDS)
    def test_memory_added_to_an_open_link_is_local(self, testbed: Testbed, kind: str) -> None:
        """The link hears of it by `region_added` and `region_removed`; peers do not reach it."""
        linked, mine, theirs = pair(testbed)
        for _ in range(2):
            added = memory_of(testbed, linked.members[0], kind)
            outcome = linked.move(0, 1, added, theirs, [(1, 2, 1000), (5000, 1, 9000)])
            outcome.must_succeed("into memory that was added after open")
            added.check([added.expected_write(theirs, [(1, 2, 1000), (5000, 1, 9000)])])
            outcome = linked.move(1, 0, theirs, added, [(0, 0, 1000)])
            outcome.must_be(AddressError, "the peer reads memory added after open")
            added.process.do(memory_operations.release, added.label)
        outcome = linked.move(0, 1, mine, theirs, [(0, 0, 1000)])
        outcome.must_succeed("after other memory was removed")
        mine.check([mine.expected_write(theirs, [(0, 0, 1000)])])
        linked.close_all()

    @rule("Capabilities.follows_addresses")
    def test_memory_that_is_replaced_is_followed(self, testbed: Testbed) -> None:
        """Peers reach what the owner has mapped at an exposed address by now."""
        if not testbed.ask_link().follows_addresses:
            pytest.skip("capabilities.follows_addresses is False")
        members = testbed.processes(2)
        mine = testbed.allocate(members[0])
        theirs = memory_of(testbed, members[1], "foreign host")
        linked = testbed.link(members, {0: [mine], 1: [theirs]})
        for number in range(3):
            if number:
                theirs.seed += 1
                members[1].do(memory_operations.replace, theirs.label, theirs.seed)
            outcome = linked.move(0, 1, mine, theirs, [(0, 5000, 300_000)])
            outcome.must_succeed(f"from memory that was replaced {number} times since the link")
            mine.check([mine.expected_write(theirs, [(0, 5000, 300_000)])])
        linked.close_all()

    @rule("Link.close", "Transport.release")
    def test_memory_of_a_closed_link_can_be_used_again(self, testbed: Testbed) -> None:
        """The same regions in one link after another, also with other access."""
        members = testbed.processes(2)
        for _ in range(3):
            mine, theirs = testbed.allocate(members[0]), testbed.allocate(members[1])
            for _ in range(2):
                linked = testbed.link(members, {0: [mine], 1: [theirs]})
                outcome = linked.move(0, 1, mine, theirs, [(0, 0, 1000)])
                outcome.must_succeed("over memory that another link had used")
                linked.close_all()
            for memory in (mine, theirs):
                memory.process.do(memory_operations.release, memory.label)

    @rule("Link.close")
    def test_a_closed_link_moves_nothing(self, testbed: Testbed) -> None:
        """And says so by an error of the interface."""
        members = testbed.processes(2)
        mine, theirs = testbed.allocate(members[0]), testbed.allocate(members[1])
        linked = testbed.link(members, {0: [mine], 1: [theirs]})
        order = linked.order(0, 1, mine, theirs, [(0, 0, 100)])
        outcome = members[0].do(operations.move_after_close, order)
        linked.forget(0)
        outcome.must_be(TransferError, "read on a closed link")
        mine.check()
        linked.close_all()

    @rule("Capabilities.same_host_only")
    def test_ranks_meet_over_the_network(self, testbed: Testbed) -> None:
        """Only the address of a peer is known: no process, no descriptors."""
        if testbed.capabilities.same_host_only:
            pytest.skip("capabilities.same_host_only is True")
        members = testbed.processes(2)
        mine, theirs = testbed.allocate(members[0]), testbed.allocate(members[1])
        linked = testbed.link(members, {0: [mine], 1: [theirs]}, over_network=True)
        outcome = linked.move(0, 1, mine, theirs, [(1, 2, 1000)])
        outcome.must_succeed("a peer that was met over the network")
        mine.check([mine.expected_write(theirs, [(1, 2, 1000)])])
        linked.close_all()


def _read_all_pairs(
    linked: Linked, target: dict[int, Memory], source: dict[int, Memory]
) -> dict[int, dict[int, tuple[int, int, int]]]:
    """Segments by reader and owner; each owner's go to a place of their own."""
    size = 100_000
    places = {
        rank: {other: (other * (size + 999) + 1, size + 7 * rank, size) for other in source}
        for rank in source
    }
    for rank in source:
        del places[rank][rank]
        orders = [
            linked.order(rank, other, target[rank], source[other], [segment])
            for other, segment in places[rank].items()
        ]
        linked.members[rank].begin(operations.move_all, orders)
    results = {rank: process.result() for rank, process in linked.members.items()}
    for rank, outcome in itertools.chain(*([(r, o) for o in os] for r, os in results.items())):
        outcome.must_succeed(f"at rank {rank}")
    return places
