"""The targets of the fuzzer, without it: good inputs are accepted, changed ones end as documented."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.seeds import SEEDS
from tests.fuzz.targets import TARGETS


def test_every_target_has_seeds() -> None:
    assert set(SEEDS) == set(TARGETS)


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "handshake"])
def test_good_inputs_are_accepted(name: str) -> None:
    for seed in SEEDS[name]:
        assert TARGETS[name](seed), seed


def test_no_handshake_succeeds_without_the_key() -> None:
    for seed in SEEDS["handshake"]:
        assert not TARGETS["handshake"](seed)


@pytest.mark.parametrize("name", TARGETS)
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_changed_inputs_do_no_harm(name: str, data: st.DataObject) -> None:
    seed = bytearray(data.draw(st.sampled_from(SEEDS[name])))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(seed)))
        removed = data.draw(st.integers(0, 6))
        seed[at : at + removed] = data.draw(st.binary(max_size=6))
    TARGETS[name](bytes(seed))
