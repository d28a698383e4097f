"""An engine of the test's own process, for raw peers to talk to."""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from datadist import CacheDesc, DataType, LLMConfig, LLMDataDist, LLMRole
from datadist.rank_table import parse_rank_table
from tests import nodes
from tests.nodes import MIB
from tests.raw_peer import RawPeer, memory, socket_of

PAIR = {1: 0, 2: 1}
TABLE = parse_rank_table(nodes.table_for(PAIR)).canonical
GUARD = 0x77
BASE, SIZE = 1 << 40, 1 << 16
"""Memory that a raw peer offers."""
SECONDS = 60.0


def offer_of(fd: int | None = 0, address: int = BASE, size: int = SIZE) -> dict[str, Any]:
    """A good offer over shm."""
    region = {"id": 1, "address": address, "size": size, "fd": fd}
    return {"version": 1, "writable": False, "regions": [region], "fence": None}


def entry_of(**changes: Any) -> dict[str, Any]:
    """A cache in the memory that was offered, as its owner tells of it."""
    entry = {
        "cache_id": 1, "blocks": False, "bases": [BASE, BASE + 4096], "stride": 64, "count": 1,
        "tensor_size": 64, "data_type": 4, "placement": 1, "pooled": True, "accessible": False,
        "regions": [1], "bindings": [],
    }  # fmt: skip
    return {**entry, **changes}


class Engine:
    """An engine of this process, and what it logged."""

    def __init__(self, runtime_dir: Path, sync_kv_timeout: int = 300) -> None:
        os.environ["DATADIST_RUNTIME_DIR"] = str(runtime_dir)
        self.runtime_dir = runtime_dir
        config = LLMConfig()
        config.enable_cache_manager = True
        config.transfer_backend = "shm"
        config.link_total_time = 30
        config.sync_kv_timeout = sync_kv_timeout
        config.mem_pool_cfg = json.dumps({"memory_size": MIB, "page_shift": 12})
        self.api = LLMDataDist(LLMRole.MIX, 1)
        self.log: list[str] = []
        self.comm_id = 0
        """Of the link that a test is about."""
        self._strangers: list[RawPeer] = []
        self._handler = Collector(self.log)
        logger = logging.getLogger("datadist")
        self._level = logger.level
        logger.addHandler(self._handler)
        logger.setLevel(logging.DEBUG)
        self.api.init(config.generate_options())
        self.cache = self.api.cache_manager.allocate_cache(CacheDesc(2, [1, 64], DataType.DT_UINT8))
        for array in self.cache.numpy():
            array[:] = GUARD

    def raw_peer(self, number: int = 0, hello: bool = True, cluster: int = 2) -> RawPeer:
        """Somebody who connects."""
        made = RawPeer(socket_of(self.runtime_dir, 1), cluster, number, hello)
        self._strangers.append(made)
        return made

    def ended(self, reason: str, times: int = 1) -> bool:
        """Whether sessions or handshakes end in time, and the log gives that reason for them."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            if len([line for line in self.ends() if reason in line]) == times:
                return True
            time.sleep(0.005)
        return False

    def ends(self) -> list[str]:
        """Why sessions and handshakes ended so far, in the words of the log."""
        said = ("the session with ", "no session with ")
        return [line for line in self.log if any(text in line for text in said)]

    def untouched(self) -> bool:
        """Whether no byte of our cache has changed."""
        return all((array == GUARD).all() for array in self.cache.numpy())

    def works(self) -> None:
        """Somebody else is served."""
        other = self.raw_peer(900)
        assert other.hear("hello") is not None
        other.close()
        assert self.api.stats()["backend"] == "shm"

    def close(self) -> None:
        """The end; not with raw peers there, who would be waited for."""
        logger = logging.getLogger("datadist")
        with ExitStack() as stack:
            stack.callback(logger.setLevel, self._level)
            stack.callback(logger.removeHandler, self._handler)
            stack.callback(self.api.finalize)
            for raw_peer in self._strangers:
                stack.callback(raw_peer.close)


class Collector(logging.Handler):
    """Keeps what is logged, as lines."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        raised = record.exc_info[1] if record.exc_info else None
        why = "" if raised is None else f" (defect: {type(raised).__name__}: {raised})"
        self._lines.append(f"{record.levelname} {record.getMessage()}{why}")


class Sent:
    """Memory of SIZE bytes that was sent with an offer, and not kept here."""

    def __init__(self, raw_peer: RawPeer, offer: dict[str, Any], token: str) -> None:
        fd = memory(SIZE)
        self._inode = os.fstat(fd).st_ino
        assert raw_peer.offer(token, offer, [fd])
        os.close(fd)

    def is_closed(self) -> bool:
        """Whether the engine, which is in this process, lets go of the descriptor in time."""
        deadline = time.monotonic() + SECONDS
        while self._is_open():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    def _is_open(self) -> bool:
        for name in os.listdir("/proc/self/fd"):
            try:
                if os.stat(f"/proc/self/fd/{name}").st_ino == self._inode:
                    return True
            except OSError:
                continue
        return False
