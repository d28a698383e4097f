"""Calls for few blocks over a route that core has looked up."""

from __future__ import annotations

import pytest

from datadist.testing import known_way_operations as ways
from datadist.testing import operations
from datadist.testing.families.kit import Kit, pair
from datadist.testing.rules import rule
from datadist.testing.testbed import Linked, Memory, Testbed

WRITES = pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
BLOCK = 4096


class KnownWays(Kit):
    """``Link.known_way``, where a link has it."""

    @rule("Link.known_way")
    @WRITES
    def test_known_ways_move_blocks(self, testbed: Testbed, write: bool) -> None:
        """What is named, and nothing else; more often than there are permits."""
        linked, mine, theirs, route = _prepared(testbed, write)
        took = linked.members[0].do(ways.call_known_way, route, [3, 0], [1, 6], ways.MANY)
        assert all(type(each) is float and each >= 0 for each in took), (
            f"the call returned {next(t for t in took if type(t) is not float or t < 0)!r}, expected "
            "the seconds that it took"
        )
        segments = [(BLOCK, 3 * BLOCK, BLOCK), (6 * BLOCK, 0, BLOCK)]
        target, source = (theirs, mine) if write else (mine, theirs)
        target.check([target.expected_write(source, segments, into_remote=write)])
        source.check()
        linked.close_all()

    @rule("Link.known_way")
    @WRITES
    def test_known_ways_refuse_lists(self, testbed: Testbed, write: bool) -> None:
        """All that are not in order; nothing is moved."""
        linked, mine, theirs, route = _prepared(testbed, write)
        taken = linked.members[0].do(ways.refused_lists, route)
        assert not taken, f"these lists were taken: {taken}"
        mine.check()
        theirs.check()
        linked.close_all()

    @rule("Link.known_way", "KnownWay.attributes", "KnownWay.keys")
    @pytest.mark.parametrize("change", ways.CHANGES)
    @WRITES
    def test_known_ways_look_at_conditions(
        self, testbed: Testbed, write: bool, change: str
    ) -> None:
        """Nothing is moved where one does not hold any more."""
        linked, mine, theirs, route = _prepared(testbed, write)
        answer = linked.members[0].do(ways.call_known_way, route, [3], [1], 1, change)
        assert answer == [None], f"the call returned {answer[0]} after a change: {change}"
        mine.check()
        theirs.check()
        linked.close_all()

    @rule("Link.known_way", "Peer.control_fd")
    @WRITES
    def test_known_ways_hear_the_peer(self, testbed: Testbed, write: bool) -> None:
        """The call is not done where the connection to the peer is readable."""
        linked, _, theirs, route = _prepared(testbed, write)
        linked.members[0].do(operations.control, linked.name, 1, "arrives")
        answer = linked.members[0].do(ways.call_known_way, route, [3], [1])
        assert answer == [None], f"the call returned {answer[0]} though a message has arrived"
        theirs.check()
        linked.members[0].do(operations.control, linked.name, 1, "is taken")
        answer = linked.members[0].do(ways.call_known_way, route, [3], [1])
        assert answer != [None], "the call returned None though no message waits"
        linked.close_all()

    @rule("Link.known_way", "Link.abort")
    @WRITES
    def test_known_ways_end_with_the_link(self, testbed: Testbed, write: bool) -> None:
        """After `abort` the call returns None and moves nothing."""
        linked, mine, theirs, route = _prepared(testbed, write)
        linked.abort(0, 1)
        if linked.members[0].do(ways.has_known_way, route):
            answer = linked.members[0].do(ways.call_known_way, route, [3], [1])
            assert answer == [None], f"the call returned {answer[0]} after abort"
        mine.check()
        theirs.check()
        linked.close_all()


def _prepared(testbed: Testbed, write: bool) -> tuple[Linked, Memory, Memory, ways.Blocks]:
    linked, mine, theirs = pair(testbed, write=write)
    route = ways.Blocks(
        linked.name, 1, write, BLOCK, mine.address, theirs.address, 20.0 * testbed.scale
    )
    if not linked.members[0].do(ways.has_known_way, route):
        linked.close_all()
        pytest.skip(
            "links of this transport have no call for few blocks (Link.known_way returns None)"
        )
    return linked, mine, theirs, route
