"""What the workloads move, and the content by which it is verified."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datadist import CacheDesc, DataType, Placement

MIB = 1 << 20
QUICK = 16
"""By how much `quick` makes caches and requests smaller."""


@dataclass(frozen=True)
class Shape:
    """A cache of ``tensors`` x ``blocks`` of ``block_bytes``, of which ``count`` blocks are moved.

    With one block the cache is contiguous. ``block_bytes`` is a multiple of 8.
    """

    name: str
    title: str
    tensors: int
    blocks: int
    block_bytes: int
    count: int

    @property
    def contiguous(self) -> bool:
        """Whether whole tensors move, rather than some of their blocks."""
        return self.blocks == 1

    @property
    def cache_bytes(self) -> int:
        """Bytes of one cache."""
        return self.tensors * self.blocks * self.block_bytes

    @property
    def nbytes(self) -> int:
        """Bytes that one transfer moves."""
        return self.tensors * self.count * self.block_bytes

    @property
    def segments(self) -> int:
        """Separate ranges of one transfer, before adjacent ones are merged."""
        return self.tensors * self.count

    def desc(self, placement: Placement) -> CacheDesc:
        """The description for `allocate` and `register`."""
        return CacheDesc(
            self.tensors, [self.blocks, self.block_bytes], DataType.DT_UINT8, placement
        )

    def lists(self, number: int) -> tuple[list[int], list[int]]:
        """Blocks to read and blocks to write of transfer ``number``, at random."""
        rng = np.random.default_rng([number, self.blocks, self.count])
        source, target = (rng.permutation(self.blocks)[: self.count] for _ in range(2))
        return source.tolist(), target.tolist()

    def quick(self) -> Shape:
        """A smaller one of the same kind."""
        if self.contiguous:
            return replace(self, block_bytes=self.block_bytes // QUICK)
        count = max(1, self.count // QUICK)
        return replace(self, blocks=max(4 * count, self.blocks // QUICK), count=count)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("contiguous", "one range of 256 MiB", 1, 1, 256 * MIB, 1),
        Shape("paged-gqa", "32 layers x K and V, 256 of 2048 blocks of 32 KiB",
              64, 2048, 32768, 256),
        Shape("paged-mla", "61 layers, 32 of 256 blocks of 144 KiB", 61, 256, 147456, 32),
    )
}  # fmt: skip
"""Workloads that are measured by throughput."""

GIB_PULL = Shape("gib", "64 tensors, 512 of 512 blocks of 32 KiB: 1 GiB", 64, 512, 32768, 512)
"""The large transfer of the workload that looks at what is small beside it."""

ONE_BLOCK = Shape("latency", "one block of 4 KiB", 1, 1024, 4096, 1)


def content(shape: Shape, tensor: int, blocks: NDArray[Any]) -> NDArray[np.uint64]:
    """What ``blocks`` of a tensor hold at their owner: no two words of a cache are equal."""
    words = shape.block_bytes // 8
    first = (blocks.astype(np.int64) + tensor * shape.blocks) * words + 1
    return np.add.outer(first, np.arange(words)).view(np.uint64)


def fill(shape: Shape, tensors: list[NDArray[Any]]) -> None:
    """Write the content of every block."""
    step = max(1, (64 * MIB) // shape.block_bytes)
    for number, tensor in enumerate(tensors):
        view = tensor.reshape(shape.blocks, -1).view(np.uint64)
        for start in range(0, shape.blocks, step):
            blocks = np.arange(start, min(start + step, shape.blocks))
            view[start : start + step] = content(shape, number, blocks)


def verify(
    shape: Shape, tensors: list[NDArray[Any]], source: list[int], target: list[int]
) -> list[str]:
    """Problems: words that did not arrive, and words changed beside the blocks that were written.

    Everything else in the cache must be zero before the transfer.
    """
    problems = []
    written = set(target)
    beside = np.array(
        sorted({b + d for b in target for d in (-1, 1)} - written - {-1, shape.blocks}), np.int64
    )
    for number, tensor in enumerate(tensors):
        view = tensor.reshape(shape.blocks, -1).view(np.uint64)
        wrong = 0
        step = max(1, (64 * MIB) // shape.block_bytes)
        for start in range(0, len(target), step):
            part = slice(start, start + step)
            expected = content(shape, number, np.array(source[part]))
            wrong += int(np.count_nonzero(view[target[part]] != expected))
        touched = int(np.count_nonzero(view[beside]))
        if wrong or touched:
            problems.append(
                f"tensor {number}: {wrong} wrong words, {touched} words changed beside the blocks"
            )
    return problems
