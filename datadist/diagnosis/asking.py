"""Reports of the engines of this user on this host, asked for over their sockets."""

from __future__ import annotations

import json
import os
import selectors
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datadist.control.default_place import existing_place
from datadist.control.messages import HEADER, MAX_FRAME, AskReport, encode
from datadist.control.process import peer_of, program_of
from datadist.control.runtime_dir import Address, RuntimeDir, chosen_path

CHUNK = 1 << 18


@dataclass(frozen=True)
class Asked:
    """An engine that listens, and its report; without one, ``problem`` says why."""

    job: str
    cluster_id: int
    incarnation: str
    pid: int
    """0 where it is in a pid namespace that is not visible here."""
    program: str
    report: dict[str, Any] | None
    problem: str = ""
    at: float = 0.0
    """When the report came (time.monotonic)."""


class _Question:
    """One engine that is asked; without a socket, ``problem`` says why it cannot be."""

    def __init__(
        self, job: str, address: Address, sock: socket.socket | None, problem: str
    ) -> None:
        self.job, self.address, self.sock = job, address, sock
        self.pid, user = (0, os.geteuid()) if sock is None else peer_of(sock)
        self.problem = problem if user == os.geteuid() else f"it belongs to user {user}"
        self._report: dict[str, Any] | None = None
        self._data = bytearray()
        self._at = 0.0

    @property
    def over(self) -> bool:
        """Whether there is a report, or none will come."""
        return self._report is not None or bool(self.problem)

    def ask(self) -> None:
        """Send the question, which fits the buffer of a new connection."""
        if self.sock is not None and not self.problem:
            try:
                self.sock.sendall(encode(AskReport()))
            except OSError as error:
                self.problem = f"cannot be asked: {error.strerror or error}"

    def hear(self) -> None:
        """Take what has arrived of the answer."""
        try:
            self._hear()
        except BlockingIOError:
            return
        except (OSError, ValueError, RecursionError) as error:
            self.problem = f"no report: {error}"
        if self.over:
            self._data.clear()

    def _hear(self) -> None:
        assert self.sock is not None
        more = self.sock.recv(CHUNK)
        if not more:
            raise ValueError("it closed the connection; is it another release of datadist?")
        self._data += more
        if len(self._data) < HEADER.size:
            return
        (size,) = HEADER.unpack_from(self._data)
        if size > MAX_FRAME:
            raise ValueError(f"a frame of {size} bytes is larger than {MAX_FRAME}")
        if len(self._data) >= HEADER.size + size:
            self._report = _report_in(self._data[HEADER.size : HEADER.size + size])
            self._at = time.monotonic()

    def asked(self) -> Asked:
        """The report, if it has come by now."""
        silent = "no answer: it is stopped, or its control thread is busy"
        return Asked(
            self.job, self.address.cluster_id, self.address.incarnation, self.pid,
            program_of(self.pid) if self.pid else "unknown", self._report,
            self.problem if self.over else silent, self._at or time.monotonic(),
        )  # fmt: skip


def _report_in(body: bytearray) -> dict[str, Any]:
    """Raises ValueError for what is no report, RecursionError where it is nested too deeply."""
    message = json.loads(body)
    report = message.get("report") if isinstance(message, dict) else None
    if not isinstance(report, dict):
        raise ValueError("it answered with something else; is it another release of datadist?")
    return report


def ask_engines(job: str | None, seconds: float, path: Path | None = None) -> list[Asked]:
    """What every engine of this user on this host answers within ``seconds``, by job and cluster.

    ``job`` limits that to one job; ``path`` is the runtime directory, None the one of the
    environment. Nothing is made there. Raises RuntimeDirError where it cannot be used.
    """
    path = path or chosen_path()
    if (existing_place() if path is None else path if path.exists() else None) is None:
        return []
    deadline = time.monotonic() + seconds
    with ExitStack() as stack:
        questions = list(_questions(path, job, stack))
        for question in questions:
            question.ask()
        _hear_all([each for each in questions if not each.over], deadline)
        found = [question.asked() for question in questions]
    return sorted(found, key=lambda each: (each.job, each.cluster_id, each.pid))


def _hear_all(questions: Sequence[_Question], deadline: float) -> None:
    """Wait for all answers at the same time: a large one takes turns, and others may never come.

    What lies there at the deadline counts, however late this process came to it.
    """
    with selectors.PollSelector() as selector:  # it takes no descriptor, of which few may be left
        for question in questions:
            assert question.sock is not None
            selector.register(question.sock, selectors.EVENT_READ, question)
        while selector.get_map():
            left = deadline - time.monotonic()
            for key, _ in selector.select(max(0.0, left)):
                key.data.hear()
                if key.data.over:
                    selector.unregister(key.fileobj)
            if left <= 0:
                break


def _questions(path: Path | None, job: str | None, stack: ExitStack) -> Iterator[_Question]:
    directory = RuntimeDir(path)
    stack.callback(directory.close)
    yield from _in_job(directory, job, stack)
    for other in directory.others():
        yield from _in_job(other, job, stack)


def _in_job(directory: RuntimeDir, job: str | None, stack: ExitStack) -> Iterator[_Question]:
    if job not in (None, directory.job):
        return
    for address in directory.engines():
        sock, problem = None, ""
        try:
            sock = directory.connect(address)
        except BlockingIOError:
            problem = "too many others wait for it"
        except OSError as error:
            problem = f"cannot be reached: {error.strerror or error}"
        if sock is not None:
            stack.callback(sock.close)
        if sock is not None or problem:
            yield _Question(directory.job, address, sock, problem)
