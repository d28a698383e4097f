"""The part of ``verify`` that takes two hosts: it uses the public API only, as an application would.

Rank 1 pulls from rank 0 and pushes to it. For synchronisation each rank has a counter that the
other one pulls. So only the library carries messages.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import time

import numpy as np
from numpy.typing import NDArray

from datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    DataType,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
)
from datadist_rdma import ports
from datadist_rdma.verify_report import MIB, RATIO, ROUNDS, Report, rate

MAPPING = {1: 0, 2: 1}
STEP_SECONDS = 300
BASELINE_PORT = "18515"
BASELINE_RUNS = (4096, 65536)
START_SECONDS = 20
SETTLE_SECONDS = 1.0
"""Time for rank 0 to start the next ib_read_bw, which must not disturb our pull."""
READY, MOVED, CHECKED = 1, 2, 3


class Side:
    """Our engine, our counter, and the peer's."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.rank: int = args.rank
        self.cluster = args.rank + 1
        self.peer = 2 - args.rank
        self.blocks = {block: args.size * MIB // block for block in (4096, 65536, MIB)}
        config = LLMConfig()
        config.enable_cache_manager = True
        config.enable_remote_cache_accessible = True
        config.transfer_backend = "rdma"
        config.sync_kv_timeout = 60_000
        config.link_total_time = 120
        if args.traffic_class is not None:
            config.rdma_traffic_class = args.traffic_class
        if args.service_level is not None:
            config.rdma_service_level = args.service_level
        config.mem_pool_cfg = json.dumps({"memory_size": (3 * args.size + 16) * MIB})
        self.engine = LLMDataDist(LLMRole.MIX, self.cluster)
        self.engine.init(config.generate_options())
        self.manager = self.engine.cache_manager
        self._mine = self._allocate(1, 8, 0)
        self._theirs = self._allocate(1, 8, None)

    def allocate(self, block: int) -> Cache:
        """A cache of all that is moved, in blocks of ``block`` bytes."""
        return self._allocate(self.blocks[block], block, block)

    def _allocate(self, count: int, size: int, model: int | None) -> Cache:
        desc = CacheDesc(1, [count, size], DataType.DT_UINT8)
        key = () if model is None else (BlocksCacheKey(self.cluster, model),)
        return self.manager.allocate_blocks_cache(desc, *key)

    def tell(self, step: int) -> None:
        """Let the peer go on."""
        self._mine.numpy()[0].view(np.int64)[0, 0] = step

    def wait_for(self, step: int) -> None:
        """Wait until the peer has reached this step."""
        deadline = time.monotonic() + STEP_SECONDS
        while self._look() < step:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the other rank did not get to step {step}")
            time.sleep(0.02)

    def wait_until_unlinked(self) -> None:
        """Wait until the peer has finished and unlinked; it may do that in the middle of a look."""
        deadline = time.monotonic() + STEP_SECONDS
        while time.monotonic() < deadline:
            try:
                self._look()
            except LLMException as error:
                if error.status_code is LLMStatusCode.LLM_NOT_YET_LINK:
                    return
                if error.status_code is not LLMStatusCode.LLM_FAILED:
                    raise
            time.sleep(0.02)
        raise TimeoutError("the other rank did not finish")

    def _look(self) -> int:
        self.manager.pull_blocks(BlocksCacheKey(self.peer, 0), self._theirs, [0], [0])
        return int(self._theirs.numpy()[0].view(np.int64)[0, 0])


def table(device_ips: list[str] | None) -> str:
    """A rank table of two hosts."""
    servers = []
    for rank in (0, 1):
        device = {"device_id": "0", "rank_id": str(rank)}
        if device_ips:
            device["device_ip"] = device_ips[rank]
        servers.append({"server_id": f"verify-{rank}", "device": [device]})
    return json.dumps(
        {"version": "1.0", "status": "completed", "server_count": "2", "server_list": servers}
    )


def run(report: Report, args: argparse.Namespace) -> None:
    """Link the two ranks and move memory both ways."""
    missing = [n for n in ("DATADIST_RENDEZVOUS", "DATADIST_AUTH_KEY") if not os.environ.get(n)]
    if missing:
        report.line("FAIL", "environment", f"set {' and '.join(missing)} equally on both hosts")
        return
    try:
        side = Side(args)
    except LLMException as error:
        report.line("FAIL", "init", str(error))
        return
    with side.engine:
        caches = {block: side.allocate(block) for block in side.blocks}
        with report.step("link") as detail:
            begun = time.monotonic()
            comm_id = side.engine.link("verify", MAPPING, table(args.device_ip))
            side.engine.wait_link(comm_id)
            detail.append(
                f"{(time.monotonic() - begun) * 1e3:.0f} ms, the other rank's start included"
            )
        if report.failed:
            return
        with report.step("both ranks finish"):
            (_serve if side.rank == 0 else _move)(report, side, caches, args)
        side.engine.unlink(comm_id)


def _serve(report: Report, side: Side, caches: dict[int, Cache], args: argparse.Namespace) -> None:
    for block, cache in caches.items():
        cache.numpy()[0][:] = pattern(block, side.blocks[block])
    side.tell(READY)
    side.wait_for(MOVED)
    for block, cache in caches.items():
        with report.step(f"pushed blocks of {block // 1024} KiB"):
            if not np.array_equal(cache.numpy()[0], pattern(block, side.blocks[block], True)):
                raise ValueError("the bytes differ")
    side.tell(CHECKED)
    if args.ib_read_bw:
        _serve_baseline(args)
    side.wait_until_unlinked()


def _move(report: Report, side: Side, caches: dict[int, Cache], args: argparse.Namespace) -> None:
    side.wait_for(READY)
    for block, cache in caches.items():
        count = side.blocks[block]
        numbers, swapped = list(range(count)), [n ^ 1 for n in range(count)]
        view = cache.numpy()[0]
        with report.step(f"pull in blocks of {block // 1024} KiB") as detail:
            best = 0.0
            for _ in range(ROUNDS):
                view[:] = 0
                best = max(best, _pull(side, cache, block))
            if not np.array_equal(view[swapped], pattern(block, count)):
                raise ValueError("the bytes differ")
            detail.append(rate(best))
        view[swapped] = pattern(block, count, True)
        with report.step(f"push in blocks of {block // 1024} KiB") as detail:
            begun = time.monotonic()
            side.manager.push_blocks(
                BlocksCacheKey(1, block), cache, swapped, numbers, tensor_num_per_layer=1
            )
            detail.append(rate(count * block / (time.monotonic() - begun)))
    side.tell(MOVED)
    side.wait_for(CHECKED)
    if args.ib_read_bw:
        _compare(report, side, caches, args)


def _pull(side: Side, cache: Cache, block: int) -> float:
    """Pull all blocks, neighbours swapped; bytes per second."""
    count = side.blocks[block]
    numbers, swapped = list(range(count)), [n ^ 1 for n in range(count)]
    begun = time.monotonic()
    side.manager.pull_blocks(BlocksCacheKey(1, block), cache, numbers, swapped)
    return float(count * block / (time.monotonic() - begun))


def pattern(block: int, count: int, pushed: bool = False) -> NDArray[np.uint8]:
    """Blocks that both ranks can make."""
    seed = [block, pushed]
    return np.random.default_rng(seed).integers(0, 256, (count, block), np.uint8)


# -- ib_read_bw beside it -------------------------------------------------------------------------


def _rounds() -> list[int]:
    """Block sizes in the order in which both ranks measure them."""
    return [block for block in BASELINE_RUNS for _ in range(ROUNDS)]


def _command(args: argparse.Namespace, block: int) -> list[str]:
    gids, _ = ports.list_gids()
    address = ports.parse(args.device_ip[args.rank]) if args.device_ip else None
    gid = ports.choose(gids, ports.GidFilter(), address, "--device-ip")
    return [
        "ib_read_bw", "-F", "-d", gid.device, "-x", str(gid.index), "-s", str(block), "-t", "128",
        "-p", BASELINE_PORT,
    ]  # fmt: skip


def _serve_baseline(args: argparse.Namespace) -> None:
    for block in _rounds():
        subprocess.run(
            _command(args, block), stdout=subprocess.DEVNULL, timeout=STEP_SECONDS, check=True
        )


def _measure(args: argparse.Namespace, block: int) -> float:
    """Bytes per second that ib_read_bw reads from rank 0."""
    host = args.device_ip[0] if args.device_ip else _host(os.environ["DATADIST_RENDEZVOUS"])
    deadline = time.monotonic() + START_SECONDS
    while True:  # until the server listens
        run = subprocess.run(
            [*_command(args, block), host], capture_output=True, text=True, check=False,
            timeout=STEP_SECONDS,
        )  # fmt: skip
        found = re.search(rf"^\s*{block}\s+\d+\s+[\d.]+\s+([\d.]+)", run.stdout, re.MULTILINE)
        if found is not None:
            return float(found[1]) * MIB
        if time.monotonic() > deadline:
            raise ValueError(f"ib_read_bw: {(run.stderr or run.stdout).strip()[-300:]}")
        time.sleep(0.2)


def _compare(
    report: Report, side: Side, caches: dict[int, Cache], args: argparse.Namespace
) -> None:
    """Alternating rounds of both, so that other load affects both equally."""
    ours: dict[int, list[float]] = {block: [] for block in BASELINE_RUNS}
    theirs: dict[int, list[float]] = {block: [] for block in BASELINE_RUNS}
    with report.step("ib_read_bw"):
        for block in _rounds():
            theirs[block].append(_measure(args, block))
            time.sleep(SETTLE_SECONDS)
            ours[block].append(_pull(side, caches[block], block))
    if not all(ours.values()):
        return  # the step has reported the reason
    for block in BASELINE_RUNS:
        mine, best = max(ours[block]), max(theirs[block])
        mark = "ok" if mine / best >= RATIO else "FAIL"
        report.line(
            mark, f"pull against ib_read_bw, {block // 1024} KiB",
            f"{rate(mine)} of {rate(best)}: {mine / best:.2f}, good from {RATIO}",
        )  # fmt: skip


def _host(text: str) -> str:
    return text.rpartition(":")[0].strip("[]")
