"""The bytes of tensors whose blocks lie side by side, or further apart than they are long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["BlockRanges"]

Int64Array: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class BlockRanges:
    """Blocks of ``block_bytes``, one each ``stride`` bytes in the ``size`` bytes from each base on.

    ``stride`` 0 says that everything in ``size`` counts.
    """

    bases: tuple[int, ...]
    size: int
    stride: int = 0
    block_bytes: int = 0

    @property
    def dense(self) -> bool:
        """Whether every byte of ``size`` is one of a block."""
        return self.stride == self.block_bytes

    def touch(self, base: int, begins: Int64Array, ends: Int64Array) -> bool:
        """Whether a byte of ranges is one of a block at ``base``; each has one of the ``size`` bytes."""
        # the first block that ends behind the begin of the range
        block = np.maximum(0, (begins - base - self.block_bytes) // self.stride + 1)
        return bool((base + block * self.stride < ends).any())
