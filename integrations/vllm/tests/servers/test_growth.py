"""A thousand requests leave no memory, no descriptors, no threads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.models import prompt
from harness.pair import Pair, processes_of
from harness.servers import Server

WARM_UP, REQUESTS = 300, 1000
MEMORY_MIB = 24
"""vLLM's own growth per process in such a run, without a connector, is up to some MiB."""


@pytest.fixture(scope="module")
def pair(directory: Path) -> Iterator[Pair]:
    """Small caches, so that vLLM has used all of its blocks before we look."""
    arguments = ("--num-gpu-blocks-override", "256")
    env = {
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8"
    }  # else torch keeps one for each length of a batch
    with Pair("gqa", directory, arguments=arguments, env=env) as pair:
        yield pair


def _resources(server: Server) -> dict[str, tuple[int, int, int]]:
    """By process name: MiB of memory of its own, descriptors, threads."""
    found = {}
    for pid in processes_of(server):
        place = Path(f"/proc/{pid}")
        status = dict(
            line.split(":", 1)
            for line in (place / "status").read_text().splitlines()
            if ":" in line
        )
        anonymous = int(status["RssAnon"].split()[0]) // 1024
        descriptors = len(list((place / "fd").iterdir()))
        found[f"{status['Name'].strip()} {pid}"] = anonymous, descriptors, int(status["Threads"])
    return found


def _run(pair: Pair, generator: random.Random, count: int) -> None:
    prompts = [prompt(generator, generator.choice([5, 60, 120])) for _ in range(count)]
    got = pair.through_proxy(prompts, at_once=8, max_tokens=2)
    assert not [text for text in got if text.startswith("error")]
    pair.wait_until_free()


def test_nothing_grows(pair: Pair) -> None:
    generator = random.Random(9)
    _run(pair, generator, WARM_UP)
    before = [_resources(server) for server in (pair.prefill, pair.decode)]
    _run(pair, generator, REQUESTS)
    after = [_resources(server) for server in (pair.prefill, pair.decode)]
    assert pair.decode.metric("vllm:datadist_failed_loads_total") == 0
    for early, late in zip(before, after, strict=True):
        print(early, late)
        assert early.keys() == late.keys()
        for name, (memory, descriptors, threads) in early.items():
            assert late[name][0] <= memory + MEMORY_MIB, name
            assert late[name][1] <= descriptors + 2, name
            assert late[name][2] <= threads, name
