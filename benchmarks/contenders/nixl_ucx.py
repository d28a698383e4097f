"""NIXL over UCX, through its Python API; descriptors are built for each pull from its lists."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from contenders.memory import Lists, Memory
from datadist.bench.shapes import Shape

_NAME = "nixl" if importlib.util.find_spec("nixl") else "nixl_cu12"  # with torch, and without
_api = importlib.import_module(f"{_NAME}._api")

PREPARED = 4096
"""Up to so many blocks in a cache, transfers of few blocks pick from prepared descriptors."""
FEW = 64


def _agent(name: str, tuning: Mapping[str, str]) -> Any:
    threads = tuning["progress"] == "1"
    agent = _api.nixl_agent(name, _api.nixl_agent_config(enable_prog_thread=threads, backends=[]))
    options = {"ucx_error_handling_mode": tuning["errors"]} if "errors" in tuning else {}
    agent.create_backend("UCX", options)
    return agent


class NixlOwner:
    """An agent with registered memory; without a progress thread it polls, as programs do."""

    def __init__(self, shape: Shape, tuning: Mapping[str, str]) -> None:
        self._agent = _agent("owner", tuning)
        self._memory = Memory(shape, tuning.get("direction") != "push")
        size = shape.blocks * shape.block_bytes
        self._registered = self._agent.register_memory(
            [(int(a), size, 0, "") for a in self._memory.addresses()], "DRAM"
        )
        self._stop = threading.Event()
        self._poller: threading.Thread | None = None
        if tuning["progress"] == "0":
            self._poller = threading.Thread(
                target=self._poll, args=(float(tuning.get("poll", 0.001)),)
            )
            self._poller.start()

    def _poll(self, pause: float) -> None:
        while not self._stop.wait(pause):
            self._agent.get_new_notifs()

    def card(self) -> tuple[bytes, list[int]]:
        """Metadata of the agent and addresses of the tensors."""
        return self._agent.get_agent_metadata(), self._memory.addresses().tolist()

    def expect(self) -> None:
        """Nothing to do."""

    def clear(self) -> None:
        """Zero the target."""
        self._memory.clear()

    def problems(self, lists: Lists) -> list[str]:
        """What is wrong after one transfer into cleared memory."""
        return self._memory.problems(lists)

    def close(self) -> None:
        """Give everything up."""
        self._stop.set()
        if self._poller is not None:
            self._poller.join()
        self._agent.deregister_memory(self._registered)


class NixlMover:
    """Reads from the owner's agent, or writes to it."""

    def __init__(self, shape: Shape, tuning: Mapping[str, str]) -> None:
        self._agent = _agent("puller", tuning)
        self._push = tuning.get("direction") == "push"
        self._memory = Memory(shape, self._push)
        self._shape = shape
        size = shape.blocks * shape.block_bytes
        self._registered = self._agent.register_memory(
            [(int(a), size, 0, "") for a in self._memory.addresses()], "DRAM"
        )

    def connect(self, card: tuple[bytes, list[int]]) -> None:
        """Load the owner's metadata; where transfers are small, prepare descriptors of all blocks."""
        metadata, bases = card
        self._peer = self._agent.add_remote_agent(metadata)
        self._agent.make_connection(self._peer)
        self._bases = np.array(bases, np.int64)
        self._sides: tuple[Any, Any] | None = None
        if self._shape.tensors * self._shape.count <= FEW and 1 < self._shape.blocks <= PREPARED:
            every = list(range(self._shape.blocks))
            self._sides = (
                self._agent.prep_xfer_dlist(
                    "", self._rows(self._memory.addresses(), every), "DRAM"
                ),
                self._agent.prep_xfer_dlist(self._peer, self._rows(self._bases, every), "DRAM"),
            )

    def _rows(self, bases: Any, blocks: list[int]) -> Any:
        addresses = self._memory.blocks(bases, blocks)
        rows = np.zeros((len(addresses), 3), np.uint64)
        rows[:, 0] = addresses
        rows[:, 1] = self._shape.block_bytes
        return rows

    def move(self, lists: Lists) -> None:
        """Prepare, start, and poll until it is done."""
        agent, what = self._agent, "WRITE" if self._push else "READ"
        mine, theirs = lists if self._push else lists[::-1]
        if self._sides is not None:
            handle = agent.make_prepped_xfer(what, self._sides[0], mine, self._sides[1], theirs)
        else:
            local = agent.get_xfer_descs(self._rows(self._memory.addresses(), mine), "DRAM")
            remote = agent.get_xfer_descs(self._rows(self._bases, theirs), "DRAM")
            handle = agent.initialize_xfer(what, local, remote, self._peer)
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        agent.release_xfer_handle(handle)
        if state != "DONE":
            raise RuntimeError(f"the transfer ended as {state}")

    def clear(self) -> None:
        """Zero the target."""
        self._memory.clear()

    def problems(self, lists: Lists) -> list[str]:
        """What is wrong after one transfer into cleared memory."""
        return self._memory.problems(lists)

    def close(self) -> None:
        """Give everything up."""
        self._sides = None
        self._agent.remove_remote_agent(self._peer)
        self._agent.deregister_memory(self._registered)
