"""The checks, in order. A check is a list of phases, which both ranks run in step.

A phase returns a text for the report, or raises. Between two phases the ranks exchange their
results, so that a failure on one ends the check on both.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence

import numpy as np

from datadist.base.texts import in_seconds
from datadist.transport import (
    FORCE_SECONDS,
    LinkError,
    Placement,
    RegistrationError,
    TransferError,
    TransferTimeout,
)
from datadist_hccl.verify.session import Linked, Session

Phase = Callable[[Session, Linked], "str | None"]

SEGMENT = 4096
REPEATS = 5
ABSENT_SECONDS = 5.0
FENCE_SECONDS = 3.0


def _offsets(session: Session, count: int) -> list[tuple[int, int]]:
    """Scattered segments, in another order at the other rank."""
    places = np.random.default_rng(count).permutation(session.size // SEGMENT)
    half = len(places) // 2
    return [
        (int(a) * SEGMENT, int(b) * SEGMENT)
        for a, b in zip(places[:half], places[half:], strict=False)
    ]


def _only(rank: int, phase: Phase) -> Phase:
    def run(session: Session, linked: Linked) -> str | None:
        return phase(session, linked) if session.rank == rank else None

    return run


def _fill(session: Session, _linked: Linked) -> None:
    session.fill(session.rank)


def _fill_host(session: Session, _linked: Linked) -> None:
    session.fill(10 + session.rank, "host")


def _compare(session: Session, expected: Sequence[tuple[int, int]], reader: int) -> None:
    """Our memory must be our pattern, with segments of the other rank's at these places."""
    wanted, source = session.pattern(session.rank), session.pattern(1 - session.rank)
    for mine, theirs in expected if session.rank == reader else ():
        wanted[mine : mine + SEGMENT] = source[theirs : theirs + SEGMENT]
    wrong = np.flatnonzero(session.contents() != wanted)
    if len(wrong):
        raise AssertionError(f"{len(wrong)} bytes differ, the first at offset {wrong[0]}")


def _scattered(write: bool) -> list[Phase]:
    def move(session: Session, linked: Linked) -> str:
        took = session.move(linked, write, _offsets(session, 300), SEGMENT)
        return f"300 segments of {SEGMENT} bytes in {took * 1e3:.2f} ms"

    def compare(session: Session, _linked: Linked) -> None:
        pairs = _offsets(session, 300)
        if write:
            pairs = [(theirs, mine) for mine, theirs in pairs]
        _compare(session, pairs, reader=1 if write else 0)

    return [_fill, _only(0, move), compare]


def _host_memory() -> list[Phase]:
    def move(session: Session, linked: Linked) -> str:
        session.move(linked, False, [(0, 0)], session.size, remote="host")
        if (session.contents() != session.pattern(11)).any():
            raise AssertionError("the bytes differ")
        return f"{session.size} bytes"

    return [_fill_host, _only(0, move)]


def _exchange(session: Session, linked: Linked) -> str:
    sent = [session.rank] * 5000
    if linked.tell(sent) != [1 - session.rank] * 5000:
        raise AssertionError("other data came back")
    return "about 15 kB each way"


def _rates(write: bool) -> Phase:
    def run(session: Session, linked: Linked) -> str:
        found = []
        for size in (SEGMENT, 128 << 10, session.size):
            count = session.size // size
            offsets = [(i * size, i * size) for i in range(count)]
            best = min(session.move(linked, write, offsets, size) for _ in range(REPEATS))
            found.append(f"{size} B segments {session.size / best / 1e9:.2f} GB/s")
        single = min(session.move(linked, write, [(0, 0)], 64) for _ in range(20))
        return ", ".join([*found, f"64 B alone {single * 1e6:.0f} us"])

    return run


def _time_out(session: Session, linked: Linked) -> str:
    began = time.monotonic()
    try:
        session.move(linked, False, [(0, 0)], session.size, timeout=0.001)
    except TransferTimeout as error:
        took = time.monotonic() - began
        usable = "usable" if error.link_usable else "ended"
        text = f"a limit of 1 ms was reported after {took * 1e3:.1f} ms, the link is {usable}"
        return text + _settle(linked, error)
    return f"{session.size} bytes moved within 1 ms: give a larger --mib to see a timeout"


def _settle(linked: Linked, error: TransferTimeout) -> str:
    """Wait for what goes on, which must not disturb the checks after this one; what became of it."""
    if error.in_flight is None:
        return ""
    began = time.monotonic()
    while not error.in_flight.settled():
        if time.monotonic() - began > FORCE_SECONDS:
            linked.link.force(linked.other)
            return f", what went on was ended by force after {in_seconds(FORCE_SECONDS)}"
        time.sleep(0.0005)
    return f", what went on had settled {(time.monotonic() - began) * 1e3:.1f} ms later"


BASIC: list[tuple[str, list[Phase]]] = [
    ("pull: scattered segments, every byte compared", _scattered(False)),
    ("push: scattered segments, every byte compared", _scattered(True)),
    ("exchange of blobs", [_exchange]),
    ("pull: rates", [_only(0, _rates(False))]),
    ("push: rates", [_only(0, _rates(True))]),
]
HOST_MEMORY = ("pull from host memory (RDMA only)", _host_memory())
TIME_OUT = ("timeout", [_only(0, _time_out)])
AGAIN = ("after the timeout, on a new link", _scattered(False))


def absent(session: Session) -> str:
    """Join without the other rank; on rank 0."""
    began = time.monotonic()
    link = session.open("absent", ABSENT_SECONDS)
    try:
        link.join(ABSENT_SECONDS)
    except LinkError:
        took = time.monotonic() - began
    else:
        raise AssertionError("it met a rank that is not there")
    began = time.monotonic()
    link.close()
    closed = time.monotonic() - began
    return f"{in_seconds(ABSENT_SECONDS)} were given, it took {took:.1f} s, closing {closed * 1e3:.0f} ms"


def foreign(session: Session) -> str:
    """Device memory is accepted as such, and no other memory is. This runs last, since it may crash."""
    transport, size = session.transport, SEGMENT
    device, pinned = session.regions["device"].address, session.regions["host"].address
    transport.release(transport.register(device, size, Placement.DEVICE))
    ordinary = ctypes.create_string_buffer(size)
    places = {"pinned": pinned, "ordinary": ctypes.addressof(ordinary), "unmapped": SEGMENT}
    taken = [name for name, address in places.items() if not _is_refused(session, address)]
    if taken:
        raise AssertionError(
            f"taken for memory of the device: {', '.join(taken)} memory of the host"
        )
    return "refused: " + ", ".join(places)


def _is_refused(session: Session, address: int) -> bool:
    try:
        region = session.transport.register(address, SEGMENT, Placement.DEVICE)
    except RegistrationError:
        return True
    session.transport.release(region)
    return False


def fence(session: Session, linked: Linked) -> str:
    """Rank 0 closes its side; after that rank 1 must not reach its memory."""
    linked.tell("ready")
    if session.rank == 0:
        began = time.monotonic()
        reported = linked.link.close()
        took = time.monotonic() - began
        time.sleep(2 * FENCE_SECONDS)
        return f"closed in {took * 1e3:.0f} ms, ranks reported as able to write: {sorted(reported)}"
    time.sleep(FENCE_SECONDS)
    began = time.monotonic()
    try:
        session.move(linked, True, [(0, 0)], SEGMENT, timeout=FENCE_SECONDS)
    except TransferError as error:
        took = time.monotonic() - began
        return f"a write failed after {took * 1e3:.0f} ms: {type(error).__name__}: {error}"
    raise AssertionError("a write to the closed side succeeded")
