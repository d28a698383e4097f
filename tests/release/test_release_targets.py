"""Which wheels of the extension the interpreters of a machine can be used for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from release.targets import Interpreter, ask, choose

pytestmark = pytest.mark.fast


def _python(minor: int, *, free_threaded: bool = False) -> Interpreter:
    return Interpreter(Path(f"/python3.{minor}"), (3, minor), free_threaded)


def test_one_wheel_serves_3_11_and_later() -> None:
    targets = choose([_python(13), _python(12), _python(11), _python(10)], ["x86_64"])
    assert [target.name for target in targets] == [
        "cp310-cp310-manylinux_2_17_x86_64",
        "cp311-abi3-manylinux_2_17_x86_64",
    ]
    assert targets[1].interpreter == _python(11)


def test_a_later_python_serves_for_the_limited_api_of_3_11() -> None:
    (target,) = choose([_python(13)], ["aarch64"])
    assert target.name == "cp311-abi3-manylinux_2_17_aarch64"


def test_free_threaded_pythons_have_wheels_of_their_own() -> None:
    targets = choose([_python(13, free_threaded=True), _python(14, free_threaded=True)], ["x86_64"])
    assert [(target.python, target.abi) for target in targets] == [
        ("cp313", "cp313t"), ("cp314", "cp314t"),
    ]  # fmt: skip


def test_pythons_that_are_too_old_are_left_out() -> None:
    assert choose([_python(9), _python(8)]) == []


def test_each_machine_has_a_wheel() -> None:
    assert [target.machine for target in choose([_python(12)])] == ["x86_64", "aarch64"]


def test_an_interpreter_is_asked_what_it_is() -> None:
    found = ask(Path(sys.executable))
    assert found.version == sys.version_info[:2]
