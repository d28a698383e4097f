"""Several transfers at a time, and the order within one."""

from __future__ import annotations

import pytest

from datadist.testing import transfer_operations
from datadist.testing.families.kit import Kit, pair
from datadist.testing.rules import rule
from datadist.testing.testbed import MIB, Linked, Memory, Testbed
from datadist.testing.transfer_operations import Lane
from datadist.transport import Access

SPACE = 8 * MIB
LARGE = 2 * MIB
MOST = 16
"""Transfers at a time, also where more are declared."""
LINKS = 4
SECONDS = 1.0
PARTS, PART = 8, 65_536
"""Segments and bytes of a read whose order is tested; one of 8 bytes follows them."""


class Parallel(Kit):
    """`Capabilities.parallel` and `Capabilities.ordered_reads`."""

    @rule("Capabilities.parallel", "Link.read", "Link.write")
    def test_transfers_at_a_time_over_one_link_are_kept_apart(self, testbed: Testbed) -> None:
        """As many as declared: reads and writes, one of them much larger than the others."""
        count = min(testbed.ask_link().parallel, MOST)
        if count == 1:
            pytest.skip("capabilities.parallel is 1")
        linked, mine, theirs = pair(testbed, _access(testbed), SPACE)
        _run_lanes(testbed, [linked] * count, mine, theirs)
        linked.close_all()

    @rule("Link.read", "Link.write")
    def test_transfers_at_a_time_over_many_links_are_kept_apart(self, testbed: Testbed) -> None:
        """With one peer, one transfer per link: whatever ``parallel`` is."""
        linked, mine, theirs = pair(testbed, _access(testbed), SPACE)
        exposed = {0: [mine], 1: [theirs]}
        more = [testbed.link(linked.members, exposed, _access(testbed)) for _ in range(LINKS - 1)]
        _run_lanes(testbed, [linked, *more], mine, theirs)
        for one in (linked, *more):
            one.close_all()

    @rule("Capabilities.ordered_reads")
    def test_the_last_segment_is_read_last(self, testbed: Testbed) -> None:
        """The owner writes numbers that grow, into the last segment first: it is never the oldest."""
        if not testbed.ask_link().ordered_reads:
            pytest.skip("capabilities.ordered_reads is False")
        if testbed.placement() not in testbed.capabilities.host_addressable:
            pytest.skip(f"capabilities.host_addressable is without {testbed.placement()}")
        size = PARTS * PART
        linked, mine, theirs = pair(testbed, size=size + 8)
        for memory in (mine, theirs):
            memory.process.do(transfer_operations.clear, memory.label)
        segments = [(i * PART, i * PART, PART) for i in range(PARTS)] + [(size, size, 8)]
        theirs.process.do(
            transfer_operations.start_counting, theirs.label, size, 60.0 * testbed.scale
        )
        order = linked.order(0, 1, mine, theirs, segments)
        count, wrong = mine.process.do(
            transfer_operations.read_in_order, order, mine.label, size, 2 * SECONDS
        )
        written = theirs.process.do(transfer_operations.stop_counting)
        assert wrong is None, f"with ordered_reads the last segment is read last: {wrong}"
        assert written > 1, f"the owner wrote {written} numbers during {count} reads"
        linked.close_all()


def _access(testbed: Testbed) -> Access:
    return Access.READ_WRITE if testbed.ask_link().one_sided_write else Access.READ


def _run_lanes(testbed: Testbed, links: list[Linked], mine: Memory, theirs: Memory) -> None:
    """A lane per link; of more than one, every second one writes."""
    source = testbed.allocate(mine.process, SPACE)
    lanes, at = [], 0
    for number, linked in enumerate(links):
        size = LARGE if number == 0 else 1 + 4099 * number
        write = number % 2 == 1 and testbed.ask_link().one_sided_write
        lanes.append(_lane(linked, mine, theirs, source, at, size, write))
        at += size + 4096
    wrong = mine.process.do(transfer_operations.run_lanes, lanes, SECONDS, timeout=300)
    texts = [
        f"transfer {number} of {len(lanes)} ({'write' if lane.order.write else 'read'}): {text}"
        for number, (lane, text) in enumerate(zip(lanes, wrong, strict=True)) if text
    ]  # fmt: skip
    assert not texts, "each transfer must move its own bytes only:\n" + "\n".join(texts)


def _lane(
    linked: Linked, mine: Memory, theirs: Memory, source: Memory, at: int, size: int, write: bool
) -> Lane:
    """Reads go from the second half of their memory to ours; writes to the first half of theirs."""
    origin = source if write else theirs
    offset = SPACE // 2
    order = linked.order(0, 1, mine, theirs, [(at, at, size)], write=write)
    return Lane(
        order=order, source=origin.address + offset, seed=origin.seed, offset=offset,
        target=mine.label, target_offset=at, room=SPACE // 2 - size - 8, size=origin.size,
    )  # fmt: skip
