"""Transfers that the kit's processes repeat, and look at; each function runs in such a process."""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from datadist.testing import memory_operations
from datadist.testing.child import State, Task
from datadist.testing.operations import Move, move
from datadist.testing.outcome import Outcome
from datadist.testing.pattern import difference, pattern

ACK = b"."


def _socket(state: State) -> socket.socket:
    """The socket to the other process, which came with the call."""
    (fd,) = state.take_fds()
    sock = socket.socket(fileno=fd)
    sock.settimeout(60)
    return sock


def _compare(state: State, label: str, seed: int) -> str | None:
    size = state.regions[label].size
    actual = memory_operations.content(state, label, 0, size)  # first of all
    return difference(actual, pattern(seed, size))


# -- what is there when a call returns ---------------------------------------------------------


def write_and_tell(
    state: State, order: Move, label: str, seeds: Sequence[int]
) -> tuple[Outcome, None]:
    """Write memory with new content again and again, and tell the owner the moment it returned."""
    with _socket(state) as owner:
        for seed in seeds:
            memory_operations.fill(state, label, seed)
            outcome = move(state, order)
            owner.send(ACK)
            if not outcome.ok or not owner.recv(1):
                break
    return outcome, None


def compare_when_told(state: State, label: str, seeds: Sequence[int]) -> str | None:
    """The owner's part: how its memory differed from what had been written; None if never."""
    with _socket(state) as writer:
        for number, seed in enumerate(seeds):
            if not writer.recv(1):
                return None  # the write failed, as the other process says
            text = _compare(state, label, seed)
            if text:
                return f"write {number + 1} of {len(seeds)}: {text}"
            writer.send(ACK)
    return None


def read_and_compare(
    state: State, order: Move, label: str, seeds: Sequence[int]
) -> tuple[Outcome, str | None]:
    """Read memory with new content again and again, and compare the moment it returned."""
    with _socket(state) as owner:
        for number, seed in enumerate(seeds):
            owner.send(ACK)
            owner.recv(1)
            outcome = move(state, order)
            if not outcome.ok:
                break
            text = _compare(state, label, seed)
            if text:
                return outcome, f"read {number + 1} of {len(seeds)}: {text}"
    return outcome, None


def fill_when_told(state: State, label: str, seeds: Sequence[int]) -> None:
    """The owner's part: new content before each read."""
    with _socket(state) as reader:
        for seed in seeds:
            if not reader.recv(1):
                return
            memory_operations.fill(state, label, seed)
            reader.send(ACK)


# -- what transfers leave, and what idle links take --------------------------------------------


def move_many(state: State, order: Move, most: int, seconds: float) -> tuple[int, Outcome]:
    """Repeat a transfer; how often, and the last outcome."""
    end = time.monotonic() + seconds
    count = 0
    while count < most and (count < most // 8 or time.monotonic() < end):
        outcome = move(state, order)
        count += 1
    return count, outcome


def resident_bytes(state: State) -> int:
    """Memory of the process in use, with what the allocators can give back given back."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def idle_seconds(state: State, seconds: float) -> float:
    """Processor time of this process, all threads, while it does nothing for ``seconds``."""
    begin = time.process_time()
    time.sleep(seconds)
    return time.process_time() - begin


# -- several transfers at a time ---------------------------------------------------------------


@dataclass(frozen=True)
class Lane:
    """One of several transfers that go on at the same time, repeated by a thread of its own.

    Reads fetch a part of the owner's memory that moves on with each round. Writes put a part of ours
    there that does the same, then read it back.
    """

    order: Move
    """One segment: its local address is the lane's part of our memory ``target``."""
    source: int
    """Where the first round takes its bytes: the owner's address, or ours for a lane that writes."""
    seed: int
    """Of the memory where ``source`` is."""
    offset: int
    """Of ``source`` in that memory."""
    target: str
    target_offset: int
    room: int
    """Bytes that follow ``source`` for later rounds."""
    size: int
    """Of the memory where ``source`` is."""


def run_lanes(state: State, lanes: Sequence[Lane], seconds: float) -> list[str | None]:
    """Run all lanes for some time, at least three rounds each; what went wrong in each."""
    start = threading.Barrier(len(lanes))
    tasks = [Task(lambda lane=lane: _run_lane(state, lane, start, seconds)) for lane in lanes]  # type: ignore[misc]
    wait = seconds + 10 * max(lane.order.timeout for lane in lanes)
    return [task.result(wait) for task in tasks]


def _run_lane(state: State, lane: Lane, start: threading.Barrier, seconds: float) -> str | None:
    content = pattern(lane.seed, lane.size)
    (size,) = lane.order.length
    start.wait(30)
    end, number = time.monotonic() + seconds, 0
    while number < 3 or time.monotonic() < end:
        step = number * 4099 % (lane.room + 1)
        for order in _round(lane, step):
            outcome = move(state, order)
            if not outcome.ok:
                return f"round {number + 1} of {size} bytes: {outcome}"
        actual = memory_operations.content(state, lane.target, lane.target_offset, size)
        text = difference(actual, content[lane.offset + step : lane.offset + step + size])
        if text:
            return f"round {number + 1} of {size} bytes: {text}"
        number += 1
    return None


def _round(lane: Lane, step: int) -> list[Move]:
    order = lane.order
    there = type(order.local)("q", [lane.source + step])
    if not order.write:
        return [replace(order, remote=there)]
    return [replace(order, local=there), replace(order, write=False)]


# -- the order of reads ------------------------------------------------------------------------


def clear(state: State, label: str) -> None:
    """Zeros in all of a region that the CPU can address."""
    region = state.regions[label]
    ctypes.memset(region.address, 0, region.size)


def start_counting(state: State, label: str, size: int, seconds: float) -> None:
    """Run :func:`_count_up` on a thread."""
    stop = state.any["stop"] = threading.Event()
    address = state.regions[label].address
    state.tasks["counting"] = Task(lambda: _count_up(address, size, stop, seconds))


def stop_counting(state: State) -> int:
    """End it; the number that it reached."""
    state.any["stop"].set()
    reached: int = state.tasks.pop("counting").result(30)
    return reached


def _count_up(address: int, size: int, stop: threading.Event, seconds: float) -> int:
    """Write a number into the word at ``size``, then into all words before it; the next one; ..."""
    last = ctypes.c_int64.from_address(address + size)
    end = time.monotonic() + seconds
    words, number, fence = size // 8, 0, threading.Lock()
    while not stop.is_set() and time.monotonic() < end:
        number += 1
        data = number.to_bytes(8, "little") * words
        last.value = number
        with fence:  # for processors that reorder stores
            pass
        ctypes.memmove(address, data, size)
    return number


def read_in_order(
    state: State, order: Move, label: str, size: int, seconds: float
) -> tuple[int, str | None]:
    """Read what :func:`count_up` writes; how often, and where the last segment was the oldest."""
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        outcome = move(state, order)
        count += 1
        if not outcome.ok:
            return count, str(outcome)
        words = memoryview(memory_operations.content(state, label, 0, size + 8)).cast("q")
        newest = max(words[:-1])
        if newest > words[-1]:
            return count, (
                f"read {count}: the last segment has number {words[-1]}, another one {newest}, "
                f"which was written after it"
            )
    return count, None


# -- an asker that checks nothing --------------------------------------------------------------


def skip_checks(state: State, link: str, rank: int, name: str) -> None:
    """Have the link ask ``rank`` for whatever it is told to, by the author's function."""
    module, _, function = name.partition(":")
    getattr(importlib.import_module(module), function)(state.links[link], rank)
