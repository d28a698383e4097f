"""The cache groups of a model: which blocks of a request hold the tokens that attention still needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)


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
    return Groups(_group(each.kv_cache_spec, each.layer_names) for each in config.kv_cache_groups)


def _group(spec: KVCacheSpec, layers: Sequence[str]) -> Group:
    one = (
        next(iter(spec.kv_cache_specs.values()))
        if isinstance(spec, UniformTypeKVCacheSpecs)
        else spec
    )
    kind = type(one).__name__
    if isinstance(one, SlidingWindowSpec):
        if one.extra_retained_tokens:
            raise _refused(kind, "with tokens retained for speculative decoding", layers)
        return Group(kind, spec.block_size, one.sliding_window)
    if isinstance(one, FullAttentionSpec):
        return Group(kind, spec.block_size, None)
    raise _refused(kind, "", layers)


def _refused(kind: str, detail: str, layers: Sequence[str]) -> NotImplementedError:
    return NotImplementedError(
        f"DataDistConnector cannot transfer the cache of layer {layers[0]!r}: its kind is {kind} {detail}"
        ". It transfers full attention, MLA and sliding windows; serve this model without a KV connector"
    )
