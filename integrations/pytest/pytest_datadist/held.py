"""What this process holds that a test may leave: threads, an engine, shared memory.

Two pictures of it, before a test and after it, tell what the test has left.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from pytest_datadist.memory import SharedMemory, shared_memory, unlink

SECONDS = 2.0
"""How long threads may take to end by themselves."""
OWN_THREADS = ("pytest-datadist", "datadist-testing")
"""How names of threads begin that belong to the plugin."""


@dataclass(frozen=True)
class Held:
    """A picture of this process."""

    threads: frozenset[threading.Thread]
    memory: frozenset[SharedMemory]
    engine: Any

    @classmethod
    def now(cls) -> Held:
        """Take it."""
        threads = [t for t in threading.enumerate() if not t.name.startswith(OWN_THREADS)]
        return cls(frozenset(threads), frozenset(shared_memory()), live_engine())

    def left_since(self) -> list[str]:
        """What has come since this picture, in words; an engine is finalized, names are unlinked.

        Threads get some time to end, and unreachable objects are collected.
        """
        texts = self._end_engine()
        deadline = time.monotonic() + SECONDS
        while (new := self._new()) and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.01)
        for each in new:
            if isinstance(each, SharedMemory):
                unlink(each)
        return texts + sorted(_described(each) for each in new)

    def _new(self) -> set[threading.Thread | SharedMemory]:
        now = Held.now()
        return {*(now.threads - self.threads), *(now.memory - self.memory)}

    def _end_engine(self) -> list[str]:
        engine = live_engine()
        if engine is None or engine is self.engine:
            return []
        texts = [f"{engine!r}, which was not finalized", *links_of(engine)]
        engine.finalize()
        return texts


def live_engine() -> Any:
    """The initialised engine of this process, or None; imports nothing."""
    module = sys.modules.get("datadist.api.llm_datadist")
    return None if module is None else module.LLMDataDist.llm_engine_instance


def links_of(engine: Any, own: int | None = None) -> list[str]:
    """The links of an engine, but for ``own``, in words."""
    texts: dict[object, str] = {}
    for link in engine.stats()["links"]:
        comm_id = link["comm_id"]
        if comm_id is None:
            text = f"a link by address with cluster {link['cluster_id']}"
        else:
            text = f"link {link['name']!r} (comm id {comm_id})"
        if comm_id is None or comm_id != own:
            texts[text] = f"{text} of {engine!r}, which was not unlinked"
    return list(texts.values())


def pools_of(engine: Any) -> list[str]:
    """The pools of an engine in which something is allocated, in words.

    What was freed returns once the peers have let go; that gets some time.
    """
    deadline = time.monotonic() + SECONDS
    while any(pool["allocations_returning"] for pool in engine.stats()["pools"].values()):
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return [
        f"{pool['pages_used']} pages of {pool['page_bytes']:,} bytes in the {placement} pool of "
        f"{engine!r}, which were not freed"
        for placement, pool in engine.stats()["pools"].items()
        if pool["pages_used"]
    ]


def _described(each: threading.Thread | SharedMemory) -> str:
    if isinstance(each, SharedMemory):
        return f"{each}: a tensor, a view or a descriptor still holds it"
    return f"thread {each.name!r}{' (a daemon)' if each.daemon else ''}, which still runs"
