"""The bytes of the conformance kit: what must differ does, and is said (pattern.py)."""

from __future__ import annotations

from array import array

import pytest

from datadist.testing.pattern import ExpectedWrite, difference, expected, pattern

MIB = 1 << 20


@pytest.mark.parametrize("shift", [1 << power for power in range(23)])
def test_data_moved_by_a_power_of_two_is_not_the_same(shift: int) -> None:
    data = pattern(1, 5 * MIB)
    for begin in (0, 12_345, MIB - 1):
        assert data[begin : begin + 64] != data[begin + shift : begin + shift + 64]


@pytest.mark.parametrize("size", [1, 1000, 3 * MIB + 7])
def test_patterns_have_their_size_and_belong_to_their_seed(size: int) -> None:
    assert len(pattern(1, size)) == size
    assert pattern(1, size) == pattern(1, size)
    assert size < 8 or pattern(1, size) != pattern(2, size)


def test_what_arrived_is_expected_and_all_else_stays() -> None:
    expected_write = ExpectedWrite(
        2, 100, array("q", [10, 50]), array("q", [0, 90]), array("q", [5, 10])
    )
    wanted, source = expected(1, 80, [expected_write]), pattern(2, 100)
    own = pattern(1, 80)
    assert wanted == own[:10] + source[:5] + own[15:50] + source[90:] + own[60:]


def test_a_difference_is_said_with_its_place() -> None:
    wanted = bytes(range(100))
    actual = wanted[:20] + b"\xff" + wanted[21:30] + b"\xff" + wanted[31:]
    assert difference(wanted, wanted) is None
    assert difference(actual, bytearray(wanted), 1000) == (
        "2 of 100 bytes are wrong, from offset 1020 to 1030: ff15161718191a1b instead of "
        "1415161718191a1b"
    )
