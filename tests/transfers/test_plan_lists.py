"""Plans of lists that a transport's code converts, against those that core makes itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datadist.testing.list_operations import ListCase, expected
from datadist.transfers import int_lists
from datadist.transfers.block_lists import check_blocks, check_destinations, check_distinct
from datadist.transfers.plan import plan_blocks, plan_lists
from datadist.transport import MAX_SPREAD, Transport

COUNT = 64
FAR = 1 << 50


def by_model(
    values: list[int], limit: int, stride: int, base: int, vector: Any, distinct: bool, /
) -> int:
    """The model of the conformance kit, as a transport would have it."""
    assert not distinct or limit <= MAX_SPREAD * len(values)
    assert limit < 1 << 63
    found = expected(ListCase(values, limit, stride, base, distinct, len(vector)))
    if found is None:
        return -1
    vector[:] = found[1]
    return found[0]


@pytest.fixture(autouse=True)
def converter() -> Iterator[None]:
    """Let lists be converted by the model, in this module's tests only."""
    before = int_lists._converter
    int_lists.use(by_model)
    yield
    int_lists._converter = before


@given(
    st.integers(1, 5),
    st.permutations(range(COUNT)),
    st.permutations(range(COUNT)),
    st.integers(1, COUNT),
    st.booleans(),
    st.sampled_from([(16, 16, 16), (32, 16, 16), (16, 32, 8)]),
    st.booleans(),
)
def test_plans_are_the_same_as_those_from_arrays(
    tensors: int,
    mine: list[int],
    theirs: list[int],
    count: int,
    in_order: bool,
    sizes: tuple[int, int, int],
    write: bool,
) -> None:
    if in_order:
        mine, theirs = sorted(mine[:count]), sorted(theirs[:count])
    here, there = mine[:count], theirs[:count]
    bases = [(n + 1) << 20 for n in range(tensors)]
    remote = [FAR + base for base in bases]
    plan = plan_lists(bases, remote, here, there, *sizes, COUNT, COUNT, write)
    assert plan is not None
    same = plan_blocks(bases, remote, np.array(here), np.array(there), *sizes)
    for name in ("local", "remote", "length"):
        assert list(getattr(plan, name)) == list(getattr(same, name)), name
    assert plan.nbytes == same.nbytes == tensors * count * sizes[2]


GOOD = [3 * n % 41 for n in range(1, 41)]


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("bad", [COUNT, -1, True, 1 << 70, 1.0, GOOD[0]])
def test_lists_that_are_not_in_order_are_left_to_the_other_way(bad: Any, write: bool) -> None:
    wrong: list[Any] = [*GOOD[:-1], bad]
    source, target = (GOOD, wrong) if write else (wrong, GOOD)
    assert plan_lists([0], [FAR], source, target, 16, 16, 16, COUNT, COUNT, write) is None
    repeated = bad is GOOD[0]  # which a source may be
    plan = plan_lists([0], [FAR], source, target, 16, 16, 16, COUNT, COUNT, not write)
    assert (plan is not None) is repeated


@pytest.mark.parametrize("other", [GOOD[:-1], tuple(GOOD), np.array(GOOD), range(40), None])
def test_only_two_lists_of_one_length_are_planned_so(other: Any) -> None:
    for mine, theirs in ((GOOD, other), (other, GOOD)):
        assert plan_lists([0], [FAR], mine, theirs, 16, 16, 16, COUNT, COUNT, False) is None


def test_destinations_far_apart_are_left_to_core() -> None:
    count = MAX_SPREAD * len(GOOD)
    for limit in (count, count + 1):
        plan = plan_lists([0], [FAR], GOOD, GOOD, 16, 16, 16, limit, limit, False)
        assert (plan is None) is (limit > count)
        assert list(check_destinations("x", GOOD, limit)) == GOOD
        with pytest.raises(ValueError, match=r"x\[40\] is 3, and so is x\[0\]"):
            check_destinations("x", [*GOOD, 3], limit)


@given(st.lists(st.integers(-2, COUNT + 1) | st.sampled_from([True, 1.0, 1 << 65]), max_size=80))
def test_checks_say_the_same_with_and_without_it(blocks: list[Any]) -> None:
    def both(name: str, values: list[Any], count: int) -> Any:
        checked = check_blocks(name, values, count)
        check_distinct(name, checked, count)
        return checked

    for check in (check_blocks, check_destinations):
        got = _outcome(check, blocks)
        int_lists._converter = None
        try:
            without = _outcome(check_blocks if check is check_blocks else both, blocks)
        finally:
            int_lists.use(by_model)
        assert got == without


def _outcome(check: Callable[..., Any], blocks: list[Any]) -> Any:
    try:
        return list(check("x", blocks, COUNT))
    except (TypeError, ValueError) as error:
        return type(error), str(error)


def test_a_transport_that_leaves_lists_to_core_changes_nothing() -> None:
    int_lists.use(Transport.convert_list)
    assert int_lists._converter is by_model
    int_lists._converter = None
    int_lists.use(Transport.convert_list)
    assert int_lists._converter is None
    assert plan_lists([0], [FAR], GOOD, GOOD, 16, 16, 16, COUNT, COUNT, False) is None
    assert Transport.convert_list([1], 2, 1, 0, bytearray(8), False) == -1
