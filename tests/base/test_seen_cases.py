"""What is said once."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from datadist.base.seen_cases import SeenCases


@given(st.lists(st.integers(0, 9)))
def test_a_case_is_new_once(cases: list[int]) -> None:
    once = SeenCases(10)
    new = [case for case in cases if once.is_new(case)]
    assert new == list(dict.fromkeys(cases))


@given(st.lists(st.integers()), st.integers(1, 5))
def test_no_more_are_remembered_than_may_be(cases: list[int], most: int) -> None:
    once = SeenCases(most)
    for case in cases:
        once.is_new(case)
        assert len(once) <= most
        assert not once.is_new(case), "the last one is remembered"


def test_one_of_many_threads_is_the_first() -> None:
    for _ in range(50):
        once, start = SeenCases(4), threading.Barrier(8)
        firsts: list[bool] = []

        def ask(once: SeenCases, firsts: list[bool], start: threading.Barrier) -> None:
            start.wait()
            firsts.append(once.is_new("case"))

        threads = [threading.Thread(target=ask, args=(once, firsts, start)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(firsts) == [False] * 7 + [True]
