"""Memory of both ends, filled and verified as `datadist bench` does it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from datadist.bench.shapes import Shape, fill, verify

Lists = tuple[list[int], list[int]]


class Memory:
    """One array per tensor; ``filled`` at the source, zero at the target."""

    def __init__(
        self, shape: Shape, filled: bool, arrays: list[NDArray[Any]] | None = None
    ) -> None:
        self.shape = shape
        size = (shape.blocks, shape.block_bytes)
        self.arrays = arrays or [np.zeros(size, np.uint8) for _ in range(shape.tensors)]
        if filled:
            fill(shape, self.arrays)
        else:
            self.clear()

    def clear(self) -> None:
        """Zero it, which also makes its pages."""
        for array in self.arrays:
            array[:] = 0

    def addresses(self) -> NDArray[np.int64]:
        """Base of each tensor."""
        return np.array([array.ctypes.data for array in self.arrays], np.int64)

    def blocks(self, bases: NDArray[np.int64], blocks: list[int]) -> NDArray[np.int64]:
        """Address of each block of each tensor."""
        offsets = np.array(blocks, np.int64) * self.shape.block_bytes
        return np.add.outer(bases, offsets).ravel()

    def problems(self, lists: Lists) -> list[str]:
        """What is wrong after one transfer into cleared memory."""
        return verify(self.shape, self.arrays, *lists)
