"""Names of addresses in the runtime directory: who took one last has it (runtime_dir.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from datadist.control.runtime_dir import Address, RuntimeDir

IP, PORT = "127.0.0.1", 26_999
FIRST, SECOND = Address(1, "a" * 32), Address(2, "b" * 32)


@pytest.fixture
def directory(runtime_dir: Path) -> Iterator[RuntimeDir]:
    made = RuntimeDir(runtime_dir)
    yield made
    made.close()


def _who(directory: RuntimeDir) -> list[Address]:
    return [found.engine for found in directory.listening(PORT)]


def test_an_engine_takes_its_own_name_away(directory: RuntimeDir) -> None:
    directory.publish(IP, PORT, FIRST)
    assert _who(directory) == [FIRST]
    directory.retract(IP, PORT, FIRST)
    assert _who(directory) == []
    directory.retract(IP, PORT, FIRST)


def test_an_engine_leaves_the_name_that_another_one_has_taken(directory: RuntimeDir) -> None:
    directory.publish(IP, PORT, FIRST)
    directory.publish(IP, PORT, SECOND)
    directory.retract(IP, PORT, FIRST)
    assert _who(directory) == [SECOND]
