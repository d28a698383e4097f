"""What cannot work is refused at start: by name, with the value and what to do instead."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from datadist_vllm.connector import _check_parallel
from datadist_vllm.engine import WorkerEngine
from datadist_vllm.fingerprint import difference
from datadist_vllm.groups import groups_of
from datadist_vllm.settings import Settings
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    RSWASpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from datadist import LLMException

pytestmark = pytest.mark.quick
ATTENTION: dict[str, Any] = {"num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
WHOLE = FullAttentionSpec(block_size=128, **ATTENTION)
WINDOW = SlidingWindowSpec(block_size=128, sliding_window=256, **ATTENTION)
LATENT = MLAAttentionSpec(block_size=128, **ATTENTION)


def _config(*specs: KVCacheSpec, **more: Any) -> Any:
    groups = [KVCacheGroupSpec([f"layer {n}"], spec, **more) for n, spec in enumerate(specs)]
    return SimpleNamespace(kv_cache_groups=groups)


def test_kinds_that_are_transferred() -> None:
    both = UniformTypeKVCacheSpecs(block_size=128, kv_cache_specs={"a": WHOLE, "b": WHOLE})
    groups = groups_of(_config(WHOLE, WINDOW, LATENT, both))
    assert [(group.kind, group.window) for group in groups] == [
        ("FullAttentionSpec", None),
        ("SlidingWindowSpec", 256),
        ("MLAAttentionSpec", None),
        ("FullAttentionSpec", None),
    ]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (MambaSpec(128, shapes=((4, 4),), dtypes=(torch.float32,)), "it is MambaSpec"),
        (
            ChunkedLocalAttentionSpec(block_size=128, attention_chunk_size=64, **ATTENTION),
            "it is ChunkedLocalAttentionSpec",
        ),
        (RSWASpec(block_size=128, rswa_window=64, **ATTENTION), "it is RSWASpec"),
        (
            SlidingWindowSpec(
                block_size=128, sliding_window=256, extra_retained_tokens=3, **ATTENTION
            ),
            "3 tokens retained for speculative decoding",
        ),
    ],
)
def test_other_kinds_are_refused(spec: KVCacheSpec, text: str) -> None:
    inner = UniformTypeKVCacheSpecs(block_size=128, kv_cache_specs={"a": WHOLE, "b": spec})
    for each in (spec, inner):
        with pytest.raises(NotImplementedError) as refusal:
            groups_of(_config(WHOLE, each))
        assert text in str(refusal.value)
        assert "layer 'layer 1'" in str(refusal.value)
        assert "serve this model without a KV connector" in str(refusal.value)


def test_blocks_of_different_sizes_are_refused() -> None:
    small = SlidingWindowSpec(block_size=64, sliding_window=256, **ATTENTION)
    text = "'FullAttentionSpec': 128, 'SlidingWindowSpec': 64"
    with pytest.raises(NotImplementedError, match=f"{text}.*one --block-size"):
        groups_of(_config(WHOLE, small))


@pytest.mark.parametrize("more", [{"host_resident": True}, {"enable_kv_transfer": False}])
def test_groups_that_vllm_keeps_apart_are_refused(more: dict[str, bool]) -> None:
    with pytest.raises(NotImplementedError, match="held apart"):
        groups_of(_config(WHOLE, **more))


@pytest.mark.parametrize(
    "name",
    ["pipeline_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size"],
)
def test_ways_of_splitting_a_model_are_refused(name: str) -> None:
    sizes = dict.fromkeys(
        ("pipeline_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size"),
        1,
    )
    config: Any = SimpleNamespace(parallel_config=SimpleNamespace(**sizes | {name: 2}))
    with pytest.raises(NotImplementedError, match=f"{name} = 2: use 1"):
        _check_parallel(config)


def test_an_engine_that_cannot_start_says_why() -> None:
    engine = WorkerEngine(Settings(backend="shn"), b"{}")
    with pytest.raises(LLMException, match="shn"):
        engine.start()


def test_the_first_difference_is_named() -> None:
    here = {"model": "m", "KV cache layout": "LBHNC", "heads": 2}
    there = here | {"KV cache layout": "LHBNC", "heads": 4}
    assert difference(here, there) == "KV cache layout is 'LBHNC' here and 'LHBNC' there"
    assert difference(here, dict(here)) is None
    assert difference(here, here | {"new": 1}) == "new is None here and 1 there"
