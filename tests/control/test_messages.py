"""The messages of the control plane, by themselves (messages.py)."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from datadist.control.messages import (
    MAX_NOTICE,
    MAX_SECONDS,
    Notice,
    decode,
    encode,
    seconds_until,
)

TIMED: dict[str, dict[str, Any]] = {
    "dial": {"link": 1, "backend": "shm", "one_sided": False},
    "fetch": {
        "id": 1,
        "domain": "0" * 32,
        "source": "",
        "target": "",
        "length": "",
        "data_type": 1,
        "same_type": False,
    },
    "verify": {"id": 1, "address": "", "length": ""},
}


@pytest.mark.parametrize("kind", TIMED)
def test_nobody_names_a_time_that_no_program_can_set(kind: str) -> None:
    def take(seconds: float) -> None:
        decode(json.dumps({"kind": kind, **TIMED[kind], "seconds": seconds}).encode())

    take(0.001)
    take(MAX_SECONDS)
    for silly in (0.0, -1.0, MAX_SECONDS + 1, 2.0**31, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="seconds"):
            take(silly)


def test_what_is_said_of_a_deadline_can_be_said() -> None:
    now = time.monotonic()
    assert seconds_until(now - 5) == 0.001
    assert 900 < seconds_until(now + 1000) <= 1000
    assert seconds_until(now + 2 * MAX_SECONDS) == MAX_SECONDS


@pytest.mark.parametrize("data", [b"", b"{", b"\0" * 3, bytes(MAX_NOTICE)])
def test_a_message_of_the_program_travels_as_it_is(data: bytes) -> None:
    frame = encode(Notice(data=data))
    assert decode(frame[4:]) == Notice(data=data)
    assert len(frame) == 5 + len(data)


def test_a_message_of_the_program_that_is_too_large_is_none() -> None:
    with pytest.raises(ValueError, match=f"{MAX_NOTICE + 1} bytes is larger than {MAX_NOTICE}"):
        decode(b"\0" * (2 + MAX_NOTICE))
