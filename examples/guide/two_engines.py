"""Two engines for the scripts of this folder: two processes, each of which runs one function."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.synchronize import Barrier

from datadist import LLMConfig, LLMDataDist, LLMRole

PROMPT, DECODER = 1, 2
SECONDS = 60.0
"""How long one waits for the other."""
POOL = '{"memory_size": 67108864}'
RANK_TABLE = json.dumps(
    {
        "version": "1.0",
        "status": "completed",
        "server_count": "1",
        "server_list": [
            {
                "server_id": "here",
                "device": [{"device_id": str(rank), "rank_id": str(rank)} for rank in range(2)],
            }
        ],
    }
)
Program = Callable[[LLMDataDist, Callable[[], object]], None]
"""Takes the engine, and a function that waits until the other program calls it too."""


def link(engine: LLMDataDist, metadata: bytes | None = None) -> int:
    """Link the two, and wait until the link is OK."""
    mapping = {PROMPT: 0, DECODER: 1}
    comm_id = engine.link("guide", mapping, RANK_TABLE, metadata=metadata)
    engine.wait_link(comm_id)
    return comm_id


def run(prompt: Program, decoder: Program, **settings: object) -> None:
    """Run both; ``settings`` are properties of their configurations. Exits with the status."""
    os.environ.setdefault("DATADIST_JOB", f"guide-{os.getpid()}")  # apart from other runs
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    both = [
        context.Process(target=_serve, args=(program, cluster, barrier, settings))
        for cluster, program in ((PROMPT, prompt), (DECODER, decoder))
    ]
    for process in both:
        process.start()
    for process in both:
        process.join()
    raise SystemExit(max(abs(process.exitcode or 0) for process in both))


def _serve(program: Program, cluster: int, barrier: Barrier, settings: dict[str, object]) -> None:
    config = LLMConfig()
    config.enable_cache_manager = True
    config.mem_pool_cfg = POOL
    config.link_total_time = int(SECONDS)
    config.sync_kv_timeout = 10_000
    for name, value in settings.items():
        setattr(config, name, value)
    role = LLMRole.PROMPT if cluster == PROMPT else LLMRole.DECODER
    try:
        with LLMDataDist(role, cluster) as engine:
            engine.init(config.generate_options())
            program(engine, lambda: barrier.wait(SECONDS))
    except BaseException:
        barrier.abort()  # the other one does not wait for us
        raise
