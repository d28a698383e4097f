"""Blobs over exchanges of fixed descriptors, with any peer."""

from __future__ import annotations

from typing import cast

import pytest
from datadist_hccl import abi, blobs
from datadist_hccl.one_sided import Hccl
from hypothesis import given, settings
from hypothesis import strategies as st

from datadist.transport import TransportError


class Peer:
    """A library that receives what a test says, in descriptors of a fixed size."""

    def __init__(self, *answers: list[bytes]) -> None:
        self.answers = list(answers)
        self.sent: list[list[bytes]] = []

    def exchange(
        self, _communicator: int, _own: int, _rank: int, mine: list[bytes], *_: object
    ) -> list[bytes]:
        assert all(len(data) <= abi.BLOB_BYTES for data in mine)
        assert 1 <= len(mine) < blobs.ROOM, "the library writes as many as are sent"
        self.sent.append(mine)
        return [data.ljust(abi.BLOB_BYTES, b"\0") for data in self.answers.pop(0)]


def _swap(data: bytes, *answers: list[bytes]) -> tuple[bytes, list[list[bytes]]]:
    peer = Peer(*answers)
    return blobs.swap(cast("Hccl", peer), 1, 0, 1, data, 1), peer.sent


sizes = st.integers(0, 3000) | st.integers(blobs.MAX_BYTES - 2, blobs.MAX_BYTES)


@settings(deadline=None)
@given(sizes, sizes)
def test_two_ends_understand_each_other(ours: int, theirs: int) -> None:
    mine, other = bytes(n % 251 for n in range(ours)), bytes(n % 241 for n in range(theirs))
    first = blobs.HEADER.pack(blobs.MAGIC, theirs) + other[: blobs.FIRST_BYTES]
    rest = blobs._chunks(other[blobs.FIRST_BYTES :])
    got, sent = _swap(mine, [first], rest)
    assert got == other
    assert len(sent) == (1 if max(ours, theirs) <= blobs.FIRST_BYTES else 2), "as the peer does"


descriptors = st.lists(st.binary(max_size=abi.BLOB_BYTES), max_size=3)
headers = st.builds(
    blobs.HEADER.pack, st.just(blobs.MAGIC) | st.binary(min_size=4, max_size=4),
    st.integers(0, (1 << 32) - 1) | sizes,
)  # fmt: skip


@settings(deadline=None)
@given(descriptors | st.lists(headers, min_size=1, max_size=1), descriptors)
def test_whatever_a_peer_sends_is_taken_or_refused(first: list[bytes], rest: list[bytes]) -> None:
    try:
        got, _ = _swap(b"mine", first, rest)
    except TransportError:
        return
    assert len(got) <= blobs.MAX_BYTES
    assert len(got) == blobs.HEADER.unpack_from(first[0].ljust(8, b"\0"))[1]


def test_too_much_is_not_sent() -> None:
    with pytest.raises(TransportError, match="65537 bytes are too many to exchange: at most 65536"):
        _swap(b"x" * (blobs.MAX_BYTES + 1))
