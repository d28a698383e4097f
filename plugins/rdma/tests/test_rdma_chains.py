"""Segments to chains of work requests, and ranges of memory, as vectors."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np
import pytest
from datadist_rdma import chains, verbs
from datadist_rdma.chains import Chain, Segments, chain_length, segments
from datadist_rdma.memory import Outside, Ranges
from hypothesis import example, given
from hypothesis import strategies as st

PIECE = 1000
Triple = tuple[int, int, int]
LOCAL = st.integers(1, 2**62)
TRIPLES = st.lists(st.tuples(LOCAL, LOCAL, st.integers(1, 5 * PIECE)), min_size=1, max_size=50)


def walk(chain: Chain) -> Iterator[tuple[verbs.SendRequest, verbs.ScatterGather]]:
    """What a device sees of a chain."""
    address = chain.address
    while address:
        request = verbs.SendRequest.from_address(address)
        yield request, verbs.ScatterGather.from_address(request.sg_list)
        address = request.next


def vectors(triples: list[Triple]) -> tuple[array[int], array[int], array[int]]:
    local, remote, length = (array("q", column) for column in zip(*triples, strict=True))
    return local, remote, length


@given(TRIPLES)
def test_long_segments_are_split_and_nothing_is_lost(triples: list[Triple]) -> None:
    parts = segments(*vectors(triples), PIECE)
    expected = [
        (local + at, remote + at, min(PIECE, size - at))
        for local, remote, size in triples
        for at in range(0, size, PIECE)
    ]
    assert list(zip(*(v.tolist() for v in parts), strict=True)) == expected


@given(st.integers(1, 3000), st.integers(1, 64), st.sampled_from([0, 4]))
def test_chains_are_what_a_device_can_walk(count: int, length: int, opcode: int) -> None:
    rng = np.random.default_rng(count)
    parts = Segments(*(rng.integers(1, 2**31, count) for _ in range(3)))
    lkeys = rng.integers(0, 2**32, count, np.uint32)
    rkeys = rng.integers(0, 2**32, count, np.uint32)
    number = 0
    for chain in chains.chains(parts, lkeys, rkeys, opcode, length):
        assert chain.first == number
        items = list(walk(chain))
        assert len(items) == chain.end - chain.first <= length
        for request, element in items:
            assert request.wr_id == number
            assert (request.num_sge, request.opcode) == (1, opcode)
            assert (element.addr, element.length) == (parts.local[number], parts.length[number])
            assert (element.lkey, request.rdma.rkey) == (lkeys[number], rkeys[number])
            assert request.rdma.remote_addr == parts.remote[number]
            number += 1
        flags = [request.send_flags for request, _ in items]
        assert flags == [0] * (len(items) - 1) + [verbs.SEND_SIGNALED]
    assert number == count


@pytest.mark.parametrize("count", [1, 2, 4])
def test_few_requests_need_no_vectors(count: int) -> None:
    parts = [(10 + n, 20 + n, 30 + n, 2**32 - 1 - n, 50 + n) for n in range(count)]
    flags = [0] * (count - 1) + [verbs.SEND_SIGNALED]
    for chain in chains.short_chain(parts, verbs.WR_RDMA_READ):
        assert chain[1:] == (0, count)
        seen = [
            (e.addr, r.rdma.remote_addr, e.length, e.lkey, r.rdma.rkey, r.wr_id, r.send_flags)
            for r, e in walk(chain)
        ]
        assert seen == [(*part, n, flags[n]) for n, part in enumerate(parts)]
        assert {(r.opcode, r.num_sge) for r, _ in walk(chain)} == {(verbs.WR_RDMA_READ, 1)}


@pytest.mark.parametrize(("longest", "length"), [(1, 256), (4096, 256), (65536, 16), (1 << 20, 1)])
def test_chains_of_long_requests_are_short(longest: int, length: int) -> None:
    assert chain_length(longest) == length


RANGES = [(1000, 100, 7), (2000, 50, 2**32 - 1), (1100, 10, 9)]


@given(st.integers(900, 2100), st.integers(1, 120))
@example(1000, 100)
@example(1000, 101)
@example(1099, 1)
@example(1099, 2)
@example(1109, 2)
@example(999, 1)
@example(999, 2)
@example(2000, 50)
@example(2000, 51)
@example(2050, 1)
def test_ranges_agree_with_a_loop(address: int, size: int) -> None:
    found = [key for begin, n, key in RANGES if begin <= address and address + size <= begin + n]
    ask = (np.array([1000, address]), np.array([1, size]))
    if found:
        assert Ranges(RANGES).keys(*ask).tolist() == [7, *found]
        assert Ranges(RANGES).key(address, size) == found[0]
    else:
        with pytest.raises(Outside):
            Ranges(RANGES).key(address, size)
        with pytest.raises(Outside) as caught:
            Ranges(RANGES).keys(*ask)
        assert caught.value.index == 1


@pytest.mark.parametrize("address", [0, -1, 2**63 - 1, -(2**63)])
def test_wild_addresses_are_outside(address: int) -> None:
    for ranges in (Ranges(RANGES), Ranges([])):
        with pytest.raises(Outside):
            ranges.keys(np.array([address]), np.array([2**62]))
        with pytest.raises(Outside):
            ranges.key(address, 2**62)
