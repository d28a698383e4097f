"""How well `transfer_cache_async` overlaps with the caller's work: `python benchmarks/overlap.py`.

A prompt process "computes" 32 layers (it waits, as a host does for its accelerator) and sends each to
a decoder as it is final. Compared within one run: the waits alone, the transfers alone, both one after
another, and both overlapped by the task. Bytes are verified after the last round.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection

from datadist import (
    BlocksCacheKey,
    CacheDesc,
    DataType,
    LayerSynchronizer,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
    TransferWithCacheKeyConfig,
)

LAYERS, ROUNDS = 32, 5
SHAPE = [256, 16, 8, 128]
"""8 MiB per tensor of float16, two tensors per layer: 512 MiB in all."""
MAPPING = {1: 0, 2: 1}


class Computing(LayerSynchronizer):
    """Waits ``seconds`` before each layer."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        if self.seconds:
            time.sleep(self.seconds)
        return True


def _engine(cluster: int) -> LLMDataDist:
    config = LLMConfig()
    config.enable_cache_manager = True
    config.enable_remote_cache_accessible = True
    config.transfer_backend = "shm"
    config.sync_kv_timeout = 60_000
    config.mem_pool_cfg = json.dumps({"memory_size": 600 << 20})
    engine = LLMDataDist(LLMRole.MIX, cluster)
    engine.init(config.generate_options())
    return engine


def _table() -> str:
    devices = [{"device_id": str(r), "rank_id": str(r)} for r in (0, 1)]
    server = {"server_id": "here", "device": devices}
    return json.dumps(
        {"version": "1.0", "status": "completed", "server_count": "1", "server_list": [server]}
    )


def _decoder(pipe: Connection) -> None:
    with _engine(2) as engine:
        desc = CacheDesc(2 * LAYERS, SHAPE, DataType.DT_FLOAT16)
        cache = engine.cache_manager.allocate_blocks_cache(desc, BlocksCacheKey(2))
        engine.wait_link(engine.link("overlap", MAPPING, _table()))
        pipe.send("ready")
        pipe.recv()
        pipe.send(all((array == index).all() for index, array in enumerate(cache.numpy())))
        pipe.recv()


def main() -> int:
    """Run, print a table; 1 when bytes are wrong."""
    os.environ["DATADIST_RUNTIME_DIR"] = tempfile.mkdtemp()
    pipe, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_decoder, args=(theirs,), daemon=True)
    process.start()
    with _engine(1) as engine:
        manager = engine.cache_manager
        cache = manager.allocate_blocks_cache(CacheDesc(2 * LAYERS, SHAPE, DataType.DT_FLOAT16))
        for index, array in enumerate(cache.numpy()):
            array[:] = index
        engine.wait_link(engine.link("overlap", MAPPING, _table()))
        pipe.recv()
        target = TransferWithCacheKeyConfig(BlocksCacheKey(2), range(LAYERS), range(LAYERS))

        def run(seconds: float) -> float:
            began = time.perf_counter()
            task = manager.transfer_cache_async(cache, Computing(seconds), [target])
            assert task.synchronize(60_000) is LLMStatusCode.LLM_SUCCESS
            return time.perf_counter() - began

        run(0.0)
        transfer = statistics.median(run(0.0) for _ in range(ROUNDS))
        print(f"transfers alone {transfer * 1e3:8.1f} ms")
        for share in (0.5, 1.0, 2.0):
            pause = share * transfer / LAYERS
            began = time.perf_counter()
            for _ in range(LAYERS):
                time.sleep(pause)
            compute = time.perf_counter() - began
            both = statistics.median(run(pause) for _ in range(ROUNDS))
            print(
                f"compute {compute * 1e3:8.1f} ms: overlapped {both * 1e3:8.1f} ms, "
                f"{both / max(compute, transfer):5.2f} of the longer, "
                f"{both / (compute + transfer):5.2f} of the sum"
            )
        pipe.send("verify")
        right = bool(pipe.recv())
        pipe.send("end")
        print("verified" if right else "WRONG BYTES")
    process.join(20)
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
