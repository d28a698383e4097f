"""What the processes of the conformance kit do."""

from __future__ import annotations

from typing import Any

from datadist.testing import ReferenceTransport, operations
from datadist.testing.child import State
from datadist.transport import TransportOptions


def test_a_link_stays_in_reach_of_other_threads_until_it_is_closed() -> None:
    state: Any = State(transport=ReferenceTransport(TransportOptions()))

    class Closing:
        def close(self) -> frozenset[int]:
            assert state.links.get("pair") in (self, None)
            seen.append("pair" in state.links)
            return frozenset()

    seen: list[bool] = []
    state.links["pair"] = Closing()
    operations.close_link(state, "pair")
    assert seen == [True, False]
    assert not state.links
