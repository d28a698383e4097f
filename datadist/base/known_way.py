"""What core tells a link of a route that it has looked up, for transfers of few blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["KnownCall", "KnownWay"]

KnownCall: TypeAlias = Callable[[object, object, float], float | None]
"""See :meth:`datadist.transport.Link.known_way`: blocks of the peer, ours, and seconds."""


@dataclass(frozen=True)
class KnownWay:
    """Blocks of one of our caches and of a cache of ``rank``, and what must hold for a transfer.

    Block ``b`` of tensor ``t`` is at ``bases[t] + b * stride`` and has ``block_bytes`` bytes, on both
    sides; both have as many tensors. See :meth:`datadist.transport.Link.known_way`.
    """

    rank: int
    write: bool
    """Whether blocks go from us to ``rank``; else from there to us."""
    block_bytes: int
    local_bases: tuple[int, ...]
    """Addresses of our tensors."""
    local_stride: int
    """Bytes from one of our blocks to the next."""
    local_count: int
    """Our blocks in a tensor."""
    remote_bases: tuple[int, ...]
    remote_stride: int
    remote_count: int
    attributes: tuple[tuple[object, str, object], ...]
    """(object, name, value): plain attributes that hold these values, each the same object or an equal
    ``int``."""
    keys: tuple[tuple[Mapping[int, object], int, bool], ...]
    """(dictionary, key, whether the dictionary has the key)."""
