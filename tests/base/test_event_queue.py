"""Events that a program takes or watches for (event_queue.py)."""

from __future__ import annotations

import select
import threading
from dataclasses import dataclass

from datadist.base.event_queue import EventQueue
from tests import interrupts


@dataclass(frozen=True, order=True)
class _Event:
    """As those of the engine are, with a comparison that is written in Python."""

    number: int


def _readable(queue: EventQueue[int]) -> bool:
    return bool(select.select([queue], [], [], 0)[0])


def test_events_are_taken_once_in_order() -> None:
    queue: EventQueue[int] = EventQueue()
    for event in range(3):
        queue.put(event)
    assert len(queue) == 3
    assert queue.take() == [0, 1, 2]
    assert queue.take() == []


def test_the_descriptor_is_readable_while_something_waits() -> None:
    queue: EventQueue[int] = EventQueue()
    queue.put(1)  # before there is a descriptor
    assert _readable(queue)
    queue.take()
    assert not _readable(queue)
    queue.put(2)
    assert _readable(queue)
    assert queue.take() == [2]
    queue.close()


def test_a_watcher_is_woken_and_loses_nothing() -> None:
    queue: EventQueue[int] = EventQueue()
    queue.fileno()
    taken: list[int] = []

    def watch() -> None:
        while len(taken) < 3000:
            assert select.select([queue], [], [], 60)[0]
            taken.extend(queue.take())

    def put_from(base: int) -> None:
        for number in range(base, base + 1000):
            queue.put(number)

    watcher = threading.Thread(target=watch)
    watcher.start()
    putters = [threading.Thread(target=put_from, args=(base,)) for base in (0, 1000, 2000)]
    for each in putters:
        each.start()
    for each in (*putters, watcher):
        each.join(60)
    assert sorted(taken) == list(range(3000))
    queue.close()


def test_a_closed_queue_gives_what_was_there_and_can_be_closed_again() -> None:
    queue: EventQueue[int] = EventQueue()
    queue.fileno()
    queue.put(7)
    queue.close()
    queue.close()
    queue.put(8)
    assert queue.take() == [7, 8]


def test_an_exception_of_a_handler_at_any_moment_loses_no_event() -> None:
    queue: EventQueue[_Event] = EventQueue()
    expected = [_Event(number) for number in range(5)]
    for event in expected:
        queue.put(event)
    taken: list[_Event] = []

    def call() -> None:
        taken.extend(queue.take())

    rounds = 0
    for where in interrupts.raising(call, interrupts.Interrupt):
        rounds += 1
        assert sorted([*taken, *queue.waiting()]) == expected, where
        for event in taken:
            queue.put(event)
        taken.clear()
    assert rounds > 2
