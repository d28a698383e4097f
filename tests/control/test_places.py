"""Which connection has to go where too many wait (places.py)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from datadist.control.places import Places

PER_HOST, TOTAL = 3, 8
Newcomer = tuple[str, bool]


Connection = tuple[int, str, bool]


def _fill(newcomers: list[Newcomer]) -> Places[Connection]:
    places: Places[Connection] = Places(PER_HOST, TOTAL)
    for age, (host, shown) in enumerate(newcomers):
        gone = places.crowded(host)
        if gone is not None:
            places.discard(gone)
        places.add((age, host, shown), host)
        if shown:
            places.show((age, host, shown))
    return places


NEWCOMERS = st.lists(st.tuples(st.sampled_from("abcdefghij"), st.booleans()), max_size=40)


@given(NEWCOMERS)
def test_there_are_never_more_than_may_be(newcomers: list[Newcomer]) -> None:
    waiting = list(_fill(newcomers))
    assert len(waiting) <= TOTAL
    for host in "abcdefghij":
        assert len([each for each in waiting if each[1] == host]) <= PER_HOST
    if newcomers:
        assert max(waiting)[0] == len(newcomers) - 1, "who came last is in"


@given(NEWCOMERS, st.sampled_from("abcdefghijk"))
def test_who_has_shown_something_outlasts_who_has_not(newcomers: list[Newcomer], host: str) -> None:
    places = _fill(newcomers)
    gone = places.crowded(host)
    own = [each for each in places if each[1] == host]
    if gone is None:
        assert len(places) < TOTAL
        assert len(own) < PER_HOST
        return
    among = own if len(own) == PER_HOST else list(places)
    assert gone in among
    assert places.host(gone) == gone[1]
    assert not gone[2] or all(each[2] for each in among)
    rivals = [each for each in among if each[2] == gone[2]]
    of = {each: [other for other in rivals if other[1] == each[1]] for each in rivals}
    assert len(of[gone]) == max(map(len, of.values()))
    assert gone == min(of[gone]), "the oldest of its host"


def test_a_place_is_given_back_once() -> None:
    places: Places[str] = Places(1, 1)
    for shown in (False, True):
        places.add("one", "a")
        assert places.crowded("a") == places.crowded("b") == "one"
        if shown:
            places.show("one")
            places.show("one")
        for _ in range(2):
            places.discard("one")
            places.show("one")
        assert len(places) == 0
        assert places.crowded("a") is places.crowded("b") is None


def test_of_equal_hosts_the_eldest_makes_room() -> None:
    places: Places[int] = Places(2, 4)
    for number in range(4):
        places.add(number, f"host {number}")
    places.show(1)
    for expected in (0, 2, 3, 1):
        assert places.crowded("another") == expected
        places.discard(expected)
        places.add(10 + expected, f"friend {expected}")
        places.show(10 + expected)


def test_who_is_spared_stays_where_another_one_can_go() -> None:
    """Whichever host has most: no host's new connections keep old ones in."""
    spared = {1, 2}
    places: Places[int] = Places(4, 4, spared.__contains__)
    places.add(0, "a")
    places.add(1, "b")
    places.add(2, "b")
    places.add(3, "c")
    places.show(3)
    assert places.next() == 0
    spared.add(0)
    assert places.next() == 3
    spared.add(3)
    assert places.next() == 1
