"""Events that a program takes or watches for (event_queue.py)."""

from __future__ import annotations

import select
import threading

from datadist.base.event_queue import EventQueue


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

    watcher = threading.Thread(target=watch)
    watcher.start()

    def put(base: int) -> None:
        for n in range(1000):
            queue.put(base + n)

    putters = [threading.Thread(target=put, args=(base,)) for base in (0, 1000, 2000)]
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
