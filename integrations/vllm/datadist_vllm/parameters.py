"""The ``kv_transfer_params`` of a request: what a prefiller answers and a decoder is given.

The names are those of NixlConnector, so that proxies and routers written for it work. What this
connector needs besides is under ``datadist``. A decoder gets them from its client, so each value is
checked here.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_RANKS = 1024
MAX_BLOCKS = 131_072
PROTOCOL = 1


@dataclass(frozen=True)
class RankAddress:
    """Where the engine of one worker listens."""

    cluster: int
    host: str
    port: int


@dataclass(frozen=True)
class Source:
    """Blocks of a request that an instance has computed and granted."""

    engine_id: str
    request_id: str
    key: int
    """Of the grants, at every rank."""
    ranks: tuple[RankAddress, ...]
    blocks: tuple[int, ...]
    """How many blocks are granted, by cache group: the last ones of the computed tokens."""
    tokens: int
    """How many tokens are in them, from the begin of the prompt."""
    digest: str
    """Of these tokens."""
    lease_seconds: float
    """How long the blocks are kept unless the lease is renewed."""


def digest_of(tokens: Sequence[int]) -> str:
    """Tells whether two prompts begin with the same tokens."""
    return hashlib.blake2b(array("q", tokens).tobytes(), digest_size=16).hexdigest()


def answer_of(
    source: Source, block_ids: Sequence[Sequence[int]], prefilled: bool
) -> dict[str, Any]:
    """The parameters of an answer. Numbers above 2**53 are text: not every proxy keeps such integers."""
    first = source.ranks[0]
    return {
        "do_remote_prefill": prefilled,
        "do_remote_decode": not prefilled,
        "remote_block_ids": [list(group) for group in block_ids],
        "remote_engine_id": source.engine_id,
        "remote_request_id": source.request_id,
        "remote_host": first.host,
        "remote_port": first.port,
        "tp_size": len(source.ranks),
        "remote_num_tokens": source.tokens,
        "transfer_mode": "pull",
        "datadist": {
            "protocol": PROTOCOL,
            "key": str(source.key),
            "ranks": [[str(each.cluster), each.host, each.port] for each in source.ranks],
            "digest": source.digest,
            "lease_seconds": source.lease_seconds,
        },
    }


def source_of(params: dict[str, Any]) -> Source:
    """What the parameters of a request name. Raises ``ValueError``, which says what is wrong."""
    own = params.get("datadist")
    if not isinstance(own, dict):
        raise ValueError("they have no object 'datadist': were they made by another connector?")
    if own.get("protocol") != PROTOCOL:
        raise ValueError(
            f"'protocol' is {own.get('protocol')!r}, and this instance speaks {PROTOCOL}"
        )
    ranks = own.get("ranks")
    if not isinstance(ranks, list) or not 0 < len(ranks) <= MAX_RANKS:
        raise ValueError("'ranks' is no list of 1 to 1024 addresses")
    return Source(
        engine_id=_text(params, "remote_engine_id"),
        request_id=_text(params, "remote_request_id"),
        key=_number("key", own.get("key")),
        ranks=tuple(_rank(each) for each in ranks),
        blocks=_block_counts(params.get("remote_block_ids")),
        tokens=_count("remote_num_tokens", params.get("remote_num_tokens")),
        digest=_text(own, "digest"),
        lease_seconds=_seconds("lease_seconds", own.get("lease_seconds")),
    )


def _rank(value: object) -> RankAddress:
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError(f"the rank {value!r} is not [cluster, host, port]")
    cluster, host, port = value
    if not isinstance(host, str) or type(port) is not int or not 0 < port < 65536:
        raise ValueError(f"the address {host!r}, port {port!r} is none")
    return RankAddress(_number("cluster", cluster), host, port)


def _block_counts(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(isinstance(group, list) for group in value):
        raise ValueError("'remote_block_ids' is no list of lists")
    counts = tuple(len(group) for group in value)
    if not 0 < sum(counts) <= MAX_BLOCKS:
        raise ValueError(f"'remote_block_ids' has {sum(counts)} blocks, expected 1 to {MAX_BLOCKS}")
    return counts


def _text(params: dict[str, Any], name: str) -> str:
    value = params.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= 1024:
        raise ValueError(f"{name!r} is {value!r:.100}, expected a text")
    return value


def _number(name: str, value: object) -> int:
    if not isinstance(value, str) or not (value.isascii() and value.isdigit()) or len(value) > 20:
        raise ValueError(f"{name!r} is {value!r:.100}, expected a number as text")
    number = int(value)
    if not number < 2**64:
        raise ValueError(f"{name!r} is {number}, expected less than 2**64")
    return number


def _count(name: str, value: object) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"{name!r} is {value!r:.100}, expected a positive integer")
    return value


def _seconds(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 86_400:
        raise ValueError(f"{name!r} is {value!r:.100}, expected seconds above 0, up to 86400")
    return float(value)
