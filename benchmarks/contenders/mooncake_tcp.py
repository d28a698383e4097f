"""Mooncake's transfer engine over TCP of the loopback device, through its Python API."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from mooncake.engine import TransferEngine

from contenders.memory import Lists, Memory
from datadist.bench.shapes import Shape

BATCH = 1024
"""Segments per call: it refuses 16,384 at once."""


class Owner:
    """An engine with registered memory."""

    filled = True

    def __init__(self, shape: Shape, tuning: Mapping[str, str]) -> None:
        self._engine = TransferEngine()
        if self._engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
            raise RuntimeError("the engine does not start")
        self._shape = shape
        self._memory = Memory(shape, self.filled)
        for address in self._memory.addresses().tolist():
            if self._engine.register_memory(address, shape.blocks * shape.block_bytes) != 0:
                raise RuntimeError("the engine does not register memory")

    def card(self) -> tuple[str, list[int]]:
        """The engine's address and those of the tensors."""
        name = f"127.0.0.1:{self._engine.get_rpc_port()}"
        return name, self._memory.addresses().tolist()

    def expect(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Give the memory up."""
        for address in self._memory.addresses().tolist():
            self._engine.unregister_memory(address)


class Mover(Owner):
    """Reads from the owner's engine."""

    filled = False

    def connect(self, card: tuple[str, list[int]]) -> None:
        """Nothing moves yet: the engine connects with the first transfer."""
        self._peer, bases = card
        self._bases = np.array(bases, np.int64)

    def move(self, lists: Lists) -> None:
        """Batches of reads, one after another."""
        local = self._memory.blocks(self._memory.addresses(), lists[1]).tolist()
        remote = self._memory.blocks(self._bases, lists[0]).tolist()
        size = self._shape.block_bytes
        for start in range(0, len(local), BATCH):
            part = slice(start, start + BATCH)
            sizes = [size] * len(local[part])
            status = self._engine.batch_transfer_sync_read(
                self._peer, local[part], remote[part], sizes
            )
            if status != 0:
                raise RuntimeError(f"the transfer ended with status {status}")

    def clear(self) -> None:
        """Zero the target."""
        self._memory.clear()

    def problems(self, lists: Lists) -> list[str]:
        """What is wrong after one pull into cleared memory."""
        return self._memory.problems(lists)
