"""Reads that return whether a message of the owner has arrived."""

from __future__ import annotations

import pytest

from datadist.testing import memory_operations, operations
from datadist.testing.families.kit import KINDS, Kit, memory_of, pair
from datadist.testing.rules import rule
from datadist.testing.testbed import MIB, Testbed


class Control(Kit):
    """What ``watches_control`` promises."""

    @rule("Capabilities.watches_control", "Link.read")
    @pytest.mark.parametrize("size", [1, MIB])
    def test_reads_say_what_has_arrived(self, testbed: Testbed, size: int) -> None:
        """Only if something has arrived on the connection to the owner."""
        need_watching(testbed)
        linked, mine, theirs = pair(testbed)

        def read_result() -> object:
            outcome = linked.move(0, 1, mine, theirs, [(0, 0, size)])
            outcome.must_succeed(f"a read of {size} bytes")
            return outcome.value

        assert read_result() is False, "read must return False while nothing has arrived"
        for what, expected in (("arrives", True), ("is taken", False), ("ends", True)):
            linked.members[0].do(operations.control, linked.name, 1, what)
            said = read_result()
            assert said is expected, f"read returned {said} after: a message {what}"
        linked.close_all()

    @rule("Capabilities.watches_control")
    @pytest.mark.parametrize("owner", KINDS)
    def test_a_read_of_withdrawn_memory_harms_nothing(self, testbed: Testbed, owner: str) -> None:
        """It may fail or return any bytes; other links and the process must not be affected."""
        need_watching(testbed)
        members = testbed.processes(2)
        mine, lasting = testbed.allocate(members[0]), testbed.allocate(members[1])
        theirs = memory_of(testbed, members[1], owner)
        linked = testbed.link(members, {1: [theirs]})
        other = testbed.link(members, {1: [lasting]})
        linked.close(1)
        members[1].do(memory_operations.release, theirs.label)
        for _ in range(3):
            linked.move(0, 1, mine, theirs, [(0, 0, 4096)])
        outcome = other.move(0, 1, mine, lasting, [(0, 0, 4096)])
        outcome.must_succeed("over another link")
        linked.close_all()
        other.close_all()


def need_watching(testbed: Testbed) -> None:
    """Skip if reads do not report arrivals."""
    if not testbed.ask_link().watches_control:
        pytest.skip("capabilities.watches_control is False")
