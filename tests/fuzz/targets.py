"""What is fuzzed: each target takes bytes and must end in a documented way, whatever they are.

A target returns whether the input was accepted. It raises nothing but for a defect.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from pydantic import ValidationError

from datadist.control.messages import HEADER, decode, encode
from datadist.engine.options import EngineOptions
from datadist.rank_table import RankTableError, parse_rank_table
from datadist.status import LLMException
from datadist.transport import LinkError, Offer, Peer
from datadist.types import LLMRole
from tests.fuzz.dispatch import dispatch
from tests.fuzz.handshakes import handshake
from tests.fuzz.network import network


def message(data: bytes) -> bool:
    """The body of a frame; what is accepted must survive the way back."""
    try:
        found = decode(data)
    except ValueError:
        return False
    again = decode(encode(found)[HEADER.size :])
    assert again == found, (found, again)
    return True


def rank_table(data: bytes) -> bool:
    """The text of a rank table; what is accepted has a canonical form that means the same."""
    try:
        table = parse_rank_table(data.decode(errors="surrogateescape"))
    except RankTableError:
        return False
    again = parse_rank_table(table.canonical)
    assert again.canonical == table.canonical
    table.check_ranks([0, 1])
    return True


def options(data: bytes) -> bool:
    """Options of init, as JSON of text by text or as lines of key=value."""
    given = {"llm.EnableCacheManager": "1", **_pairs(data)}
    try:
        EngineOptions.parse(given, LLMRole.MIX, {})
    except (LLMException, TypeError, ValueError, ModuleNotFoundError):
        return False
    return True


def pool_config(data: bytes) -> bool:
    """The configuration of a pool."""
    given = {
        "llm.EnableCacheManager": "1",
        "llm.MemPoolConfig": data.decode(errors="replace"),
    }
    try:
        parsed = EngineOptions.parse(given, LLMRole.MIX, {})
    except LLMException:
        return False
    assert parsed.device_pool is not None
    assert parsed.device_pool.memory_size > 0
    assert 10 <= parsed.device_pool.page_shift <= 30
    return True


def shm_offer(data: bytes) -> bool:
    """The offer of a peer over shm; what is accepted has regions that do not overlap."""
    from datadist_shm.offer import parse_offer

    descriptors = data[0] % 4 if data else 0
    try:
        offer = parse_offer(1, data[1:], descriptors)
    except LinkError:
        return False
    _check_apart([(region.address, region.size) for region in offer.regions])
    return True


def rdma_offer(data: bytes) -> bool:
    """The offer of a peer over RDMA; as :func:`shm_offer`."""
    from datadist_rdma.offer import parse_offer

    try:
        offer = parse_offer(1, data)
    except LinkError:
        return False
    _check_apart([(region.address, region.size) for region in offer.regions])
    return True


def hccl_offer(data: bytes) -> bool:
    """The offer of a peer over HCCL, up to the windows that segments are compared with."""
    from datadist_hccl.offer import parse_offer
    from datadist_hccl.path import Path

    path = Path(Peer(1, ""))
    try:
        path.offered = parse_offer(1, Offer(data))
    except LinkError:
        return False
    path.rdma = False
    path.settle()
    _check_apart([(region.address, region.size) for region in path.offered.regions])
    return True


def _check_apart(regions: list[tuple[int, int]]) -> None:
    end = 0
    for address, size in sorted(regions):
        assert address >= end
        assert size > 0
        end = address + size


def member_record(data: bytes) -> bool:
    """What a member says that the transport's library brought together with us."""
    from datadist.links.member_record import MemberRecord

    try:
        said = MemberRecord.model_validate_json(data)
    except ValidationError:
        return False
    assert MemberRecord.model_validate_json(said.model_dump_json()) == said
    return True


def frames(data: bytes) -> bool:
    """A stream of frames as a session cuts it: lengths are limited, nothing is kept beyond them."""
    from datadist.control.messages import MAX_FRAME

    at = 0
    while len(data) - at >= HEADER.size:
        (size,) = struct.unpack_from(">I", data, at)
        if size > MAX_FRAME or len(data) - at - HEADER.size < size:
            return False
        if not message(data[at + HEADER.size : at + HEADER.size + size]):
            return False
        at += HEADER.size + size
    return True


def _pairs(data: bytes) -> dict[str, str]:
    text = data.decode(errors="surrogateescape")
    try:
        found = json.loads(text)
        if isinstance(found, dict):
            return {str(key): value for key, value in found.items()}
    except (ValueError, RecursionError):
        pass
    return dict(line.split("=", 1) for line in text.split("\n") if "=" in line)


TARGETS: dict[str, Callable[[bytes], bool]] = {
    "message": message,
    "frames": frames,
    "rank_table": rank_table,
    "options": options,
    "pool_config": pool_config,
    "shm_offer": shm_offer,
    "rdma_offer": rdma_offer,
    "hccl_offer": hccl_offer,
    "member_record": member_record,
    "handshake": handshake,
}

LIVE: dict[str, Callable[[], AbstractContextManager[Callable[[bytes], bool]]]] = {
    "dispatch": dispatch,
    "network": network,
}
"""Targets with something that runs behind them, while the context lasts."""

NAMES = [*TARGETS, *LIVE]


def opened(name: str) -> AbstractContextManager[Callable[[bytes], bool]]:
    """A target of either sort."""
    return LIVE[name]() if name in LIVE else nullcontext(TARGETS[name])
