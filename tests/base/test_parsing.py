"""JSON of others costs what is bounded, whatever is in it (parsing.py)."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from typing import Annotated

import pytest
from pydantic import BaseModel, ConfigDict, Field

from datadist.base.parsing import MAX_MEMBERS, SMALL, parse


class _Inner(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    number: int


class _Outer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    numbers: Annotated[list[int], Field(fail_fast=True)] = []
    inner: Annotated[list[_Inner], Field(fail_fast=True)] = []


def _parse(text: bytes, most: int = 10_000) -> _Outer:
    return parse(text, most, _Outer.model_validate_json)


def _list(name: str, item: bytes, count: int) -> bytes:
    return b'{"%b":[%b]}' % (name.encode(), b",".join([item] * count))


def test_what_is_right_comes_through() -> None:
    assert _parse(_list("numbers", b"1", 9_990)).numbers == [1] * 9_990
    assert _parse(_list("inner", b'{"number":2}', 1000)).inner[-1].number == 2


@pytest.mark.parametrize("item", [b"1", b"[]", b"{}"])
def test_too_many_elements_are_refused_whatever_they_are(item: bytes) -> None:
    with pytest.raises(ValueError, match="elements, more than 10000"):
        _parse(_list("numbers", item, 10_001))


@pytest.mark.parametrize("depth", [0, 1])
def test_an_object_of_many_members_is_refused(depth: int) -> None:
    members = b",".join(b'"%d":0' % n for n in range(SMALL))
    text = b'{"inner":[{%b}]}' % members if depth else b"{%b}" % members
    with pytest.raises(ValueError, match=f"{SMALL} members, more than {MAX_MEMBERS}"):
        _parse(text)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (_list("numbers", b'"x"', 5000), "numbers.0"),
        (_list("inner", b"{}", 4000), "inner.0.number"),
        (b'{"numbers":[%b' % (b"[" * 5000), "text: Invalid JSON: recursion"),
        (b'{"numbers":[%b]}' % (b"9" * 5000), "text: Invalid JSON: number out of range"),
        (b'{"%b":1}' % (b"n" * 100_000), "nnnn"),
        (b"\xff" * 5000, "text: Invalid JSON"),
    ],
)
def test_a_fault_is_one_short_line(text: bytes, place: str) -> None:
    with pytest.raises(ValueError, match=place) as caught:
        _parse(text)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.fixture
def peak() -> Iterator[Callable[[], int]]:
    """Most bytes of Python objects so far."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


def test_faults_in_great_numbers_take_no_memory(peak: Callable[[], int]) -> None:
    with pytest.raises(ValueError, match=r"numbers\.0"):
        _parse(_list("numbers", b'"x"', 9_990))
    assert peak() < 1 << 20
