"""The runtime directory: who may enter it, and whose a name in it is (runtime_dir.py)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from datadist.control.own_directory import RuntimeDirError
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


@pytest.mark.parametrize("mode", [0o710, 0o720, 0o740, 0o701, 0o702, 0o704, 0o777])
def test_a_directory_that_others_may_enter_is_refused(runtime_dir: Path, mode: int) -> None:
    runtime_dir.chmod(mode)
    with pytest.raises(RuntimeDirError, match=f"with mode {mode:04o}, expected .* mode 0700"):
        RuntimeDir(runtime_dir)
    runtime_dir.chmod(0o700)
    RuntimeDir(runtime_dir).close()


def test_a_directory_of_another_user_is_refused(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(RuntimeDirError, match=f"belongs to user {owner} "):
        RuntimeDir(runtime_dir)
