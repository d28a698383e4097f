"""Claims on cluster ids, between real processes: who has one, and when it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from datadist.control.claims import UNKNOWN, UNSUPPORTED, Claims
from datadist.control.kernel import kernel_id
from datadist.control.runtime_dir import Address, RuntimeDir
from datadist.control.stale_files import remove_stale_files
from tests import descriptors, nodes
from tests.nodes import Node, RemoteError

Start = Callable[..., Node]
CLAIM = f"7@{kernel_id()}.claim"


def _claim(here: nodes.Here, path: str, cluster: int = 7, job: str = "") -> str | None:
    """Try to take a claim; its holder in words where that is another engine."""
    engine = Address(cluster, f"{os.getpid():032x}")
    here.any["claims"] = claims = Claims(RuntimeDir(Path(path), job), engine)
    holder = claims.take()
    return None if holder is None else str(holder)


def _release(here: nodes.Here) -> None:
    here.any["claims"].close()


def _fork(here: nodes.Here) -> int:
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    return child


@pytest.fixture
def place(runtime_dir: Path) -> str:
    return str(runtime_dir)


def test_one_engine_has_an_id_until_it_gives_it_back(start_node: Start, place: str) -> None:
    first, second = start_node(), start_node()
    assert first.do(_claim, place) is None
    assert first.do(nodes.log_of) == []
    refused = second.do(_claim, place)
    assert re.fullmatch(rf"pid {first.pid}, .+, \d+ s old", refused)
    assert second.do(_claim, place, 8) is None, "another id"
    assert second.do(_claim, place, 7, "other") is None, "another job"
    first.do(_release)
    assert second.do(_claim, place) is None
    assert os.path.exists(f"{place}/{CLAIM}")
    second.do(_release)
    assert not os.path.exists(f"{place}/{CLAIM}")


@pytest.mark.parametrize("how", ["killed", "killed, a forked child lives on"])
def test_a_claim_ends_with_its_process(start_node: Start, place: str, how: str) -> None:
    first, second = start_node(), start_node()
    assert first.do(_claim, place) is None
    child = first.do(_fork) if "child" in how else None
    try:
        assert second.do(_claim, place) is not None
        ended = os.pidfd_open(first.pid)
        os.kill(first.pid, signal.SIGKILL)  # not Node.kill, which waits for the child as well
        assert select.select([ended], [], [], 20)[0], "with all of its threads"
        os.close(ended)
        assert second.do(_claim, place) is None, "there is nothing to wait for"
    finally:
        if child is not None:
            os.kill(child, signal.SIGKILL)


def test_a_stopped_process_keeps_its_claim(start_node: Start, place: str) -> None:
    first, second = start_node(), start_node()
    assert first.do(_claim, place) is None
    first.pause()
    assert second.do(_claim, place) is not None
    first.resume()


def test_a_sweep_of_another_process_takes_no_claim_away(start_node: Start, place: str) -> None:
    first, second = start_node(), start_node()
    assert first.do(_claim, place) is None
    path = Path(place) / CLAIM
    os.utime(path, (1.0, 1.0))
    directory = RuntimeDir(Path(place))
    remove_stale_files(directory)
    directory.close()
    assert path.exists()
    assert second.do(_claim, place) is not None


def test_the_holder_is_known_whatever_its_predecessor_left(start_node: Start, place: str) -> None:
    Path(place, CLAIM).write_text('{"pid": 1, "program": "' + "x" * 1000 + '"}')
    first, second = start_node(), start_node()
    assert first.do(_claim, place) is None
    assert second.do(_claim, place).startswith(f"pid {first.pid}, ")


def test_who_was_refused_is_known_until_the_holder_ends(start_node: Start, place: str) -> None:
    first, second = start_node(), start_node()
    first.do(_claim, place)
    second.do(_claim, place)
    holder = Address(7, f"{first.pid:032x}")
    directory = RuntimeDir(Path(place))
    claims = Claims(directory, Address(9, "f" * 32))
    refused = claims.refused_beside(holder)
    assert refused is not None
    assert refused.pid == second.pid
    assert claims.refused_beside(Address(7, "e" * 32)) is None
    first.do(_release)
    assert claims.refused_beside(holder) is None
    assert os.listdir(place) == []
    directory.close()


def test_a_claim_that_is_removed_and_taken_at_once_is_one(start_node: Start, place: str) -> None:
    """Many that come and go, beside one that sweeps: never two at once."""
    racers, sweeper = [start_node() for _ in range(3)], start_node()
    sweeper.begin(_remove_stale_files, place, 300)
    for racer in racers:
        racer.begin(_race, place, 30)
    for racer in racers:
        racer.result()
    sweeper.result()


def _remove_stale_files(here: nodes.Here, place: str, rounds: int) -> int:
    directory = RuntimeDir(Path(place))
    for _ in range(rounds):
        for name in (CLAIM, "witness"):
            with contextlib.suppress(OSError):
                os.utime(f"{place}/{name}", (1.0, 1.0))  # as old as one that was left over
        remove_stale_files(directory)
    directory.close()
    return rounds


def test_a_claim_that_somebody_removed_is_not_taken_from_its_next_holder(
    start_node: Start, place: str
) -> None:
    first, second, third = (start_node() for _ in range(3))
    assert first.do(_claim, place) is None
    os.unlink(f"{place}/{CLAIM}")  # a cleaner
    assert second.do(_claim, place) is None
    first.do(_release)
    assert third.do(_claim, place) is not None


def test_a_claim_cannot_be_taken_once_it_was_closed(start_node: Start, place: str) -> None:
    node = start_node()
    node.do(_claim, place)
    node.do(_release)
    with pytest.raises(RemoteError, match="finalized") as caught:
        node.do(_take_again)
    assert caught.value.kind == "RuntimeError"
    assert node.do(_claim, place) is None


def _take_again(here: nodes.Here) -> None:
    here.any["claims"].take()


def _race(here: nodes.Here, place: str, rounds: int) -> None:
    """So many rounds as the holder: who is refused in the meantime tries again."""
    taken, engine = 0, Address(7, f"{os.getpid():032x}")
    deadline = time.monotonic() + nodes.SECONDS / 2
    while taken < rounds:
        assert time.monotonic() < deadline, f"it had the claim {taken} times"
        directory = RuntimeDir(Path(place))
        claims = Claims(directory, engine)
        if claims.take() is None:
            taken += 1
            witness = f"{place}/witness"
            fd = os.open(witness, os.O_CREAT | os.O_EXCL)  # fails where another one is inside
            os.close(fd)
            os.unlink(witness)
        claims.close()
        directory.close()


def test_a_directory_that_cannot_be_made_again_is_an_error_in_words(
    start_node: Start, runtime_dir: Path
) -> None:
    node = start_node(1)
    for path in runtime_dir.iterdir():
        path.unlink()
    runtime_dir.rmdir()
    runtime_dir.write_text("")
    with pytest.raises(
        RemoteError, match=r"cannot claim cluster id 1 .* Not a directory"
    ) as caught:
        node.do(nodes.link, "pair", {1: 0, 2: 1})
    assert caught.value.status == "LLM_FAILED"


@pytest.fixture
def claims(runtime_dir: Path) -> Iterator[Claims]:
    """A claim of this process, as long as no test of another process is about it."""
    with ExitStack() as stack:
        directory = RuntimeDir(runtime_dir)
        stack.callback(directory.close)
        made = Claims(directory, Address(7, "a" * 32))
        stack.callback(made.close)
        yield made


def test_a_claim_that_is_held_is_taken_once(claims: Claims) -> None:
    assert claims.take() is None
    before = descriptors.count()
    for _ in range(3):
        assert claims.take() is None
    assert descriptors.falls_to(before)


def _failing(number: int) -> Callable[..., None]:
    def lockf(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return lockf


@pytest.mark.parametrize("number", UNSUPPORTED)
def test_where_files_have_no_locks_an_engine_works_and_says_so(
    claims: Claims,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    monkeypatch.setattr(fcntl, "lockf", _failing(number))
    assert claims.take() is None
    assert "would not be noticed: set DATADIST_RUNTIME_DIR to a local directory" in caplog.text


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_claim_needs_no_space(
    claims: Claims,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    monkeypatch.setattr(os, "pwrite", _failing(number))
    assert claims.take() is None
    assert claims.is_held
    assert "is full, so others cannot see which process has cluster id 7" in caplog.text


@pytest.mark.parametrize(
    ("number", "refused"), [(errno.EAGAIN, True), (errno.EACCES, True), (errno.EIO, False)]
)
def test_a_claim_that_is_not_had_leaves_no_descriptor(
    claims: Claims, monkeypatch: pytest.MonkeyPatch, number: int, refused: bool
) -> None:
    monkeypatch.setattr(fcntl, "lockf", _failing(number))
    before = descriptors.count()
    for _ in range(3):
        if refused:
            assert claims.take() == UNKNOWN
        else:
            with pytest.raises(OSError, match="Input/output error"):
                claims.take()
    assert descriptors.falls_to(before)
