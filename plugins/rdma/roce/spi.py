"""Functions for nodes: the transport by itself, without core."""

from __future__ import annotations

import ctypes
import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from datadist_rdma import RdmaTransport

from datadist.rank_table import parse_rank_table
from datadist.transport import Access, Group, Offer, Peer, Placement, Region, TransportOptions
from tests.nodes import Here
from tests.waiting import comes_true

T = TypeVar("T")
MIB = 1 << 20
GUARD = 4096


def start(here: Here, size: int = MIB, options: Mapping[str, Any] | None = None) -> int:
    """Open the transport with one region of ``size`` bytes; returns its address."""
    here.any["transport"] = transport = RdmaTransport(TransportOptions(**(options or {})))
    here.any["region"] = region = transport.allocate(size, Placement.DEVICE)
    here.any["links"] = {}
    return region.address


def stop(here: Here) -> None:
    """Close everything."""
    transport: RdmaTransport = here.any["transport"]
    for link in here.any["links"].values():
        link.close()
    for name in [name for name in here.any if name.startswith("region")]:
        transport.release(here.any.pop(name))
    transport.close()


def register(here: Here, size: int) -> int:
    """Register an array of our own, unaligned; returns its address."""
    base = np.zeros(size + 100, np.uint8)
    here.any["array"] = base
    address = base.ctypes.data + 52
    here.any["region_array"] = here.any["transport"].register(address, size, Placement.HOST)
    return int(address)


def open_link(
    here: Here, name: str, rank: int, access: str, address: str | None = None, table: str = ""
) -> bytes:
    """Open a link of two ranks, the peer at ``address``; returns the offer."""
    other = 1 - rank
    peers = {rank: Peer(rank, f"e{rank}"), other: Peer(other, f"e{other}", address=address)}
    parsed = parse_rank_table(table) if table else None
    group = Group(name, rank, dict(sorted(peers.items())), parsed, time.monotonic() + 60)
    regions: list[Region] = [v for k, v in here.any.items() if k.startswith("region")]
    link = here.any["transport"].open(group, regions, Access(access))
    here.any["links"][name] = link
    return bytes(link.offer(other).data)


def attach(here: Here, name: str, other: int, offer: bytes) -> None:
    """Take the peer's offer."""
    here.any["links"][name].attach(other, Offer(offer))


def connect(
    first: Any, second: Any, name: str = "l", access: str = "read", addresses: Any = (None, None)
) -> None:
    """Link two nodes, the first as rank 0."""
    offers = [
        node.do(open_link, name, rank, access, addresses[1 - rank])
        for rank, node in enumerate((first, second))
    ]
    first.do(attach, name, 1, offers[1])
    second.do(attach, name, 0, offers[0])


def fill(here: Here, seed: int, region: str = "region") -> None:
    """Numbers that :func:`expected` foretells."""
    memory = here.any[region]
    view = np.frombuffer((ctypes.c_char * memory.size).from_address(memory.address), np.uint8)
    view[:] = expected(seed, memory.size)


def expected(seed: int, size: int) -> Any:
    """Bytes without a period that fits pages or blocks."""
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def content(here: Here, region: str = "region") -> bytes:
    """All bytes of a region."""
    memory = here.any[region]
    return ctypes.string_at(memory.address, memory.size)


def clear(here: Here, value: int = 0, region: str = "region") -> None:
    """Set all bytes."""
    memory = here.any[region]
    ctypes.memset(memory.address, value, memory.size)


def move(
    here: Here, name: str, other: int, verb: str, local: Sequence[int], remote: Sequence[int],
    length: Sequence[int], timeout: float = 20,
) -> float:  # fmt: skip
    """Read or write segments (absolute addresses); returns the seconds it took."""
    vectors = [array("q", numbers) for numbers in (local, remote, length)]
    begun = time.monotonic()
    getattr(here.any["links"][name], verb)(other, *vectors, timeout)
    return time.monotonic() - begun


def try_move(here: Here, *args: Any) -> tuple[str, str, bool | None, float]:
    """As :func:`move`, which is to fail: error type, text, link_usable, seconds."""
    begun = time.monotonic()
    try:
        move(here, *args)
    except Exception as error:
        took = time.monotonic() - begun
        return type(error).__name__, str(error), getattr(error, "link_usable", None), took
    raise AssertionError("the transfer succeeded")


def close_link(here: Here, name: str) -> list[int]:
    """Close a link."""
    return sorted(here.any["links"].pop(name).close())


def abort_during(here: Here, name: str, other: int, *args: Any) -> Any:
    """:func:`try_move`, aborted by another thread once the first bytes have come."""
    return abort_all(here, name, other, [args])[0]


def abort_all(here: Here, name: str, other: int, moves: Sequence[Sequence[Any]]) -> list[Any]:
    """:func:`try_move` for all of them at once, aborted once the first bytes of each have come."""
    link = here.any["links"][name]
    return _end_all(here, [(name, other, *args) for args in moves], lambda: link.abort(other))


def close_all(here: Here, name: str, calls: Sequence[Sequence[Any]]) -> list[Any]:
    """:func:`try_move` for all of them at once; the link is closed when each has begun."""
    return _end_all(here, calls, lambda: close_link(here, name))


def _end_all(here: Here, calls: Sequence[Sequence[Any]], end: Callable[[], object]) -> list[Any]:
    def end_when_begun() -> None:
        while not all(any(ctypes.string_at(local[0], 64)) for _, _, _, local, *_ in calls):
            time.sleep(0.001)
        end()

    thread = threading.Thread(target=end_when_begun, daemon=True)
    thread.start()
    try:
        return together(try_move, here, calls)
    finally:
        thread.join(20)


def together(function: Callable[..., T], here: Here, calls: Sequence[Sequence[Any]]) -> list[T]:
    """What ``function(here, *call)`` returns for each call, all at once on threads of their own."""
    with ThreadPoolExecutor(len(calls)) as pool:
        jobs = [pool.submit(function, here, *call) for call in calls]
        return [job.result(120) for job in jobs]


def move_together(here: Here, *calls: Sequence[Any]) -> list[float]:
    """:func:`move` for each of the calls, all at once; the seconds that each took."""
    return together(move, here, calls)


def try_together(here: Here, *calls: Sequence[Any]) -> list[tuple[str, str, bool | None, float]]:
    """:func:`try_move` for each of the calls, all at once."""
    return together(try_move, here, calls)


def small_beside_large(
    here: Here, large: Sequence[Any], small: Sequence[Any], count: int
) -> tuple[int, list[float], float]:
    """Move ``small`` up to ``count`` times, one after the other, while ``large`` is being moved.

    Returns how many of them ended before the large one, the seconds of each, and those of the large one.
    """
    with ThreadPoolExecutor(1) as pool:
        memory = here.any["region"]
        job = pool.submit(move, here, *large)
        while not any(ctypes.string_at(memory.address, 64)):
            time.sleep(0.0005)
        took = []
        for _ in range(count):
            seconds = move(here, *small)
            if job.done():
                break
            took.append(seconds)
        return len(took), took, job.result(120)


# -- what only some tests need ------------------------------------------------------------------


def release_region(here: Here) -> None:
    """Deregister our memory although a link exposes it, as a faulty owner would."""
    here.any["transport"].release(here.any.pop("region"))


def add_region(here: Here, size: int) -> int:
    """Allocate the region anew; returns its address."""
    here.any["region"] = region = here.any["transport"].allocate(size, Placement.DEVICE)
    return int(region.address)


def pretend_writable(here: Here, name: str, other: int) -> None:
    """Ignore that the peer granted reading only, as a faulty peer would."""
    here.any["links"][name]._paths[other].writable = True


def shift_window(here: Here, name: str, other: int, size: int) -> None:
    """Believe that the peer offered ``size`` bytes more."""
    from datadist_rdma.memory import Ranges

    path = here.any["links"][name]._paths[other]
    begins, ends, keys = (
        path.remote._begins, path.remote._ends, path.remote._keys,
    )  # fmt: skip
    path.remote = Ranges(
        (int(b), int(e - b) + size, int(k)) for b, e, k in zip(begins, ends, keys, strict=True)
    )


def watch_self(here: Here, *args: Any) -> dict[str, Any]:
    """:func:`try_move` while another thread counts; also the processor time of this process."""
    ticks, stop = [0], threading.Event()

    def count() -> None:
        while not stop.wait(0.005):
            ticks[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    cpu = time.process_time()
    try:
        kind, text, _, took = try_move(here, *args)
    finally:
        cpu = time.process_time() - cpu
        stop.set()
        thread.join()
    return {"kind": kind, "text": text, "took": took, "cpu": cpu, "ticks": ticks[0]}


def resources(here: Here) -> tuple[int, int]:
    """Open descriptors and threads of this process."""
    import os

    return len(os.listdir("/proc/self/fd")), threading.active_count()


def falls_to(here: Here, before: tuple[int, int]) -> bool:
    """Whether no more of them are left, in time: a thread may be about to end."""
    return comes_true(
        lambda: all(now <= then for now, then in zip(resources(here), before, strict=True)), 20
    )


def try_register(here: Here, address: int, size: int) -> str:
    """The text of the error of a registration that must fail."""
    from datadist.transport import RegistrationError

    try:
        here.any["transport"].register(address, size, Placement.HOST)
    except RegistrationError as error:
        return str(error)
    raise AssertionError("the registration succeeded")


def start_limited(here: Here, limit: int, size: int) -> str:
    """Allocate as an ordinary user with a limit of locked memory; the error's text."""
    import os
    import resource

    from datadist.transport import RegistrationError

    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
    os.setresuid(65534, 65534, 65534)
    transport = RdmaTransport(TransportOptions())
    try:
        transport.allocate(size, Placement.HOST)
    except RegistrationError as error:
        return str(error)
    finally:
        transport.close()
    raise AssertionError("the registration succeeded")


def move_parallel(here: Here, names: Sequence[str], *args: Any) -> list[float]:
    """The same move over several links at once, each on a thread of its own."""
    return move_together(here, *[(name, *args) for name in names])


def costs(
    here: Here, name: str, other: int, local: Sequence[int], remote: Sequence[int],
    length: Sequence[int],
) -> tuple[float, float, int]:  # fmt: skip
    """Seconds of planning and of posting a read of segments, and the number of posting calls."""
    from datadist_rdma import verbs

    link = here.any["links"][name]
    path = link._paths[other]
    vectors = (array("q", local), array("q", remote), array("q", length))
    path.users["planning"] = None  # as a call that has taken a queue pair
    begun = time.perf_counter()
    for _ in link._plan(other, path, path.remote, verbs.WR_RDMA_READ, vectors)[0]:
        pass
    planning = time.perf_counter() - begun
    del path.users["planning"]
    pair = path.pairs[0]
    post, posts = pair.post, []

    def timed(address: int) -> Any:
        begun = time.perf_counter()
        result = post(address)
        posts.append(time.perf_counter() - begun)
        return result

    pair.post = timed
    try:
        link.read(other, *vectors, 60.0)
    finally:
        del pair.post
    return planning, sum(posts), len(posts)


def describe(here: Here) -> dict[str, Any]:
    """What the transport says of itself."""
    return dict(here.any["transport"].describe())


def log_of(here: Here, text: str = "") -> list[str]:
    """Log lines that contain a text."""
    return [line for line in here.log if text in line]
