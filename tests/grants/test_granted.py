"""Tokens: what is encoded is decoded, and nothing else is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datadist.caches.directory import KeyName
from datadist.grants.granted import MAX_BLOCKS, MAX_TOKEN, Granted

UINT64 = st.integers(0, 2**64 - 1)
GRANTED = st.builds(
    Granted,
    UINT64,
    st.binary(min_size=16, max_size=16).map(bytes.hex),
    st.integers(1, 2**62).map(lambda n: 2 * n),
    st.integers(0, 2**60 - 1).map(lambda n: 8 * n),
    UINT64,
    UINT64,
    st.builds(KeyName, st.sampled_from(["request", "prefix"]), UINT64, UINT64),
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=100).map(
        lambda blocks: np.array(blocks, np.int64)
    ),
)


@given(GRANTED)
def test_a_token_says_what_was_granted(granted: Granted) -> None:
    read = Granted.decode(granted.encode())
    for name in (
        "cluster",
        "incarnation",
        "generation",
        "word_address",
        "word_region",
        "cache_id",
        "name",
    ):
        assert getattr(read, name) == getattr(granted, name)
    assert read.blocks.tolist() == granted.blocks.tolist()
    assert read.encode() == granted.encode()


@given(GRANTED, st.data())
def test_a_damaged_token_is_refused(granted: Granted, data: st.DataObject) -> None:
    token = granted.encode()
    place = data.draw(st.integers(0, len(token) - 1))
    bit = 1 << data.draw(st.integers(0, 7))
    changed = token[:place] + bytes([token[place] ^ bit]) + token[place + 1 :]
    cut = token[: data.draw(st.integers(0, len(token) - 1))]
    for damaged in (changed, cut, token + b"\0", token[1:]):
        with pytest.raises(ValueError, match="token"):
            Granted.decode(damaged)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"no token of a grant|damaged"):
        Granted.decode(b"ddg1" + data)
    with pytest.raises(ValueError, match="no token of a grant"):
        Granted.decode(data)


NAME = KeyName("request", 1, 0)


@pytest.mark.parametrize(
    ("generation", "word", "blocks"),
    [(0, 8, [1]), (3, 8, [1]), (2, 9, [1]), (2, 1 << 63, [1]), (2, 8, [])],
)
def test_numbers_that_no_grant_has_are_refused(
    generation: int, word: int, blocks: list[int]
) -> None:
    array = np.array(blocks, np.int64)
    token = Granted(1, "0" * 32, generation, word, 1, 1, NAME, array).encode()
    with pytest.raises(ValueError, match="numbers that no grant has"):
        Granted.decode(token)


def test_the_largest_token_fits_an_answer() -> None:
    granted = Granted(1, "0" * 32, 2, 8, 1, 1, NAME, np.zeros(MAX_BLOCKS, np.int64))
    assert len(granted.encode()) == MAX_TOKEN < 1 << 20
    more = Granted(1, "0" * 32, 2, 8, 1, 1, NAME, np.zeros(MAX_BLOCKS + 1, np.int64))
    with pytest.raises(ValueError, match="numbers that no grant has"):
        Granted.decode(more.encode())
