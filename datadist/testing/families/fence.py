"""Who may write, and until when."""

from __future__ import annotations

import time

import pytest

from datadist.testing import operations
from datadist.testing.families.kit import Kit, need_write, pair
from datadist.testing.rules import rule
from datadist.testing.testbed import MIB, Memory, Testbed
from datadist.transport import Access, TransportError, Unsupported

BIG = 8 * MIB
ATTEMPTS = 5


class Fence(Kit):
    """After `close` nothing is written, or `close` has returned the ranks that may still write."""

    @rule("Link.write", "Access")
    def test_peers_with_read_access_cannot_write(self, testbed: Testbed) -> None:
        """The write raises an error and changes nothing."""
        linked, mine, theirs = pair(testbed, Access.READ)
        outcome = linked.move(0, 1, mine, theirs, [(0, 0, 1000)], write=True)
        outcome.must_be(Unsupported, "write where READ was granted")
        theirs.check()
        outcome = linked.move(0, 1, mine, theirs, [(0, 0, 1000)])
        outcome.must_succeed("read where READ was granted")
        linked.close_all()

    @rule("Capabilities.one_sided_write", "Link.write")
    def test_writing_is_refused_where_not_declared(self, testbed: Testbed) -> None:
        """Whatever access was granted."""
        if testbed.ask_link().one_sided_write:
            pytest.skip("capabilities.one_sided_write is True")
        linked, mine, theirs = pair(testbed, Access.READ_WRITE)
        outcome = linked.move(0, 1, mine, theirs, [(0, 0, 1000)], write=True)
        outcome.must_be(Unsupported, "write, which is not declared")
        theirs.check()
        linked.close_all()

    @rule("Link.close")
    def test_nothing_is_written_after_the_owner_closed(self, testbed: Testbed) -> None:
        """A peer that was idle, and writes later."""
        linked, mine, theirs = pair(testbed, write=True)
        outcome = linked.move(0, 1, mine, theirs, [(0, 0, 1000)], write=True)
        outcome.must_succeed("write where READ_WRITE was granted")
        possible_writers = linked.close(1)
        theirs.refill(3001)
        outcome = linked.move(0, 1, mine, theirs, [(0, 0, MIB)], write=True, timeout=5)
        time.sleep(0.1)
        if 0 not in possible_writers:
            theirs.check()
            outcome.must_be(TransportError, "a write to an owner that has closed")
        linked.close_all()

    @rule("Link.close")
    def test_nothing_is_written_after_the_writer_closed(self, testbed: Testbed) -> None:
        """Its own side is enough to end what it began."""
        linked, mine, theirs = pair(testbed, size=BIG, write=True)
        order = linked.order(0, 1, mine, theirs, [(0, 0, BIG)] * 4, write=True)
        process = linked.members[0]
        process.do(
            operations.start, "write", operations.move_until_failure, order, 10.0 * testbed.scale
        )
        time.sleep(0.05)
        linked.close(0)
        outcome = process.do(operations.finish, "write", 5.0 * testbed.scale)
        outcome.must_be(TransportError, "the link was closed")
        linked.settle(0, 1)  # bytes under way to an owner that writes by itself
        theirs.check_torn([theirs.expected_write(mine, [(0, 0, BIG)], into_remote=True)])
        mine.check()
        theirs.refill(3002)
        time.sleep(0.1)
        theirs.check()
        linked.close_all()

    @rule("Link.close", "Capabilities.revokes_access")
    def test_close_names_no_rank_that_is_idle(self, testbed: Testbed) -> None:
        """Unless access cannot be revoked: the named ranks keep core from using the memory."""
        need_write(testbed)
        if not testbed.ask_link().revokes_access:
            pytest.skip("capabilities.revokes_access is False")
        members = testbed.processes(3)
        memory = {rank: testbed.allocate(members[rank]) for rank in members}
        linked = testbed.link(members, {r: [m] for r, m in memory.items()}, Access.READ_WRITE)
        outcome = linked.move(0, 1, memory[0], memory[1], [(0, 0, MIB)], write=True)
        outcome.must_succeed("write where READ_WRITE was granted")
        possible_writers = linked.close(1)
        assert not possible_writers, (
            f"close named {set(possible_writers)}, expected nobody: rank 0 had ended its write, "
            "rank 2 never wrote; a transport that cannot do better declares revokes_access=False"
        )
        linked.close_all()

    @rule("Link.close")
    def test_close_names_no_rank_that_got_no_offer(self, testbed: Testbed) -> None:
        """Only who has our offer can write."""
        if testbed.capabilities.self_bootstrapping:
            pytest.skip("capabilities.self_bootstrapping is True: ranks meet without offers")
        members = testbed.processes(3)
        memory = testbed.allocate(members[0])
        linked = testbed.open(members, {0: [memory]}, Access.READ_WRITE)
        with testbed.offered(linked, 0, 1):
            pass
        possible_writers = linked.close(0)
        assert possible_writers <= {1}, (
            f"close named {set(possible_writers)}, but only rank 1 was made an offer"
        )
        linked.close_all()

    @rule("Link.close")
    def test_a_writer_that_was_stopped_is_fenced_or_named(self, testbed: Testbed) -> None:
        """It is stopped in the middle of a write, and goes on when the memory is used again."""
        need_write(testbed)
        members = testbed.processes(2)
        mine, theirs = testbed.allocate(members[0], BIG), testbed.allocate(members[1], BIG)
        for attempt in range(ATTEMPTS):
            self._stop_and_close(testbed, mine, theirs, 0.02 + 0.013 * attempt)

    def _stop_and_close(self, testbed: Testbed, mine: Memory, theirs: Memory, delay: float) -> None:
        members = {0: mine.process, 1: theirs.process}
        linked = testbed.link(members, {0: [mine], 1: [theirs]}, Access.READ_WRITE)
        order = linked.order(0, 1, mine, theirs, [(0, 0, BIG)] * 4, write=True, timeout=5)
        members[0].do(
            operations.start, "write", operations.move_until_failure, order, 5.0 * testbed.scale
        )
        time.sleep(delay)
        members[0].pause()
        try:
            time.sleep(0.02)
            possible_writers = linked.close(1)
            theirs.refill(4000 + int(delay * 1000))
        finally:
            members[0].resume()
        if 0 in possible_writers:  # then only its own side ends it
            linked.close(0)
        outcome = members[0].do(operations.finish, "write", 15.0 * testbed.scale, timeout=30)
        if 0 not in possible_writers:
            theirs.check()
            outcome.must_be(TransportError, "a write to an owner that has closed")
        linked.close_all()
