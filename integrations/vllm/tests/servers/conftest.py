"""A pair of real vLLM servers with a proxy, started once for each file of tests."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.pair import QUICK, Pair


def pytest_configure() -> None:
    """SIGTERM ends the tests as Ctrl-C does, so that no server is left."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip all where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models are shared by all files, logs are not."""
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="module")
def pair(directory: Path) -> Iterator[Pair]:
    """Prefiller, decoder, proxy: GQA, leases of some seconds."""
    with Pair("gqa", directory, extra=QUICK) as pair:
        yield pair
