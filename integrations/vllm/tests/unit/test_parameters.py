"""The parameters of requests: what one instance answers, another one understands; damage is named."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from datadist_vllm.parameters import RankAddress, Source, answer_of, digest_of, source_of

SOURCE = Source(
    "engine",
    "request",
    2**64 - 1,
    (RankAddress(2**63 + 1, "127.0.0.1", 4711),),
    (2, 1),
    130,
    "d",
    8.5,
)


def _params() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(json.dumps(answer_of(SOURCE, [[5, 6], [7]], prefilled=True)))
    return value


def test_an_answer_is_understood() -> None:
    assert source_of(_params()) == SOURCE
    assert _params()["do_remote_prefill"] is True


def test_numbers_are_kept_by_proxies_that_have_no_integers() -> None:
    as_floats = json.loads(json.dumps(_params()), parse_int=float)
    assert as_floats["datadist"]["key"] == str(2**64 - 1)


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        (("datadist",), None, "made by another connector"),
        (("datadist", "protocol"), 2, "'protocol' is 2"),
        (("datadist", "key"), 5, "'key' is 5"),
        (("datadist", "key"), str(2**64), "expected less than"),
        (("datadist", "key"), "-1", "expected a number as text"),
        (("datadist", "ranks"), [], "'ranks' is no list"),
        (("datadist", "ranks"), [["1", "127.0.0.1"]], "is not"),
        (("datadist", "ranks"), [["1", "127.0.0.1", 70000]], "port 70000"),
        (("datadist", "digest"), "", "'digest' is ''"),
        (("datadist", "lease_seconds"), None, "'lease_seconds' is None"),
        (("datadist", "lease_seconds"), 0, "'lease_seconds' is 0"),
        (("datadist", "lease_seconds"), True, "expected seconds"),
        (("datadist", "lease_seconds"), float("nan"), "expected seconds"),
        (("remote_block_ids",), [[]], "has 0 blocks"),
        (("remote_block_ids",), [1], "no list of lists"),
        (("remote_num_tokens",), 0, "expected a positive integer"),
        (("remote_num_tokens",), True, "expected a positive integer"),
        (("remote_engine_id",), None, "expected a text"),
        (("remote_request_id",), "x" * 2000, "expected a text"),
    ],
)
def test_damage_is_named(path: tuple[str, ...], value: object, text: str) -> None:
    params = copy.deepcopy(_params())
    inner = params
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=text):
        source_of(params)


def test_digests_tell_prompts_apart() -> None:
    assert digest_of([1, 2, 3]) == digest_of((1, 2, 3))
    assert len({digest_of(each) for each in ([1, 2], [2, 1], [1, 2, 0], [])}) == 4
