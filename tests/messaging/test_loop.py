"""Asking the thread of an engine (loop.py), where a handler of a signal raises."""

from __future__ import annotations

from tests.interrupts import raising
from tests.messaging_links import nodes


def test_an_interrupted_question_leaves_a_thread_that_answers() -> None:
    with nodes(1) as (node,):
        loop = node.transport._dispatcher.loop
        for where in raising(lambda: loop.ask(lambda: 1, 30)):
            assert loop.ask(lambda: 2, 30) == 2, where
