"""The transport beside NIXL itself: the same bytes, in one run, in turns.

Run it on an idle machine, where UCX has `lo` only::

    unshare -n sh -c "ip link set lo up; python plugins/nixl/benchmarks/beside_raw.py"

Two processes for each side. Ours: a read through the transport. Raw: a write of NIXL by the owner of the
memory, begun by a notification of NIXL, ended by the one that comes with the data. Both sides of raw
spin without a pause, as no library could. Readers have one processor and owners another one, since those
of raw starve each other on the same.

After a pause raw is measured twice: with an owner that spins, and with one that sleeps in the kernel, as
the owner of a library has to. NIXL gives no descriptor for that. This owner takes those of UCX from
/proc/self/fd: every epoll instance that has come with its agent. It waits for them by `poll`, and looks
for notifications for half a millisecond after each event. The reader of raw spins in both.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import json
import mmap
import multiprocessing
import os
import resource
import select
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from statistics import median, quantiles
from typing import Any

import numpy as np
from datadist_nixl import NixlTransport, library
from datadist_nixl.library import Agent
from numpy.typing import NDArray

from datadist.base.processor import processor as processor_model
from datadist.transport import Access, Group, Offer, Peer, Placement, TransportOptions

MIB = 1 << 20
SIZE = 256 * MIB
SPIN_SECONDS = 0.0005
PAUSE = 0.05
Rows = NDArray[np.uint64]


def shapes() -> dict[str, tuple[int, int]]:
    """Block and number of blocks of each transfer."""
    return {
        "4 KiB": (4096, 1),
        "contiguous, 256 MiB": (SIZE, 1),
        "144 KiB pages (as paged-mla), 137 MiB": (147456, 976),
        "64 KiB pages, 128 MiB": (65536, 2048),
        "16 KiB pages, 64 MiB": (16384, 4096),
        "4 KiB pages, 64 MiB": (4096, 16384),
    }


def offsets(block: int, count: int, seed: int) -> NDArray[np.int64]:
    """Places of blocks that do not follow each other."""
    places = np.random.default_rng(seed).permutation(SIZE // block)[:count]
    return places.astype(np.int64) * block


# -- raw -------------------------------------------------------------------------------------------


class Raw:
    """One agent of NIXL, with memory, and the other one's name."""

    def __init__(self, pipe: Connection) -> None:
        api = library.load()
        self._agent = Agent(api, "lo", "tcp")
        self.agent = self._agent._agent
        self.memory = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory[:] = b"\1" * SIZE
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.agent.register_memory([(self.address, SIZE, 0, "")], "DRAM")
        pipe.send((self.agent.get_agent_metadata(), self.address))
        metadata, self.theirs = pipe.recv()
        name = self.agent.add_remote_agent(metadata)
        self.peer = name.decode() if isinstance(name, bytes) else name

    def rows(self, base: int, block: int, places: NDArray[np.int64]) -> Rows:
        """Descriptors."""
        table = np.zeros((len(places), 3), np.uint64)
        table[:, 0], table[:, 1] = base + places, block
        return table

    @functools.cache  # noqa: B019 - one for the life of the process
    def blocks(self, block: int, count: int) -> tuple[Rows, Rows]:
        """Descriptors of a shape; made once, since ours are not made in the time either."""
        return (
            self.rows(self.address, block, offsets(block, count, 1)),
            self.rows(self.theirs, block, offsets(block, count, 2)),
        )

    def wait(self) -> bytes:
        """The next notification."""
        while not (found := self.agent.get_new_notifs()):
            pass
        return bytes(next(iter(found.values()))[0])

    def write(self, block: int, count: int) -> None:
        """Write, tell, and wait until NIXL has done it."""
        mine, theirs = self.blocks(block, count)
        agent = self.agent
        handle = agent.initialize_xfer(
            "WRITE", agent.get_xfer_descs(mine, "DRAM"), agent.get_xfer_descs(theirs, "DRAM"),
            self.peer, b"done",
        )  # fmt: skip
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        assert state == "DONE"
        handle.release()

    def ask(self, what: bytes) -> None:
        """Send a notification."""
        self.agent.send_notif(self.peer, what)


def epolls() -> set[int]:
    """The epoll instances of this process."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one of the folder
            if "eventpoll" in os.readlink(f"/proc/self/fd/{name}"):
                found.add(int(name))
    return found


class Sleeper:
    """Waits for notifications as an owner that sleeps."""

    def __init__(self, raw: Raw, before: set[int]) -> None:
        self._raw = raw
        self._poller = select.poll()
        for fd in epolls() - before:
            self._poller.register(fd, select.POLLIN)

    def wait(self) -> bytes:
        """The next notification."""
        while True:
            until = time.monotonic() + SPIN_SECONDS
            while time.monotonic() < until:
                if found := self._raw.agent.get_new_notifs():
                    return bytes(next(iter(found.values()))[0])
            self._poller.poll()


def serve_raw(pipe: Connection) -> None:
    """The owner."""
    before = epolls()
    raw = Raw(pipe)
    sleeper: Sleeper | None = None
    while True:
        while not pipe.poll(None):
            pass
        if (how := pipe.recv()) == "end":
            return
        if how == "sleep":
            sleeper = sleeper or Sleeper(raw, before)
        wait = sleeper.wait if sleeper and how == "sleep" else raw.wait
        while (order := json.loads(wait()))[1]:
            raw.write(order[0], order[1])


def measure_raw(
    raw: Raw, pipe: Connection, block: int, count: int, rounds: int, owner: str = "spin",
    pause: float = 0,
) -> list[float]:  # fmt: skip
    """Seconds of each round."""
    pipe.send(owner)
    times = []
    for _ in range(rounds):
        time.sleep(pause)
        begun = time.perf_counter()
        raw.ask(json.dumps([block, count]).encode())
        raw.wait()
        times.append(time.perf_counter() - begun)
    raw.ask(json.dumps([0, 0]).encode())
    return times


# -- ours ------------------------------------------------------------------------------------------


class Ours:
    """One transport with a link."""

    def __init__(self, pipe: Connection, rank: int) -> None:
        self.transport = NixlTransport(TransportOptions())
        self.region = self.transport.allocate(SIZE, Placement.HOST)
        ctypes.memset(self.region.address, 1, SIZE)
        peer = Peer(1 - rank, f"bench-{1 - rank}")
        peer = Peer(1 - rank, peer.incarnation, connection=self.transport.connect(peer))
        group = Group("bench", rank, {rank: Peer(rank, f"bench-{rank}"), 1 - rank: peer}, None, 0)
        self.link = self.transport.open(group, [self.region], Access.READ_WRITE)
        pipe.send((self.link.offer(1 - rank).data, self.region.address))
        offer, self.theirs = pipe.recv()
        self.link.attach(1 - rank, Offer(offer))


def serve_ours(pipe: Connection) -> None:
    """The owner: its thread does everything."""
    ours = Ours(pipe, 1)
    while (what := pipe.recv()) != "end":
        assert what == "processor"
        pipe.send(processor())
    ours.link.close()
    ours.transport.close()


def measure_ours(ours: Ours, block: int, count: int, rounds: int) -> list[float]:
    """Seconds of each round; places of blocks are not made in the time, as they are not for raw."""
    local = ours.region.address + offsets(block, count, 2)
    remote = ours.theirs + offsets(block, count, 1)
    length = np.full(count, block, np.int64)
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        ours.link.read(1, local, remote, length, 60)
        times.append(time.perf_counter() - begun)
    return times


def processor() -> float:
    """Seconds of a processor that this process has used."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# -- the run ---------------------------------------------------------------------------------------


def start(serve: Callable[[Connection], None]) -> tuple[Connection, Any]:
    """A process that serves."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(there,), daemon=True)
    process.start()
    if (processors := sorted(os.sched_getaffinity(0)))[1:]:
        os.sched_setaffinity(process.pid or 0, processors[1:])
    return here, process


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--idle", type=float, default=3.0, help="seconds without transfers")
    args = parser.parse_args()
    raw_pipe, _ = start(serve_raw)
    ours_pipe, _ = start(serve_ours)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    print(f"{processor_model()}, {os.cpu_count()} processors")
    raw, ours = Raw(raw_pipe), Ours(ours_pipe, 0)
    for name, (block, count) in shapes().items():
        rounds = 200 if count * block < MIB else 3
        raws: list[float] = []
        mine: list[float] = []
        for turn in range(args.turns + 1):
            here = measure_raw(raw, raw_pipe, block, count, rounds)
            there = measure_ours(ours, block, count, rounds)
            if turn:  # the first one warms up
                raws += here
                mine += there
        tell(name, "median", block * count, median(raws), median(mine))
        tell(name, "best fifth", block * count, quantiles(raws, n=5)[0], quantiles(mine, n=5)[0])
    pauses(raw, raw_pipe, ours, args.turns)
    idle(ours_pipe, args.idle)
    raw_pipe.send("end")
    ours_pipe.send("end")
    ours.link.close()
    ours.transport.close()
    os._exit(0)


def tell(name: str, what: str, size: int, raw: float, mine: float) -> None:
    """One line. The best fifth says more where other processes use the machine."""
    name = f"{name}, {what}"
    if size < MIB:
        print(
            f"{name}: raw {raw * 1e6:.1f} us, ours {mine * 1e6:.1f} us, {(mine - raw) * 1e6:+.1f} us",
            flush=True,
        )
    else:
        print(
            f"{name}: raw {size / raw / 1e9:.2f} GB/s, ours {size / mine / 1e9:.2f} GB/s, "
            f"ratio {raw / mine:.2f}"
        )


def pauses(raw: Raw, pipe: Connection, ours: Ours, turns: int) -> None:
    """Small reads, each after a pause, in turns."""
    times: dict[str, list[float]] = {
        "raw, its owner spins": [],
        "raw, its owner sleeps": [],
        "ours": [],
    }
    for _ in range(turns):
        for name, owner in (("raw, its owner spins", "spin"), ("raw, its owner sleeps", "sleep")):
            times[name] += measure_raw(raw, pipe, 4096, 1, 10, owner, PAUSE)
        for _ in range(10):
            time.sleep(PAUSE)
            times["ours"] += measure_ours(ours, 4096, 1, 1)
    for name, some in times.items():
        fifths = quantiles(some, n=5)
        print(
            f"4 KiB after {PAUSE * 1e3:.0f} ms without transfers, {name}: {median(some) * 1e6:.0f} us "
            f"({fifths[0] * 1e6:.0f} to {fifths[-1] * 1e6:.0f} us in 3 of 5)"
        )


def idle(pipe: Connection, seconds: float) -> None:
    """The processor of idle processes."""
    time.sleep(0.1)
    pipe.send("processor")
    theirs, mine = pipe.recv(), processor()
    time.sleep(seconds)
    pipe.send("processor")
    theirs, mine = pipe.recv() - theirs, processor() - mine
    print(
        f"idle: owner {100 * theirs / seconds:.2f} %, reader {100 * mine / seconds:.2f} % of a processor"
    )


if __name__ == "__main__":
    main()
