"""Which caches hold given ranges, and where regions meet inside of blocks, against a plain model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datadist.caches.by_address import TensorsByAddress, cuts
from datadist.caches.own_cache import Layout
from datadist.caches.quarantine import Ranges
from datadist.status import LLMException
from datadist.transport import Placement


class Shape(NamedTuple):
    """A cache of a small world of addresses."""

    bases: tuple[int, ...]
    blocks: int
    block: int
    gap: int

    def layout(self) -> Layout:
        stride = self.block + self.gap
        size = (self.blocks - 1) * stride + self.block
        return Layout(True, self.bases, stride, self.blocks, size, Placement.DEVICE, 2)

    def holders(self) -> list[set[int]]:
        """Sets of bytes; a range is held where one has all of it."""
        stride = self.block + self.gap
        blocks = [
            {base + number * stride + n for n in range(self.block)}
            for base in self.bases
            for number in range(self.blocks)
        ]
        if self.gap:
            return blocks
        size = self.blocks * self.block
        return [set(range(base, base + size)) for base in self.bases]


SHAPES = st.builds(
    Shape,
    st.lists(st.integers(1, 80), min_size=1, max_size=4).map(tuple),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(0, 12),
)


def _caches(shapes: list[Shape]) -> Any:
    return [
        SimpleNamespace(cache_id=number, layout=shape.layout(), held=True)
        for number, shape in enumerate(shapes, 1)
    ]


@given(
    st.lists(SHAPES, max_size=4),
    st.lists(st.tuples(st.integers(-3, 200), st.integers(-1, 30)), min_size=1, max_size=20),
)
def test_ranges_are_found_in_one_block_of_a_cache(
    shapes: list[Shape], ranges: list[tuple[int, int]]
) -> None:
    finder = TensorsByAddress()
    for address, length in ranges:
        wanted = set(range(address, address + length))
        holders = {
            number
            for number, shape in enumerate(shapes, 1)
            if length > 0 and any(wanted <= held for held in shape.holders())
        }
        try:
            found = finder.find(
                np.array([address]), np.array([length]), _caches(shapes), 1, False, None
            )
        except LLMException:
            found = set()
        assert len(found) == bool(holders)
        assert found <= holders


@given(SHAPES, st.lists(st.integers(0, 200), max_size=20))
def test_cuts_are_inside_of_blocks(shape: Shape, begins: list[int]) -> None:
    expected = [
        place
        for place in sorted(set(begins))
        if any({place - 1, place} <= held for held in shape.holders())
    ]
    assert list(cuts(shape.layout(), begins)) == expected


@given(SHAPES, st.integers(0, 200), st.integers(1, 40))
def test_ranges_touch_blocks_and_not_what_lies_between_them(
    shape: Shape, address: int, length: int
) -> None:
    bytes_ = set(range(address, address + length))
    expected = any(bytes_ & held for held in shape.holders())
    asked = Ranges(np.array([address]), np.array([length]))
    assert asked.meet(shape.layout().ranges) == expected


def test_the_first_range_that_no_cache_holds_is_named() -> None:
    layout = Shape((64,), 4, 8, 24).layout()
    caches = cast("Any", [SimpleNamespace(cache_id=3, layout=layout, held=True)])
    addresses, lengths = np.array([64, 96, 104, 8]), np.array([8, 4, 4, 8])
    with pytest.raises(LLMException, match="the 4 bytes at 0x68 are not inside one tensor"):
        TensorsByAddress().find(addresses, lengths, caches, 1, False, None)
