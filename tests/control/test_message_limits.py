"""What the worst of frames costs: a line, and memory that does not grow with its faults."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from datadist.caches.owned import Layout, OwnCache
from datadist.control import messages
from datadist.control.messages import (
    MAX_CHANGES,
    MAX_KEYS,
    MAX_TENSORS,
    Binding,
    Directory,
    decode,
    encode,
)
from datadist.transport import Placement

SIZE = 4 << 20
ITEMS = (b"[]", b"null", b'{"":0}')
KINDS: dict[str, type[BaseModel]] = {
    model.model_fields["kind"].default: model for model in get_args(messages.Message)
}
FEW = 20_000
"""Elements that are below the limit of a frame, and above that of most lists."""


def _peak(body: bytes) -> tuple[int, str]:
    """Bytes of objects that reading a frame needs, and what is said of it."""
    tracemalloc.start()
    try:
        decode(body)
    except ValueError as error:
        said = str(error)
    else:
        said = ""
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, said


def _lists(kind: str) -> list[str]:
    fields = KINDS[kind].model_fields.items()
    return [name for name, field in fields if "list" in str(field.annotation).lower()]


def _body(kind: str, **fields: bytes) -> bytes:
    given = {"kind": json.dumps(kind).encode(), "seq": b"1", "link": b"1", **fields}
    return b"{%b}" % b",".join(b'"%b":%b' % (n.encode(), v) for n, v in given.items())


LISTS = [(kind, name) for kind in KINDS for name in _lists(kind)]


def test_lists_are_looked_for_where_they_are() -> None:
    assert {("directory", "unbind"), ("offer", "regions"), ("announce", "ranks")} <= set(LISTS)


@pytest.mark.parametrize("item", ITEMS)
@pytest.mark.parametrize(("kind", "name"), LISTS)
def test_wrong_elements_in_great_numbers_cost_little(kind: str, name: str, item: bytes) -> None:
    for count in (FEW, SIZE // (len(item) + 1)):
        peak, said = _peak(_body(kind, **{name: b"[%b]" % b",".join([item] * count)}))
        assert said
        assert len(said) < 400
        assert peak < 30 << 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [500, 60_000])
def test_unknown_members_in_great_numbers_cost_little(kind: str, count: int) -> None:
    members = b",".join(b'"%x":0' % n for n in range(count))
    body = b"%b,%b}" % (_body(kind)[:-1], members)
    peak, said = _peak(body)
    assert said
    assert len(said) < 400
    assert peak < 20 * len(body) + (1 << 20)


@pytest.mark.parametrize("kind", ["ack", "directory", "fail", "offer"])
@pytest.mark.parametrize(
    "value", [b"[" * SIZE, b"9" * SIZE, b'"%b"' % (b"x" * SIZE), b'"%b"' % (b"\\n" * (SIZE // 2))]
)
def test_deep_and_long_values_cost_no_more_than_themselves(kind: str, value: bytes) -> None:
    fields = KINDS[kind].model_fields
    body = _body(kind, **dict.fromkeys(list(fields)[1:2], value), more=value)
    peak, said = _peak(body)
    assert said
    assert len(said) < 400
    assert peak < 12 * len(body)


def test_the_largest_cache_can_be_told() -> None:
    bases = tuple(range(1 << 46, (1 << 46) + MAX_TENSORS))
    layout = Layout(False, bases, 1, MAX_KEYS, MAX_KEYS, Placement.DEVICE, 2)
    cache = OwnCache(1, layout, True, True, tuple(range(MAX_TENSORS)))
    cache.bindings = {
        n: Binding(id=n, slot=n, space="request", key=n, model=0) for n in range(MAX_KEYS)
    }
    message = Directory(seq=1, upsert=[cache.entry()])
    assert decode(encode(message)[4:]) == message


@pytest.mark.parametrize(
    ("change", "limit"),
    [
        ({"remove": [1] * (MAX_CHANGES + 1)}, MAX_CHANGES),
        ({"unbind": [(1, 1)] * (MAX_CHANGES + 1)}, MAX_CHANGES),
    ],
)
def test_more_changes_than_the_limit_are_no_message(change: dict[str, Any], limit: int) -> None:
    body = json.dumps({"kind": "directory", "seq": 1, **change}).encode()
    with pytest.raises(ValueError, match=f"at most {limit} items"):
        decode(body)
