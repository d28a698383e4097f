"""Asking engines for reports (asking.py)."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from datadist.control.messages import HEADER
from datadist.control.runtime_dir import Address, RuntimeDir
from datadist.diagnosis import asking
from datadist.diagnosis.asking import ask_engines
from tests.nodes import Node
from tests.shortage import missing

Start = Callable[..., Node]


def test_every_engine_answers_by_job(start_node: Start, tmp_path: Path) -> None:
    place = tmp_path / "engines"
    place.mkdir(mode=0o700)
    for cluster, job in ((1, ""), (2, ""), (1, "other")):
        start_node(cluster, environ={"DATADIST_RUNTIME_DIR": str(place), "DATADIST_JOB": job})
    found = ask_engines(None, 30, place)
    assert [(each.job, each.cluster_id) for each in found] == [("", 1), ("", 2), ("other", 1)]
    assert all(each.report and not each.problem for each in found)
    assert [each.job for each in ask_engines("other", 30, place)] == ["other"]
    assert ask_engines("nobody", 30, place) == []


def test_a_stopped_engine_is_named_and_holds_nobody_up(start_node: Start, tmp_path: Path) -> None:
    place = tmp_path / "engines"
    place.mkdir(mode=0o700)
    first = start_node(1, environ={"DATADIST_RUNTIME_DIR": str(place)})
    start_node(2, environ={"DATADIST_RUNTIME_DIR": str(place)})
    first.pause()
    try:
        stopped, other = ask_engines(None, 10, place)  # which the other one does not need
    finally:
        first.resume()
    assert stopped.report is None
    assert stopped.problem == "no answer: it is stopped, or its control thread is busy"
    assert stopped.pid == first.pid
    assert other.report is not None


def test_nothing_is_made_where_nothing_is(tmp_path: Path) -> None:
    assert ask_engines(None, 1, tmp_path / "none") == []
    assert list(tmp_path.iterdir()) == []


Answer = Callable[[bytes], None]


@pytest.fixture
def impostor(tmp_path: Path) -> Iterator[Answer]:
    """Listens as an engine does, and answers with bytes."""
    with ExitStack() as stack:
        directory = RuntimeDir(tmp_path)
        stack.callback(directory.close)
        listener = stack.enter_context(directory.listen(Address(7, "0" * 32)))
        listener.settimeout(30)

        def answer(data: bytes) -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(100)
                connection.sendall(data)

        def begin(data: bytes) -> None:
            thread = threading.Thread(target=answer, args=(data,))
            thread.start()
            stack.callback(thread.join, 30)

        yield begin


def _frame(message: Any) -> bytes:
    body = json.dumps(message).encode()
    return HEADER.pack(len(body)) + body


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "no report: it closed the connection; is it another release of datadist?"),
        (HEADER.pack(1 << 31), f"no report: a frame of {1 << 31} bytes is larger than"),
        (_frame(["x"]), "no report: it answered with something else"),
        (_frame({"kind": "hello"}), "no report: it answered with something else"),
        (HEADER.pack(3) + b"{{{", "no report: Expecting property name"),
        (HEADER.pack(3) + b"\xff\xff\xff", "no report: "),
        (HEADER.pack(200_000) + b"[" * 200_000, "no report: maximum recursion depth exceeded"),
    ],
)
def test_what_is_no_report_is_told(
    data: bytes, problem: str, impostor: Answer, tmp_path: Path
) -> None:
    impostor(data)
    (found,) = ask_engines(None, 30, tmp_path)
    assert found.report is None
    assert found.problem.startswith(problem)
    assert found.pid == os.getpid()


def test_who_talks_slowly_is_not_waited_for(tmp_path: Path) -> None:
    directory = RuntimeDir(tmp_path)
    listener = directory.listen(Address(7, "0" * 32))
    over = threading.Event()

    def drip() -> None:
        listener.settimeout(30)
        connection, _ = listener.accept()
        with connection:
            connection.sendall(HEADER.pack(1 << 20))
            while not over.wait(0.05):
                try:
                    connection.sendall(b" ")
                except OSError:
                    return

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        began = time.monotonic()
        (found,) = ask_engines(None, 1, tmp_path)
        assert time.monotonic() - began < 45, "it would go on as long as somebody talks"
    finally:
        over.set()
        thread.join(30)
        listener.close()
        directory.close()
    assert found.problem.startswith("no answer")


def test_a_large_report_is_not_waited_for_after_those_that_never_come(tmp_path: Path) -> None:
    """Its engine sends more when somebody has read what is there; two stopped ones are beside it."""
    directory = RuntimeDir(tmp_path)
    with ExitStack() as stack:
        stack.callback(directory.close)
        talking, *_ = (
            stack.enter_context(directory.listen(Address(cluster, str(cluster) * 32)))
            for cluster in (2, 1, 3)
        )
        frame = _frame({"kind": "report", "report": {"text": "x" * (8 << 20)}})

        def talk() -> None:
            talking.settimeout(30)
            connection, _ = talking.accept()
            with connection:
                connection.settimeout(30)
                for begin in range(0, len(frame), 1 << 18):
                    connection.sendall(frame[begin : begin + (1 << 18)])
                    time.sleep(0.01)

        thread = threading.Thread(target=talk)
        thread.start()
        stack.callback(thread.join, 60)
        first, found, last = ask_engines(None, 8, tmp_path)
    assert found.problem == ""
    assert found.report == {"text": "x" * (8 << 20)}
    assert [each.problem[:10] for each in (first, last)] == ["no answer:"] * 2


def test_what_lies_there_when_the_time_is_over_counts() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        question = asking._Question("", Address(7, "0" * 32), ours, "")
        theirs.sendall(_frame({"kind": "report", "report": {"cluster_id": 7}}))
        asking._hear_all([question], time.monotonic() - 1)
    assert question.asked().report == {"cluster_id": 7}


def test_engines_are_asked_where_no_descriptor_is_left_for_more_than_them(
    start_node: Start, runtime_dir: Path
) -> None:
    start_node(1)
    with missing("epoll", 0):
        (found,) = ask_engines(None, 30, runtime_dir)
    assert found.report


def _fill(directory: RuntimeDir, waiting: list[socket.socket]) -> None:
    """Connect until no room is left; somebody else accepts."""
    for _ in range(4096):
        sock = directory.connect(Address(7, "0" * 32))
        assert sock is not None
        waiting.append(sock)


def test_an_engine_that_is_too_busy_to_accept_is_named(tmp_path: Path) -> None:
    directory = RuntimeDir(tmp_path)
    listener = directory.listen(Address(7, "0" * 32))
    waiting: list[socket.socket] = []
    try:
        with pytest.raises(BlockingIOError):
            _fill(directory, waiting)
        (found,) = ask_engines(None, 1, tmp_path)
        assert found.problem == "too many others wait for it"
    finally:
        for sock in waiting:
            sock.close()
        listener.close()
        directory.close()
