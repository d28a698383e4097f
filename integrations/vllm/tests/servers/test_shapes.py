"""Models and caches of several shapes: tokens are those of one instance, and are transferred."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from harness.models import prompt
from harness.pair import Pair

TP2 = ("--tensor-parallel-size", "2")
PATIENT = {"lease_seconds": 300.0, "link_seconds": 60.0, "pull_seconds": 120.0}
"""On two processors the first step of two ranks takes longer than the usual lease."""
PEER2 = {"peer_tensor_parallel_size": 2, **PATIENT}
CPU_MLA = (
    "--attention-backend", "CPU_MLA", "--block-size", "16", "--no-enable-prefix-caching",
    "--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096",
)  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "windows": {"kind": "windows"},
    "mla": {"kind": "mla", "arguments": CPU_MLA},
    "mla by amx": {"kind": "mla", "arguments": ("--dtype", "bfloat16")},
    "bf16": {"kind": "gqa", "arguments": ("--dtype", "bfloat16")},
    "fp8": {"kind": "gqa", "arguments": ("--dtype", "bfloat16", "--kv-cache-dtype", "fp8")},
    "registered": {"kind": "gqa", "extra": {"pool": False}},
    "tp 2 to 2": {"kind": "gqa", "arguments": TP2, "extra": PATIENT},
    "tp 2 to 1": {"kind": "gqa", "prefill_arguments": TP2, "extra": PATIENT},
    "tp 1 to 2": {"kind": "gqa", "decode_arguments": TP2, "extra": PEER2},
}  # fmt: skip

NEEDED = {"bf16": "avx512_bf16", "fp8": "avx512_bf16", "mla by amx": "amx_tile"}
"""Flags of the processor that vLLM's kernels need; without them a server ends with SIGILL."""

ROUGH = ("mla", "mla by amx", "bf16", "fp8")
"""vLLM's kernels that prefill and those that decode round differently there, so that one instance alone
differs from itself: the last prompt token is computed by the one or by the other. The first token is
compared then, and some may differ; of wrong blocks nearly all do."""


@pytest.mark.parametrize("shape", SHAPES)
def test_shape(shape: str, directory: Path) -> None:
    flag = NEEDED.get(shape)
    if flag is not None and flag not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip(f"vLLM's kernels for it need a processor with {flag}")
    generator = random.Random(3)
    lengths = [3, 40, 51, 103, 205, 400, 700, 1000]
    prompts = [prompt(generator, length) for length in lengths]
    place = directory / shape.replace(" ", "-")
    place.mkdir()
    with Pair(directory=place, **SHAPES[shape]) as pair:
        length = 1 if shape in ROUGH else 16
        got = pair.through_proxy(prompts, at_once=4, max_tokens=length)
        assert pair.transferred() > 0
        # With windows the prefiller leaves the last token of each prompt.
        assert pair.computed() == (len(prompts) if shape == "windows" else 0)
        assert pair.decode.metric("vllm:datadist_failed_loads_total") == 0
        pair.wait_until_free()
        alone = pair.alone(prompts, max_tokens=length)
        if shape not in ROUGH:
            assert got == alone
        equal = sum(one == other for one, other in zip(got, alone, strict=True))
        assert equal >= len(prompts) - 2, (got, alone)
