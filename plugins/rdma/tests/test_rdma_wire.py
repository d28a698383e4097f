"""The wire between virtual machines: who gets which frame."""

from __future__ import annotations

from roce.harness.wire import CARDS, receivers

REST = bytes.fromhex("525400000001 0800")


def test_a_frame_goes_to_the_card_that_it_is_addressed_to() -> None:
    assert receivers(CARDS["c"] + REST, "a", "abc") == ["c"]
    assert receivers(CARDS["a"] + REST, "c", "abc") == ["a"]


def test_a_frame_for_all_goes_to_all_but_its_sender() -> None:
    assert receivers(b"\xff" * 6 + REST, "b", "abc") == ["a", "c"]
    assert receivers(bytes.fromhex("333300000001") + REST, "a", "ab") == ["b"]
