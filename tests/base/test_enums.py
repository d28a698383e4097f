"""Texts of enumerations (enums.py): names, in every form, on every version of Python."""

from __future__ import annotations

import copy
import json
import pickle
from enum import Enum, IntEnum

import pytest

from datadist import DataType, LLMRole, LLMStatusCode, Memtype, Placement, RegisterMemStatus

NUMBERED: list[IntEnum] = [*LLMStatusCode, *LLMRole, *Placement]
PLAIN: list[Enum] = [*DataType, *Memtype, *RegisterMemStatus]
TIMEOUT = LLMStatusCode.LLM_TIMEOUT


@pytest.mark.parametrize("member", [*NUMBERED, *PLAIN], ids=repr)
def test_the_text_is_class_and_name_in_every_form(member: Enum) -> None:
    name = f"{type(member).__name__}.{member.name}"
    assert str(member) == name
    assert f"{member}" == format(member) == "{}".format(member) == "%s" % member == name  # noqa: UP031, UP032
    assert f"{member!s}" == f"{member:s}" == name
    assert f"{member:>60}" == name.rjust(60)
    assert f"{member:*<60s}" == name.ljust(60, "*")
    assert f"{member:^60}" == name.center(60)
    assert f"{member:.3}" == name[:3]
    assert repr(member) == f"<{name}: {member.value}>"


@pytest.mark.parametrize("member", NUMBERED, ids=repr)
def test_formats_of_numbers_show_the_number(member: IntEnum) -> None:
    number = int(member)
    assert "%d" % member == str(number)  # noqa: UP031
    assert "%x" % member == "%x" % number  # noqa: UP031
    for spec in (
        "d",
        "x",
        "#x",
        "#010x",
        "08",
        "b",
        ",",
        "_",
        "+",
        "=+12",
        "e",
        ".2f",
        "n",
        "012d",
    ):
        assert format(member, spec) == format(number, spec), spec
    assert json.dumps(member) == str(number)


@pytest.mark.parametrize("spec", ["q", "k", ">>>"])
def test_a_format_that_does_not_exist_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="format"):
        format(TIMEOUT, spec)


@pytest.mark.parametrize("member", NUMBERED, ids=repr)
def test_members_stay_numbers_and_themselves(member: IntEnum) -> None:
    assert isinstance(member, int)
    assert type(member)(int(member)) is member
    assert hash(member) == hash(int(member))
    for same in (pickle.loads(pickle.dumps(member)), copy.copy(member), copy.deepcopy(member)):
        assert same is member
