"""Small caches and long queues: vLLM preempts requests, leases are renewed, and tokens are right."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from harness.models import prompt
from harness.pair import Pair

FAILED = "vllm:datadist_failed_loads_total"
LAPSED = "vllm:datadist_lapsed_grants_total"
PREEMPTED = "vllm:num_preemptions_total"
WAITED = "vllm:request_queue_time_seconds"
LEASE = 5.0


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


@pytest.mark.parametrize("decoders_lease", [LEASE, 600.0])
def test_leases_are_renewed_in_a_long_queue(decoders_lease: float, directory: Path) -> None:
    """The decoder takes one request at a time; the prefiller's lease counts, not its own."""
    generator = random.Random(42)
    prompts = [prompt(generator, 100) for _ in range(8)]
    place = directory / f"queue-{decoders_lease:.0f}"
    place.mkdir()
    with Pair(
        "gqa", place, {"lease_seconds": LEASE}, {"lease_seconds": decoders_lease},
        decode_arguments=("--max-num-seqs", "1"),
    ) as pair:  # fmt: skip
        got = pair.through_proxy(prompts, at_once=len(prompts), max_tokens=700)
        waited = pair.decode.metric(WAITED + "_count") - pair.decode.metric(
            WAITED + "_bucket", le="10.0"
        )
        assert waited >= 1, "make the answers longer: no request waited for two leases"
        assert pair.prefill.metric(LAPSED) == 0
        assert pair.decode.metric(FAILED) == 0
        assert pair.computed() == 0
        pair.wait_until_free()
        assert got == pair.alone(prompts, max_tokens=700)
