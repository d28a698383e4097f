"""The staging buffer: one transfer at a time, by its deadline, whatever a handler of a signal raises."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from datadist_hccl.staging import Staging

from datadist.transport import Placement, Region, TransferTimeout
from tests.interrupts import raising_anew

SECONDS = 60.0


def _staging() -> Staging:
    region = Region(1 << 21, 4 << 20, Placement.DEVICE)
    memory: Any = SimpleNamespace(allocate=lambda *_: region, take=lambda _: [1])
    return Staging(memory)


def _use(staging: Staging) -> None:
    staging.use(time.monotonic() + SECONDS, lambda: None)


def test_one_transfer_at_a_time_has_it() -> None:
    staging, inside, go_on = _staging(), threading.Event(), threading.Event()

    def work() -> None:
        inside.set()
        assert go_on.wait(SECONDS)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(staging.use, time.monotonic() + SECONDS, work)
        assert inside.wait(SECONDS)
        with pytest.raises(TransferTimeout, match="took too long; link again") as caught:
            staging.use(time.monotonic(), lambda: None)
        assert caught.value.link_usable
        second = pool.submit(_use, staging)
        go_on.set()
        first.result(SECONDS)
        second.result(SECONDS)


def test_what_a_handler_raises_leaves_it_free() -> None:
    moments = 0
    for where, staging in raising_anew(_staging, _use):
        moments += 1
        assert not staging._users, where
        _use(staging)
    assert moments > 3
