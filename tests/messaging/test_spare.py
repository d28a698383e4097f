"""Messages that are filled again: only when the engine is done with them, and of the same size."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from datadist.messaging.pieces import LARGE
from datadist.messaging.spare import SpareMessages
from datadist.transport import TransferTimeout
from tests.messaging_links import FAR, linked, nodes, whole

sizes = st.sampled_from([1, LARGE - 1, LARGE, LARGE + 1, 2 * LARGE])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.booleans(), sizes), max_size=30), st.integers(1, 4))
def test_no_message_is_given_twice(steps: list[tuple[bool, int]], most: int) -> None:
    spare, out = SpareMessages(most), list[bytearray]()
    for take, size in steps:
        if take or not out:
            message = spare.take(size)
            assert len(message) == size
            assert not any(message is each for each in out)
            out.append(message)
        else:
            spare.give(out.pop())
        assert len(spare._spare) <= most


def test_messages_that_were_not_sent_are_not_filled_again() -> None:
    with nodes() as (mine, owner), linked([mine, owner]) as (link, _):
        link.read(1, *whole(mine, owner), FAR)
        found = owner.transport._dispatcher.spare
        assert found._spare
        owner.on_thread(found._spare.clear)
        owner.on_thread(lambda: setattr(owner.transport.engine.faults, "never_complete", True))
        try:
            link.read(1, *whole(mine, owner), 0.2)
        except TransferTimeout:
            assert not found._spare
        else:
            raise AssertionError("a window of answers was more than all pieces")
