"""Have a prompt and its decoders move the KV cache of a real model's shape.

Each cluster is a separate process, started by spawn. All printed results were measured and
verified.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import secrets
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

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
)
from datadist.base.digits import number_argument
from datadist.base.shielded import start_shielded
from datadist.base.texts import in_seconds
from datadist.cli.style import BAD, GOOD, paint
from datadist.cli.tables import say

LAYERS, HEADS, HEAD_DIM, BLOCK_TOKENS = 32, 8, 128, 16
BLOCK_SHAPE = (BLOCK_TOKENS, HEADS, HEAD_DIM)
BLOCK_BYTES = BLOCK_TOKENS * HEADS * HEAD_DIM * 2
STEPS = 32
SECONDS = 120.0
END_SECONDS = 10.0


@dataclass(frozen=True)
class Plan:
    """The parameters that all processes of a run share."""

    clusters: int
    backend: str
    tokens: int
    name: str
    seed: int

    @property
    def request_blocks(self) -> int:
        """Blocks of one request."""
        return -(-self.tokens // BLOCK_TOKENS)

    @property
    def cache_blocks(self) -> int:
        """Blocks of each cache. Half of them stay unused, to verify that they do not change."""
        return 2 * self.request_blocks

    @property
    def mapping(self) -> dict[int, int]:
        """Cluster id to rank; cluster 1 is the prompt."""
        return {rank + 1: rank for rank in range(self.clusters)}

    def table(self) -> str:
        """A rank table of one server; the transport shm needs no addresses."""
        devices = [{"device_id": str(r), "rank_id": str(r)} for r in range(self.clusters)]
        return json.dumps(
            {
                "version": "1.0",
                "status": "completed",
                "server_count": "1",
                "server_list": [{"server_id": "demo", "device": devices}],
            }
        )

    def source_blocks(self) -> list[int]:
        """Blocks that hold the request at the prompt, in random order."""
        return self._pick(0)

    def target_blocks(self, cluster: int) -> list[int]:
        """Blocks that a decoder pulls into."""
        return self._pick(cluster)

    def _pick(self, salt: int) -> list[int]:
        order = np.random.default_rng([self.seed, salt]).permutation(self.cache_blocks)
        return [int(block) for block in order[: self.request_blocks]]

    def content(self, tensor: int) -> NDArray[np.uint16]:
        """What the blocks of one tensor hold at the prompt."""
        rng = np.random.default_rng([self.seed, 1000 + tensor])
        return rng.integers(0, 1 << 16, (self.request_blocks, *BLOCK_SHAPE), np.uint16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.add_argument("--clusters", type=number_argument(2, 4), default=2, metavar="2..4",
                        help="processes: one prompt, the others decoders (default 2)")  # fmt: skip
    parser.add_argument("--backend", default="auto", metavar="NAME",
                        help="transport, as listed by `datadist backends` (default auto)")  # fmt: skip
    parser.add_argument("--tokens", type=number_argument(1), default=4096, metavar="N",
                        help="length of the request in tokens (default 4096)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns 0 if every byte at every decoder is correct."""
    plan = Plan(
        clusters=args.clusters,
        backend=args.backend,
        tokens=args.tokens,
        name=f"demo-{os.getpid()}",
        seed=secrets.randbits(32),
    )
    per_cache = 2 * LAYERS * plan.cache_blocks * BLOCK_BYTES
    print(
        f"Llama-3-8B shape: {LAYERS} layers, K and V;\nblocks of {BLOCK_TOKENS} tokens x {HEADS} "
        f"heads x {HEAD_DIM} float16;\n{plan.tokens} tokens are {plan.request_blocks} of "
        f"{plan.cache_blocks} blocks, {per_cache / 2**20:.0f} MiB of cache per process",
        flush=True,
    )
    return _Run(plan).run()


class _Run:
    """The parent: starts the processes, relays their steps, shows progress."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._pipes: dict[int, Connection] = {}
        self._processes: list[BaseProcess] = []
        self._over = False
        """Whether the processes end by themselves."""

    def run(self) -> int:
        try:
            start_shielded(self._start)
            status = self._main()
            self._over = True
            return status
        except BrokenPipeError:  # of standard output: those of the processes are _ChildFailed
            raise
        except (_ChildFailed, EOFError, TimeoutError, OSError) as error:
            failed = paint("FAILED", BAD, sys.stderr)
            print(f"\n{failed}: {error or type(error).__name__}", file=sys.stderr)
            return 1
        finally:
            self._stop()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for cluster in self._plan.mapping:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_child, args=(self._plan, cluster, theirs), name=f"cluster-{cluster}"
            )
            process.start()
            theirs.close()
            self._pipes[cluster] = ours
            self._processes.append(process)

    def _main(self) -> int:
        for cluster, pipe in self._pipes.items():
            linked = f"  {_next(pipe, cluster, 'linked')}"
            say(linked, "    ")
        for cluster, pipe in self._pipes.items():
            _next(pipe, cluster, "ready")
        self._tell_all("pull")
        results = {cluster: self._watch(cluster) for cluster in self._pipes if cluster != 1}
        self._tell_all("finish")
        bad = 0
        for cluster, (nbytes, seconds, problems) in results.items():
            print(
                f"  cluster {cluster} pulled {nbytes / 2**20:.1f} MiB in {seconds * 1e3:.1f} ms: "
                f"{nbytes / seconds / 1e9:.2f} GB/s"
            )
            for problem in problems:
                print(f"    {problem}", file=sys.stderr)
            bad += bool(problems)
        right = paint("every byte arrived, and no other byte changed", GOOD)
        print("verdict: " + (paint("MISMATCH", BAD) if bad else right))
        return 1 if bad else 0

    def _watch(self, cluster: int) -> tuple[int, float, list[str]]:
        pipe = self._pipes[cluster]
        while True:
            kind, value = _receive(pipe, cluster)
            if kind == "progress":
                _show(cluster, value)
            elif kind == "done":
                return value[0], value[1], value[2]

    def _tell_all(self, word: str) -> None:
        for cluster, pipe in self._pipes.items():
            try:
                pipe.send(word)
            except BrokenPipeError:
                raise _ChildFailed(f"the process of cluster {cluster} ended early") from None

    def _stop(self) -> None:
        for pipe in self._pipes.values():
            pipe.close()
        for process in self._processes:
            if not self._over:
                process.terminate()
        for process in self._processes:
            process.join(END_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()


class _ChildFailed(Exception):
    """A process of the demo reported an error."""


def _receive(pipe: Connection, cluster: int) -> tuple[str, Any]:
    if not pipe.poll(SECONDS):
        raise TimeoutError(f"cluster {cluster} did nothing for {in_seconds(SECONDS)}")
    try:
        kind, value = pipe.recv()
    except EOFError:
        raise _ChildFailed(f"the process of cluster {cluster} ended early") from None
    if kind == "error":
        raise _ChildFailed(f"cluster {cluster}: {value}")
    return kind, value


def _next(pipe: Connection, cluster: int, expected: str) -> Any:
    kind, value = _receive(pipe, cluster)
    if kind != expected:
        raise _ChildFailed(f"cluster {cluster} sent {kind}, expected {expected}")
    return value


def _show(cluster: int, done: float) -> None:
    width = 40
    filled = round(done * width)
    bar = "#" * filled + "." * (width - filled)
    end = "\n" if done >= 1 else ""
    if sys.stdout.isatty():
        print(f"\r  cluster {cluster} pulls [{bar}] {done:4.0%}", end=end, flush=True)
    elif end:
        print(f"  cluster {cluster} pulls [{bar}] {done:4.0%}", flush=True)


# -- the processes of the clusters -------------------------------------------------------------


def _child(plan: Plan, cluster: int, pipe: Connection) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the engine is finalized on the way
    with suppress(EOFError, BrokenPipeError):  # the parent has failed and reports why
        try:
            _cluster(plan, cluster, pipe)
        except LLMException as error:
            pipe.send(("error", str(error)))


def _cluster(plan: Plan, cluster: int, pipe: Connection) -> None:
    os.environ["DATADIST_JOB"] = plan.name  # separate from other demos of this user
    role = LLMRole.PROMPT if cluster == 1 else LLMRole.DECODER
    config = LLMConfig()
    config.enable_cache_manager = True
    config.transfer_backend = plan.backend
    config.sync_kv_timeout = int(SECONDS * 1000)
    config.link_total_time = int(SECONDS)
    pool = (2 * LAYERS + 1) * plan.cache_blocks * BLOCK_BYTES + (4 << 20)
    config.mem_pool_cfg = json.dumps({"memory_size": pool})
    with LLMDataDist(role, cluster) as engine:
        engine.init(config.generate_options())
        comm_id = engine.link(plan.name, plan.mapping, plan.table())
        engine.wait_link(comm_id)
        others = ", ".join(
            f"cluster {c} (rank {r})" for c, r in plan.mapping.items() if c != cluster
        )
        pipe.send(
            ("linked", f"{role.name.lower()} {cluster} (rank {plan.mapping[cluster]}, pid "
             f"{os.getpid()}) linked with {others} over {engine.backend}")
        )  # fmt: skip
        desc = CacheDesc(2 * LAYERS, [plan.cache_blocks, *BLOCK_SHAPE], DataType.DT_FLOAT16)
        cache = engine.cache_manager.allocate_blocks_cache(
            desc, BlocksCacheKey(cluster) if cluster == 1 else None
        )
        if cluster == 1:
            _prompt(plan, cache, pipe)
        else:
            _decoder(plan, cluster, engine, cache, pipe)


def _words(cache: Cache) -> list[NDArray[np.uint16]]:
    return [array.view(np.uint16) for array in cache.numpy()]


def _prompt(plan: Plan, cache: Cache, pipe: Connection) -> None:
    blocks = plan.source_blocks()
    for tensor, words in enumerate(_words(cache)):
        words[blocks] = plan.content(tensor)
    pipe.send(("ready", None))
    _await(pipe, "pull")
    _await(pipe, "finish")


def _decoder(plan: Plan, cluster: int, engine: LLMDataDist, cache: Cache, pipe: Connection) -> None:
    source, target = plan.source_blocks(), plan.target_blocks(cluster)
    guard = 0xA500 + cluster
    for words in _words(cache):
        words[:] = guard
    pipe.send(("ready", None))
    _await(pipe, "pull")
    step = max(1, -(-len(target) // STEPS))
    spent = 0.0
    key = BlocksCacheKey(1)
    for start in range(0, len(target), step):
        stop = min(start + step, len(target))
        began = time.perf_counter()
        engine.cache_manager.pull_blocks(key, cache, source[start:stop], target[start:stop])
        spent += time.perf_counter() - began
        pipe.send(("progress", stop / len(target)))
    nbytes = 2 * LAYERS * len(target) * BLOCK_BYTES
    pipe.send(("done", (nbytes, spent, _verify(plan, cache, target, guard))))
    _await(pipe, "finish")


def _await(pipe: Connection, word: str) -> None:
    received = pipe.recv()
    if received != word:
        raise ValueError(f"the parent said {received!r}, expected {word!r}")


def _verify(plan: Plan, cache: Cache, target: list[int], guard: int) -> list[str]:
    problems = []
    rest = np.setdiff1d(np.arange(plan.cache_blocks), target)
    for tensor, words in enumerate(_words(cache)):
        wrong = int(np.count_nonzero(words[target] != plan.content(tensor)))
        touched = int(np.count_nonzero(words[rest] != guard))
        if wrong or touched:
            problems.append(
                f"tensor {tensor}: {wrong} wrong values, {touched} values changed outside the blocks"
            )
    return problems
