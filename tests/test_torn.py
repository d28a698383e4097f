"""The comparison of memory after interrupted transfers finds every element that is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from tests.torn import check_moved, check_torn, check_unchanged, moved

OLD = [np.arange(12).reshape(3, 4) + 100 * number for number in range(2)]
SOURCE = [tensor + 1000 for tensor in OLD]
NEW = moved(OLD, SOURCE, {1: 2})


def test_a_part_that_was_moved_is_counted() -> None:
    found = [tensor.copy() for tensor in OLD]
    assert check_torn(found, OLD, NEW, "ours") == 0
    found[1][1, 2:] = NEW[1][1, 2:]
    assert check_torn(found, OLD, NEW, "ours") == 2
    assert check_moved(found, OLD, NEW, "ours", whole=False) == 2
    with pytest.raises(AssertionError, match="ours, after a success, tensor 0: 4 of 12"):
        check_moved(found, OLD, NEW, "ours", whole=True)
    assert check_moved(NEW, OLD, NEW, "ours", whole=True) == 8


@pytest.mark.parametrize("place", [(0, 0, 0), (0, 1, 3), (1, 2, 3)])
def test_one_wrong_element_is_found(place: tuple[int, int, int]) -> None:
    tensor, *index = place
    found = [each.copy() for each in NEW]
    found[tensor][tuple(index)] = -1
    with pytest.raises(AssertionError, match=rf"tensor {tensor}: 1 of 12 .*first \[{index[0]}"):
        check_torn(found, OLD, NEW, "ours")
    with pytest.raises(AssertionError):
        check_unchanged(found, NEW, "ours")


def test_a_tensor_that_is_missing_is_an_error() -> None:
    with pytest.raises(AssertionError):
        check_torn(OLD[:1], OLD, NEW, "ours")
