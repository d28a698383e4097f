"""The cache groups of a model: which blocks of a request hold the tokens that attention still needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    iter_layer_specs,
)

WHOLE = (FullAttentionSpec, MLAAttentionSpec)
"""Kinds that keep all tokens. Classes derived from these do not: each kind is named here."""


@dataclass(frozen=True)
class Group:
    """One cache group; ``window`` is None where attention needs all tokens."""

    kind: str
    block_size: int
    window: int | None

    def span(self, tokens: int) -> range:
        """The indices of the blocks that are needed once ``tokens`` are computed, as vLLM keeps them."""
        skipped = 0 if self.window is None else max(0, tokens - self.window + 1)
        return range(skipped // self.block_size, -(-tokens // self.block_size))


class Groups(tuple[Group, ...]):
    """All cache groups of a model."""

    @property
    def have_windows(self) -> bool:
        """Whether blocks at the begin of a long request are freed while it lives."""
        return any(group.window is not None for group in self)

    def needed(self, block_ids: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """The blocks of each group that a reader of ``tokens`` needs."""
        return [
            [ids[index] for index in group.span(tokens)]
            for group, ids in zip(self, block_ids, strict=True)
        ]


def groups_of(config: KVCacheConfig) -> Groups:
    """Raise ``NotImplementedError`` for a model whose cache cannot be transferred."""
    groups = Groups(_group(each) for each in config.kv_cache_groups)
    sizes = {group.kind: group.block_size for group in groups}
    if len({group.block_size for group in groups}) > 1:
        raise NotImplementedError(
            "DataDistConnector cannot transfer cache groups whose blocks have different sizes: in tokens "
            f"{sizes}. Serve this model with one --block-size for all layers, or without a KV connector"
        )
    return groups


def _group(group: KVCacheGroupSpec) -> Group:
    if group.host_resident or not group.enable_kv_transfer:
        raise _refused(group, "held apart from the cache that vLLM lets connectors transfer")
    specs = list(iter_layer_specs(group.kv_cache_spec))
    for spec in specs:
        _check_kind(group, spec)
    window = specs[0].sliding_window if isinstance(specs[0], SlidingWindowSpec) else None
    return Group(type(specs[0]).__name__, group.kv_cache_spec.block_size, window)


def _check_kind(group: KVCacheGroupSpec, spec: KVCacheSpec) -> None:
    kind = type(spec)
    if kind is SlidingWindowSpec:
        if spec.extra_retained_tokens:
            raise _refused(
                group,
                f"{kind.__name__} with {spec.extra_retained_tokens} tokens retained for "
                "speculative decoding",
            )
    elif kind not in WHOLE:
        raise _refused(group, kind.__name__)


def _refused(group: KVCacheGroupSpec, what: str) -> NotImplementedError:
    return NotImplementedError(
        f"DataDistConnector cannot transfer the cache of layer {group.layer_names[0]!r}: it is {what}. "
        "It transfers full attention, MLA and sliding windows; serve this model without a KV connector"
    )
