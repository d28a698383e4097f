"""A thousand requests leave no memory, no descriptors, no threads, no mappings."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.models import prompt
from harness.pair import Pair
from harness.resources import resources

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


def _run(pair: Pair, generator: random.Random, count: int) -> None:
    prompts = [prompt(generator, generator.choice([5, 60, 120])) for _ in range(count)]
    got = pair.through_proxy(prompts, at_once=8, max_tokens=2)
    assert not [text for text in got if text.startswith("error")]
    pair.wait_until_free()


def test_nothing_grows(pair: Pair) -> None:
    generator = random.Random(9)
    _run(pair, generator, WARM_UP)
    before = [resources(server) for server in (pair.prefill, pair.decode)]
    _run(pair, generator, REQUESTS)
    after = [resources(server) for server in (pair.prefill, pair.decode)]
    assert pair.decode.metric("vllm:datadist_failed_loads_total") == 0
    for early, late in zip(before, after, strict=True):
        print(early, late)
        assert early.keys() == late.keys()
        for name, then in early.items():
            now = late[name]
            assert now.memory_mib <= then.memory_mib + MEMORY_MIB, name
            assert now.descriptors <= then.descriptors + 2, name
            assert now.threads <= then.threads, name
            assert now.mappings <= then.mappings, name
