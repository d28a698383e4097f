"""Which ranks of the other instance a tensor-parallel rank reads, and which part of each block."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """How an instance splits its KV cache over its ranks."""

    ranks: int
    """Tensor-parallel ranks."""
    shards: int
    """How many different ones there are: all ranks of MLA have the same, and KV heads may be fewer."""
    parts: int
    """In how many tensors each block is granted."""


@dataclass(frozen=True)
class Piece:
    """Parts of the blocks of one remote rank, and where they go in the local blocks."""

    rank: int
    remote_parts: range
    local_parts: range
    local_split: int
    """In how many parts a local block is divided for this."""


def pieces_of(rank: int, here: Split, there: Split) -> list[Piece]:
    """What ``rank`` reads. Raises ``ValueError`` where the splits do not fit each other."""
    if max(here.shards, there.shards) % min(here.shards, there.shards):
        raise ValueError(
            f"{there.shards} shards of the KV cache there do not fit {here.shards} here"
        )
    shard = rank * here.shards // here.ranks
    if there.shards >= here.shards:
        return _several(rank, shard, here, there)
    ratio = here.shards // there.shards
    if there.parts % ratio:
        raise ValueError(
            f"its blocks are granted in {there.parts} parts, and {here.ranks} ranks here need {ratio}: "
            f'start it with "peer_tensor_parallel_size": {here.ranks} in kv_connector_extra_config'
        )
    width = there.parts // ratio
    begin = shard % ratio * width
    remote = _replica(rank, shard // ratio, there)
    return [Piece(remote, range(begin, begin + width), range(width), width)]


def _several(rank: int, shard: int, here: Split, there: Split) -> list[Piece]:
    """All of one remote shard, or of several, which lie side by side here."""
    ratio = there.shards // here.shards
    split = ratio * there.parts
    return [
        Piece(
            _replica(rank, shard * ratio + place, there),
            range(there.parts),
            range(place * there.parts, (place + 1) * there.parts),
            split,
        )
        for place in range(ratio)
    ]


def _replica(rank: int, shard: int, there: Split) -> int:
    """One of the remote ranks that have the shard; the ranks here are spread over them."""
    copies = there.ranks // there.shards
    return shard * copies + rank % copies


def readers_of(rank: int, here: Split, reader_ranks: int, reader_shards: int) -> int:
    """How many ranks of a reading instance read this rank; 0 where it is a replica that none needs."""
    readers = Split(reader_ranks, reader_shards, 1)
    wide = Split(here.ranks, here.shards, max(here.parts, reader_shards))
    return sum(
        piece.rank == rank
        for each in range(reader_ranks)
        for piece in pieces_of(each, readers, wide)
    )
