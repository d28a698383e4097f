"""Linking, and what links tell."""

from __future__ import annotations

import selectors
from collections.abc import Callable

from two_engines import RANK_TABLE, run

from datadist import LLMDataDist, RegisterMemStatus


def prompt(engine: LLMDataDist, meet: Callable[[], object]) -> None:
    """Link, look at the link, unlink; then once more, with metadata."""
    rank_table = RANK_TABLE
    # region link
    comm_id = engine.link("comm1", {1: 0, 2: 1}, rank_table)
    # endregion
    # region poll
    engine.query_register_mem_status(comm_id)  # PREPARING, then OK or FAILED
    # endregion
    engine.wait_link(comm_id)
    assert engine.query_register_mem_status(comm_id) is RegisterMemStatus.OK
    engine.unlink(comm_id)
    told(engine)
    meet()


def told(engine: LLMDataDist) -> None:
    """What links tell."""
    rank_table = RANK_TABLE
    selector = selectors.DefaultSelector()
    # region told
    about = b"Llama-3-8B, 128 tokens a block"
    comm_id = engine.link("comm1", {1: 0, 2: 1}, rank_table, metadata=about)
    engine.wait_link(comm_id)
    engine.link_metadata(comm_id)  # {2: b"..."}; or link_metadata(cluster_id=2)
    engine.link_error(cluster_id=2)  # None, or why the newest link with cluster 2 failed or broke
    selector.register(engine.link_events_fileno(), selectors.EVENT_READ)
    for event in engine.link_events():  # kind, comm_id, name, cluster_ids, reason
        print(event.kind.name, event.cluster_ids)
    # endregion
    assert engine.link_metadata(cluster_id=2) == {2: b"Llama-3-8B, 64 tokens a block"}
    selector.close()


def decoder(engine: LLMDataDist, meet: Callable[[], object]) -> None:
    """The other end."""
    comm_id = engine.link("comm1", {1: 0, 2: 1}, RANK_TABLE)
    engine.wait_link(comm_id)
    engine.unlink(comm_id)
    comm_id = engine.link(
        "comm1", {1: 0, 2: 1}, RANK_TABLE, metadata=b"Llama-3-8B, 64 tokens a block"
    )
    engine.wait_link(comm_id)
    meet()


if __name__ == "__main__":
    run(prompt, decoder)
