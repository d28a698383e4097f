"""Workloads between this process and a peer, one after another."""

from __future__ import annotations

import itertools
import random
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

from datadist.bench.limits import HostLimits, Limits
from datadist.bench.measured_engine import OWN, PEER, MeasuredEngine, RemoteEngine, Settings
from datadist.bench.results import Latency, LinkTime, Series, ThreadSpeed, Throughput
from datadist.bench.shapes import MIB, ONE_BLOCK, SHAPES, Shape
from datadist.bench.stream_limit import StreamLimit
from datadist.transport import KnownWay

Progress = Callable[[str], None]
GIB = 1 << 30
ROUND_TRIP = "TCP request and answer"
SPARE = 32 * MIB


class Pair:
    """An engine in this process and a linked peer in a separate process."""

    def __init__(
        self, settings: Settings, pool: int, kind: type[MeasuredEngine] = MeasuredEngine
    ) -> None:
        self.settings = settings
        self.peer = RemoteEngine(PEER, settings, kind)
        self.own = MeasuredEngine(OWN, settings)
        self._comm_id: int | None = None
        try:
            self.peer.begin("start", pool)
            self.init_seconds = self.own.start(pool)
            self.peer.result()
        except BaseException:
            self.close()
            raise

    def link(self, name: str = "bench") -> None:
        """Link, until it is OK here."""
        self.peer_comm_id = self.peer.call("link", name, 2)
        self._comm_id = self.own.link(name, 2)
        self.own.wait(self._comm_id)

    def unlink(self) -> None:
        """Undo :meth:`link` at both ends."""
        self.peer.begin("unlink", self.peer_comm_id)
        assert self._comm_id is not None
        self.own.unlink(self._comm_id)
        self.peer.result()

    @contextmanager
    def timed_transport(self) -> Iterator[list[float]]:
        """Collects the seconds of each call into the transport."""
        link: Any = self.own.link_to(PEER)
        name = "read" if self.settings.direction == "pull" else "write"
        operate, known_way, spent = getattr(link, name), link.known_way, list[float]()

        def timed(call: Any, moves: Callable[[Any], bool]) -> Any:
            def timed_call(*args: Any) -> Any:
                began = time.perf_counter()
                answer = call(*args)
                took = time.perf_counter() - began
                spent.extend([took] if moves(answer) else [])
                return answer

            return timed_call

        def timed_way(way: KnownWay) -> Any:
            call = known_way(way)
            return None if call is None else timed(call, lambda answer: answer is not None)

        setattr(link, name, timed(operate, lambda _: True))
        link.known_way = timed_way
        try:
            self.own.forget_routes()
            yield spent
        finally:
            delattr(link, name)
            del link.known_way
            self.own.forget_routes()

    def close(self) -> None:
        """End both."""
        self.own.stop()
        self.peer.close()


@contextmanager
def pair(
    settings: Settings, pool: int, kind: type[MeasuredEngine] = MeasuredEngine
) -> Iterator[Pair]:
    """A pair, the peer of a ``kind``, that is closed at the end, also after an error."""
    both = Pair(settings, pool, kind)
    try:
        yield both
    finally:
        both.close()


def pool_for(settings: Settings, *shapes: Shape) -> int:
    """Bytes of a pool that holds these caches; small where they are elsewhere."""
    if settings.memory != "pool":
        return SPARE
    return sum(shape.cache_bytes for shape in shapes) + SPARE


def throughput(
    settings: Settings, shape: Shape, repeat: int, threads: int, progress: Progress
) -> Throughput:
    """Large transfers with new lists each time, alternating with the reference copies."""
    pull = settings.direction == "pull"
    progress("start two engines")
    with pair(settings, pool_for(settings, shape)) as both:
        progress(f"fill {shape.cache_bytes / MIB:.0f} MiB")
        both.peer.begin("make", "cache", shape, pull)
        both.own.make("cache", shape, not pull)
        cache_id = both.peer.result()

        def move(number: int) -> float:
            return both.own.move("cache", shape, PEER, cache_id, shape.lists(number))

        cold, second, problems = _first_transfers(both, shape, repeat, move, progress)
        limits, beside, applicable = _beside_limits(both, shape, repeat, threads, move, progress)
        warm = Series([seconds for series in beside.values() for seconds in series.seconds])
        progress("what is spent where")
        prepare, transport, cpu = _spent(both, repeat, move)
        progress("verify")
        if pull:
            both.own.clear("cache")
        else:  # the limits have written into our cache, which is the source
            both.own.fill("cache", shape)
            both.peer.call("clear", "cache")
        move(repeat)
        problems += _problems(both, shape, repeat)
        moved = repeat * shape.nbytes / GIB
        return Throughput(
            shape.name, shape.title, shape.nbytes, shape.segments, cold, second, warm, prepare,
            transport, limits, beside, applicable, cpu[0] / moved, cpu[1] / moved, problems,
        )  # fmt: skip


Move = Callable[[int], float]
"""Transfers the lists of that number; returns the seconds."""


def _first_transfers(
    both: Pair, shape: Shape, repeat: int, move: Move, progress: Progress
) -> tuple[Series, Series, list[str]]:
    """Times of the first and second transfers of new links, and problems. The last link stays."""
    first, second, problems = Series(), Series(), list[str]()
    for number in range(repeat):
        progress(f"link {number + 1} of {repeat}")
        both.link(f"bench-{number}")
        first.add(move(number))
        if number == 0:
            problems += _problems(both, shape, 0)
        second.add(move(number + 1))
        if number < repeat - 1:
            both.unlink()
    return first, second, problems


def _beside_limits(
    both: Pair, shape: Shape, repeat: int, threads: int, move: Move, progress: Progress
) -> tuple[dict[str, Series], dict[str, Series], list[str]]:
    """Times of the reference copies, of the transfer right before each of them, and which apply.

    So the caches hold as little of what a copy uses as of what a transfer uses.
    """
    with limits_of(both, shape, threads) as yardsticks:
        limits, ours = ({name: Series() for name in yardsticks.names} for _ in range(2))
        lists = itertools.count()
        for number in range(repeat):
            progress(f"round {number + 1} of {repeat}")
            for name in _in_any_order(yardsticks.names, number):
                ours[name].add(move(next(lists)))
                limits[name].add(yardsticks.measure(name, number))
        return limits, ours, list(yardsticks.applicable)


def _in_any_order(names: Sequence[str], number: int) -> list[str]:
    """Names in an order of that round: a copy through the cache leaves lines there that have yet to be
    written to memory, which slows down what comes next."""
    return random.Random(number).sample(names, len(names))


def limits_of(both: Pair, shape: Shape, threads: int) -> closing[Limits]:
    """The limits of transfers of both caches: of this host's memory, or of the network between two."""
    if both.settings.hosts:
        pull = both.settings.direction == "pull"
        return closing(StreamLimit(both.peer, shape.nbytes, pull=pull))
    pid, theirs = both.peer.call("place", "cache")
    _, mine = both.own.place("cache")
    private = both.settings.memory == "registered"
    transport = both.own.transport
    return closing(HostLimits(transport, shape, mine, pid, theirs, threads, private=private))


def _spent(both: Pair, repeat: int, move: Move) -> tuple[Series, Series, tuple[float, float]]:
    """Seconds before and in the transport, and processor seconds of both ends, for all transfers."""
    prepare, transport = Series(), Series()
    before = both.own.cpu(), both.peer.call("cpu")
    with both.timed_transport() as spent:
        for number in range(repeat):
            whole = move(number)
            transport.add(spent[-1])
            prepare.add(whole - spent[-1])
    return prepare, transport, (both.own.cpu() - before[0], both.peer.call("cpu") - before[1])


def _problems(both: Pair, shape: Shape, number: int) -> list[str]:
    """Problems after transfer ``number`` into a zeroed cache."""
    lists = shape.lists(number)
    if both.settings.direction == "pull":
        return both.own.problems("cache", shape, lists)
    return list(both.peer.call("problems", "cache", shape, lists))


def latency(settings: Settings, repeat: int, progress: Progress) -> Latency:
    """``repeat`` transfers of one block each, with new lists each time."""
    shape, pull = ONE_BLOCK, settings.direction == "pull"
    progress("start two engines")
    with pair(settings, pool_for(settings, shape)) as both:
        both.peer.begin("make", "cache", shape, pull)
        both.own.make("cache", shape, not pull)
        cache_id = both.peer.result()
        both.link()

        both.own.move("cache", shape, PEER, cache_id, shape.lists(0))
        problems = _problems(both, shape, 0)
        lists = [shape.lists(number) for number in range(repeat)]
        both.own.move_each("cache", shape, PEER, lists[: repeat // 10])
        progress(f"{repeat} transfers")
        seconds = both.own.move_each("cache", shape, PEER, lists)
        with both.timed_transport() as spent:
            both.own.move_each("cache", shape, PEER, lists[: repeat // 4])
        if not settings.hosts:
            copies = _native_copies(both.own, shape, repeat // 4)
            return Latency(shape.name, seconds, spent, copies, problems)
        with closing(StreamLimit(both.peer, shape.block_bytes, pull=pull)) as stream:
            trips = [stream.measure(stream.compared, n) for n in range(repeat // 4)]
        return Latency(shape.name, seconds, spent, trips, problems, ROUND_TRIP)


def _native_copies(side: MeasuredEngine, shape: Shape, repeat: int) -> list[float]:
    """Seconds of the transport's local copy of one block."""
    base, size, spent = side.place("cache")[1][0], shape.block_bytes, []
    blocks = [(source[0], target[0]) for source, target in map(shape.lists, range(repeat))]
    length = array("q", [size])
    for source, target in blocks:
        began = time.perf_counter()
        side.transport.copy(
            array("q", [base + target * size]), array("q", [base + source * size]), length
        )
        spent.append(time.perf_counter() - began)
    return spent


def link_time(settings: Settings, pool: int, repeat: int, progress: Progress) -> LinkTime:
    """Repeated linking, each time with a first and a second transfer of one block."""
    shape, pull = ONE_BLOCK, settings.direction == "pull"
    progress(f"start two engines with pools of {pool / MIB:.0f} MiB")
    with pair(settings, pool) as both:  # links do not wait for its pages, so neither does this
        both.peer.begin("make", "cache", shape, pull, True)
        both.own.make("cache", shape, not pull, at_once=True)
        cache_id = both.peer.result()
        both.link("warm-up")
        both.unlink()
        result = LinkTime("link", pool, Series(), Series(), Series(), both.init_seconds)
        for number in range(repeat):
            progress(f"link {number + 1} of {repeat}")
            first, next_one = shape.lists(number), shape.lists(number + 1)
            theirs = both.peer.call("link", f"link-{number}", 2)
            began = time.perf_counter()
            ours = both.own.link(f"link-{number}", 2)
            both.own.wait(ours)
            result.ok.add(time.perf_counter() - began)
            both.own.move("cache", shape, PEER, cache_id, first)
            result.first_byte.add(time.perf_counter() - began)
            result.later.add(both.own.move("cache", shape, PEER, cache_id, next_one))
            both.peer.begin("unlink", theirs)
            both.own.unlink(ours)
            both.peer.result()
        return result


def beside(settings: Settings, rounds: int, progress: Progress) -> ThreadSpeed:
    """The speed of a computing Python thread, alone and while this process pulls continuously."""
    shape = replace(SHAPES["paged-mla"], blocks=64)
    pull = settings.direction == "pull"
    with pair(settings, pool_for(settings, shape)) as both:
        both.peer.begin("make", "cache", shape, pull)
        both.own.make("cache", shape, not pull)
        cache_id = both.peer.result()
        both.link()
        result = ThreadSpeed("beside", [], [])
        for number in range(rounds):
            progress(f"round {number + 1} of {rounds}")
            result.alone.append(_steps(lambda: time.sleep(ROUND_SECONDS)))
            result.beside.append(_steps(lambda: _keep_moving(both, shape, cache_id)))
        return result


ROUND_SECONDS = 1.0


def _keep_moving(both: Pair, shape: Shape, cache_id: int) -> None:
    lists = shape.lists(1)
    end = time.perf_counter() + ROUND_SECONDS
    while time.perf_counter() < end:
        both.own.move("cache", shape, PEER, cache_id, lists)


def _steps(meanwhile: Callable[[], None]) -> float:
    """Steps per second of a thread that computes in Python, while the caller does something."""
    stop, count, spent = threading.Event(), 0, 0.0

    def compute() -> None:
        nonlocal count, spent
        began = time.perf_counter()
        while not stop.is_set():
            sum(range(2000))
            count += 1
        spent = time.perf_counter() - began

    thread = threading.Thread(target=compute)
    thread.start()
    meanwhile()
    stop.set()
    thread.join()
    return count / spent
