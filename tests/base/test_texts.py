"""Parts of texts: values in bounded length, near names, rounded times."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datadist.base.texts import MAX_SHOWN, in_seconds, nearest, short_repr, suggestion

SOURCES = [
    path
    for folder in ("datadist", "plugins", "examples")
    for path in (Path(__file__).parents[2] / folder).rglob("*.py")
    if "tests" not in path.parts and "roce" not in path.parts
]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5.999999998, "6 s"),
        (5.99998, "6 s"),
        (0, "0 s"),
        (1.5, "1.5 s"),
        (0.2 + 0.1, "0.3 s"),
        (99.96, "100 s"),
        (1079.99, "1080 s"),
        (120, "120 s"),
        (1e-7, "less than 0.001 s"),
    ],
)
def test_times_are_rounded(value: float, text: str) -> None:
    assert in_seconds(value) == text


@given(st.floats(min_value=0, max_value=1e6))
def test_a_time_is_short_and_close(value: float) -> None:
    text = in_seconds(value)
    assert len(text) <= len("less than 0.001 s")
    assert "e" not in text.removeprefix("less")
    if value >= 0.001:
        assert float(text.removesuffix(" s")) == pytest.approx(value, rel=0.01)


def test_no_text_rounds_times_in_a_way_of_its_own() -> None:
    raw = re.compile(r":(\.[456])?g\} s\b|%(\.[456])?g s\b")
    assert len(SOURCES) > 100
    assert not [path.name for path in SOURCES if raw.search(path.read_text())]


@given(st.one_of(st.text(), st.binary(), st.lists(st.integers())))
def test_a_value_is_shown_in_one_line_of_bounded_length(value: object) -> None:
    assert "\n" not in short_repr(value)
    assert len(short_repr(value)) < MAX_SHOWN + 40
    if len(repr(value)) < MAX_SHOWN and len(repr(value)) < 32 and " " not in repr(value):
        assert short_repr(value) == repr(value)


def test_long_values_are_cut_and_say_so() -> None:
    assert short_repr("x" * 10**7).endswith("... (10000000 characters in all)")
    assert short_repr(list(range(1000))) == "1000 elements"


def test_a_repr_that_fails_does_not_hide_the_reason() -> None:
    class Odd:
        def __repr__(self) -> str:
            raise KeyError(1)

    assert short_repr(Odd()) == "<its repr raised KeyError>"


def test_near_names() -> None:
    names = ["mem_pool_cfg", "host_mem_pool_cfg", "device_id"]
    assert nearest("mem_pool_config", names) == "mem_pool_cfg"
    assert nearest("DEVICE_ID", names) == "device_id"
    assert nearest("zzz", names) is None
    assert suggestion("deviceid", names) == ": did you mean 'device_id'?"
    assert suggestion("zzz", names) == ""
