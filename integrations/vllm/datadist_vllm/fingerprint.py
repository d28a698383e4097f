"""What two instances must have in common, told to each other when they link."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vllm import __version__ as vllm_version
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    iter_layer_specs,
)

from datadist_vllm.groups import groups_of
from datadist_vllm.parameters import PROTOCOL

SHARED = "must agree"
OWN = "may differ"


def fingerprint(config: VllmConfig, kv_cache: KVCacheConfig) -> dict[str, Any]:
    """By name, each as plain text and numbers; without what a tensor-parallel rank has of its own."""
    model, cache = config.model_config, config.cache_config
    return {
        "connector protocol": PROTOCOL,
        "platform": current_platform.device_type,
        "vLLM version": vllm_version,
        "model": str(model.model),
        "model revision": str(model.revision),
        "dtype": str(model.dtype),
        "KV cache dtype": str(cache.cache_dtype),
        "KV cache layout": str(kv_cache.kv_cache_layout),
        "layers": model.get_total_num_hidden_layers(),
        "KV heads": model.get_total_num_kv_heads(),
        "head size": model.get_head_size(),
        "MLA": bool(model.use_mla),
        "cache groups": [[g.kind, g.block_size, g.window] for g in groups_of(kv_cache)],
        "cells": sorted(
            {
                _cell(spec)
                for group in kv_cache.kv_cache_groups
                for spec in iter_layer_specs(group.kv_cache_spec)
            }
        ),
    }


def _cell(spec: KVCacheSpec) -> str:
    """What one token of one head takes in a block."""
    if isinstance(spec, AttentionSpec):
        return (
            f"{spec.dtype}, {spec.state_content_size_bytes} bytes, {spec.tokens_per_state} tokens"
        )
    return f"{spec.page_size_bytes} bytes a block"


def encode(shared: Mapping[str, Any], own: Mapping[str, Any]) -> bytes:
    """As metadata of a link."""
    return json.dumps({SHARED: shared, OWN: own}).encode()


def decode(metadata: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """What must agree, and the rest. Raises ``ValueError`` for what no connector sent."""
    try:
        value = json.loads(metadata)
        shared, own = value[SHARED], value[OWN]
    except (ValueError, KeyError, TypeError):
        raise ValueError("it is linked, but by a program that is no DataDistConnector") from None
    if not isinstance(shared, dict) or not isinstance(own, dict):
        raise ValueError("its metadata is damaged")
    return shared, own


def difference(here: Mapping[str, Any], there: Mapping[str, Any]) -> str | None:
    """The first thing that differs, or None."""
    for name in (*here, *(name for name in there if name not in here)):
        if here.get(name) != there.get(name):
            return f"{name} is {here.get(name)!r} here and {there.get(name)!r} there"
    return None
