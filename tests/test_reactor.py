"""The thread that waits for everything: its timers, and its end."""

from __future__ import annotations

import os
from pathlib import Path

from datadist.control.reactor import Reactor


def test_a_timer_in_the_far_future_keeps_it_alive() -> None:
    reactor = Reactor("far")
    try:
        for _ in range(2):
            reactor.call(lambda: reactor.later(3e6, lambda: None), 5.0)
        assert reactor.call(lambda: 7, 5.0) == 7
    finally:
        reactor.stop()


def test_what_is_posted_after_the_end_touches_no_other_file(tmp_path: Path) -> None:
    reactor = Reactor("ended")
    reactor.stop()
    path = tmp_path / "file"
    fds = [os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(64)]
    try:
        reactor.post(lambda: None)
        assert path.read_bytes() == b""
    finally:
        for fd in fds:
            os.close(fd)
