"""Small caches and long queues: vLLM preempts requests, leases are renewed, and tokens are right."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness.models import prompt
from harness.pair import Pair
from harness.servers import abandon

FAILED = "vllm:datadist_failed_loads_total"
LAPSED = "vllm:datadist_lapsed_grants_total"
PREEMPTED = "vllm:num_preemptions_total"
RUNNING = "vllm:num_requests_running"
LEASE = 4.0


def test_preempted_requests(directory: Path) -> None:
    """The decoder's cache has room for the prompts that it takes, and not for what they grow to."""
    generator = random.Random(41)
    prompts = [prompt(generator, generator.choice([250, 300, 350])) for _ in range(16)]
    arguments = ("--num-gpu-blocks-override", "48")
    with Pair("gqa", directory, {"lease_seconds": 20.0}, arguments=arguments) as pair:
        got = pair.through_proxy(prompts, at_once=16, max_tokens=350)
        assert pair.decode.metric(PREEMPTED) > 0
        assert pair.transferred() > 0
        assert pair.decode.metric(FAILED) == 0
        assert pair.prefill.metric(LAPSED) == 0
        pair.wait_until_free()
        assert got == pair.alone(prompts, max_tokens=350)


def test_a_lease_is_renewed_while_the_request_waits(directory: Path) -> None:
    """The decoder takes one request at a time; the prefiller's lease counts, not its own."""
    generator = random.Random(42)
    words = prompt(generator, 100)
    place = directory / "queue"
    place.mkdir()
    with Pair(
        "gqa", place, {"lease_seconds": LEASE}, {"lease_seconds": 600.0},
        decode_arguments=("--max-num-seqs", "1"),
    ) as pair, ThreadPoolExecutor(2) as threads:  # fmt: skip
        body = {"prompt": prompt(generator, 10), "max_tokens": 3900}
        first = threads.submit(abandon, pair.decode.url, body, 2.5 * LEASE)
        while not pair.decode.metric(RUNNING):
            time.sleep(0.1)
        second = threads.submit(pair.decoded, words, pair.prefilled(words))
        first.result()
        assert not second.done(), "the first request has ended too soon to make the second one wait"
        answer = second.result()
        assert pair.prefill.metric(LAPSED) == 0
        assert pair.decode.metric(FAILED) == 0
        assert pair.transferred() > 0
        pair.wait_until_free()
        assert [answer["choices"][0]["text"]] == pair.alone([words])
