"""A step that computes nothing waits for the end of a load, and for nothing where none goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

from datadist_vllm.engine import WorkerEngine
from datadist_vllm.links import Links
from datadist_vllm.messages import Load
from datadist_vllm.parameters import RankAddress, Source
from datadist_vllm.ranks import Split
from datadist_vllm.reading import Reading
from datadist_vllm.settings import Settings

from datadist import LLMDataDist

FAR = 3600.0
SOURCE = Source("e", "r", 1, (RankAddress(1, "127.0.0.1", 9),), (1,), 5, "d", FAR)


class _Engine:
    backend = "shm"


class _Links:
    """A link that fails once it is told to, on another thread."""

    def __init__(self) -> None:
        self.fail = threading.Event()

    def when_linked(self, address: RankAddress, then: Callable[[Any], None]) -> None:
        def later() -> None:
            self.fail.wait()
            then("no link")

        threading.Thread(target=later).start()


def _reading(links: _Links) -> Reading:
    engine = cast(LLMDataDist, _Engine())
    return Reading(engine, cast(Links, links), [], 0, Split(1, 1, 1), FAR)


def test_the_wait_ends_with_the_load() -> None:
    links = _Links()
    reading = _reading(links)
    reading.begin(Load("request", SOURCE, [0], [7], 5))
    reading.wait(0.01)
    assert reading.ended() == []
    threading.Timer(0.05, links.fail.set).start()
    reading.wait(FAR)
    (result,) = reading.ended()
    assert (result.error, result.transport) == ("no link", "shm")


def test_without_loads_there_is_no_wait() -> None:
    _reading(_Links()).wait(FAR)


def test_the_engine_opens_the_device_of_the_cache() -> None:
    engine = WorkerEngine(Settings(), b"")
    assert engine._options(0, 3)["ge.exec.deviceId"] == "3"
    assert "ge.exec.deviceId" not in engine._options(0, None)
