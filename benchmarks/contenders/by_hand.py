"""What one would write by hand: multiprocessing.shared_memory, and a loop over blocks with NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from multiprocessing import shared_memory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from contenders.memory import Lists, Memory
from datadist.bench.shapes import Shape


def _arrays(shape: Shape, segment: shared_memory.SharedMemory) -> list[NDArray[Any]]:
    size = (shape.tensors, shape.blocks, shape.block_bytes)
    return list(np.ndarray(size, np.uint8, segment.buf))


class Owner:
    """Holds the segment."""

    def __init__(self, shape: Shape, tuning: Mapping[str, str]) -> None:
        self._segment = shared_memory.SharedMemory(create=True, size=shape.cache_bytes)
        self._memory: Memory | None = Memory(shape, True, _arrays(shape, self._segment))

    def card(self) -> str:
        """The name of the segment."""
        return self._segment.name

    def expect(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Remove the segment."""
        self._memory = None
        self._segment.close()
        self._segment.unlink()


class Mover:
    """Copies block by block."""

    def __init__(self, shape: Shape, tuning: Mapping[str, str]) -> None:
        self._memory = Memory(shape, False)
        self._source: list[NDArray[Any]] = []
        self._shape = shape

    def connect(self, card: str) -> None:
        """Map the segment."""
        self._segment = shared_memory.SharedMemory(card)
        self._source = _arrays(self._shape, self._segment)

    def move(self, lists: Lists) -> None:
        """One assignment per block."""
        for target, source in zip(self._memory.arrays, self._source, strict=True):
            for here, there in zip(lists[1], lists[0], strict=True):
                target[here] = source[there]

    def clear(self) -> None:
        """Zero the target."""
        self._memory.clear()

    def problems(self, lists: Lists) -> list[str]:
        """What is wrong after one pull into cleared memory."""
        return self._memory.problems(lists)

    def close(self) -> None:
        """Unmap the segment."""
        self._source = []
        self._segment.close()
