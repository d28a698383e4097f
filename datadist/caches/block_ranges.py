"""The bytes of tensors whose blocks lie side by side, or further apart than they are long."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["BlockRanges"]


@dataclass(frozen=True)
class BlockRanges:
    """Blocks of ``block_bytes``, one each ``stride`` bytes in the ``size`` bytes from each base on.

    ``stride`` 0 says that everything in ``size`` counts.
    """

    bases: tuple[int, ...]
    size: int
    stride: int = 0
    block_bytes: int = 0

    def touch(self, address: int, length: int) -> bool:
        """Whether a byte of a range is one of a block."""
        return any(self._touches(base, address, length) for base in self.bases)

    def touch_any(self, addresses: Iterable[int], lengths: Iterable[int]) -> bool:
        """Whether a byte of one of these ranges is one of a block."""
        return any(map(self.touch, addresses, lengths))

    def _touches(self, base: int, address: int, length: int) -> bool:
        end = address + length
        if end <= base or base + self.size <= address:
            return False
        if self.stride == self.block_bytes:
            return True
        # the first block that ends behind the begin of the range
        block = max(0, (address - base - self.block_bytes) // self.stride + 1)
        return base + block * self.stride < end
