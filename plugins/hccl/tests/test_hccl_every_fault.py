"""Every function of the libraries fails once, at each of its calls in the life of a transport.

Whatever fails: an error of the interface, nothing left behind, an end within seconds, and the next
life in the same processes is as good as the first.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from datadist_hccl import abi
from hccl_sim import ranks
from hccl_sim.ranks import MIB, Ranks

from datadist.transport import Placement, Region, TransportError
from tests.nodes import Here, RemoteError

Start = Callable[..., Ranks]

HCCS = {"HCCL_INTRA_ROCE_ENABLE": "0", "HCCL_INTRA_PCIE_ENABLE": "1"}
SECONDS = 30.0
"""For linking."""
LONG = 20.0
"""Longer than anything may take on the rank that has the fault; linking may take SECONDS."""
MOST_CALLS = 2
"""The first calls of a function are tried, and the last one."""
PARTS = 4

CREATORS = {
    "aclInit", "aclrtSetDevice", "aclrtCreateContext", "aclrtCreateStreamWithConfig", "aclrtMalloc",
    "aclrtMallocHost", "HcclCommInitClusterInfoMemConfig", "HcclRegisterGlobalMem",
}  # fmt: skip
"""Of these nobody can know what they made when they report a failure."""
ENDS = {
    "aclrtResetDevice": {"devices"},
    "aclrtDestroyContext": {"contexts", "devices"},
    "aclrtDestroyStream": {"streams", "contexts", "devices"},
    "aclrtFree": {"allocations", "contexts", "devices"},
    "aclrtFreeHost": {"allocations", "contexts", "devices"},
    "HcclCommDestroy": {"communicators", "registrations", "allocations", "contexts", "devices"},
}
"""What stays when one of these fails with a code that does not say whether it did its work: calling it
again could end the process. Nothing else may stay."""
WRONG = {"aclrtFree", "aclrtFreeHost"}
"""When these did not free, the device is given back with memory; nobody could do better."""


# -- one life, in three parts; in the processes ----------------------------------------------------


def _prepare_process(here: Here, device: int) -> dict[str, int]:
    """Memory of the user, which outlives all transports; what there is then."""
    import hccl_sim

    sim = here.any["sim"] = hccl_sim.Simulator()
    sim.use_device(device)
    here.any["base"] = sim.malloc(MIB)
    return _live(here)


def _live(here: Here) -> dict[str, int]:
    live: dict[str, int] = here.any["sim"].live()
    return live


def _allowed(here: Here, step: Callable[[], Any]) -> Any:
    """Run a step; note its failure, which must be one of the interface."""
    began = time.monotonic()
    try:
        return step()
    except (TransportError, MemoryError) as error:
        here.any["failure"] = f"{type(error).__name__}: {error}"
        return None
    finally:
        here.any["longest"] = max(here.any["longest"], time.monotonic() - began)


def _begin(here: Here, device: int, name: str, plan: Any, table: str, pids: list[int]) -> Any:
    """Everything up to the offers: those and the addresses, or None."""
    here.any["failure"], here.any["longest"], here.any["rank"] = None, 0.0, None
    if plan is not None:
        symbol, code, nth, after = plan
        here.any["sim"].fault(symbol, code, first=nth, last=nth, after=after)
    rank = pids.index(ranks.pid(here))
    _allowed(here, lambda: ranks.start(here, device, {}))
    if here.any["rank"] is None or here.any["failure"]:
        return None
    own = ranks.of(here)

    def register() -> None:
        own.regions["user"] = own.transport.register(here.any["base"], MIB, Placement.DEVICE)

    _allowed(here, register)
    labels = [label for label in ("device", "host", "user") if label in own.regions]
    opened = _allowed(
        here,
        lambda: ranks.open_link(here, name, rank, pids, table, "read_write", labels, SECONDS),
    )
    return None if opened is None else (opened, ranks.addresses(here))


def _meet(here: Here, name: str, other: int, offer: bytes, known: dict[str, int]) -> str | None:
    """Attach, join and swap blobs; why that failed."""
    _allowed(here, lambda: ranks.attach(here, name, {other: (offer, known)}))
    if _allowed(here, lambda: ranks.join(here, name, SECONDS)) is not None:
        _allowed(here, lambda: ranks.exchange(here, name, b"x" * 600))
    failure: str | None = here.any["failure"]
    return failure


def _meet_aside(here: Here, *args: Any) -> None:
    """The same on a thread, since the other rank may never come."""
    here.any["aside"] = threading.Thread(target=_meet, args=(here, *args))
    here.any["aside"].start()


def _met_aside(here: Here, name: str, wanted: bool) -> str | None:
    """The end of that; where it is not ``wanted`` any more, the link is closed."""
    if not wanted:
        ranks.of(here).links[name].close()
    here.any["aside"].join(SECONDS)
    assert not here.any["aside"].is_alive()
    failure: str | None = here.any["failure"]
    return failure


def _use(here: Here, name: str, other: int) -> str | None:
    """Every operation once, whether or not an earlier one failed; why one failed."""
    own = ranks.of(here)

    def late() -> None:
        own.regions["late"] = own.transport.allocate(MIB, Placement.HOST)

    def remap() -> None:
        own.transport.remap([Region(own.regions["device"].address, MIB, Placement.DEVICE)])

    many = [(4096 * i, 4096 * i, 4000) for i in range(300)]
    _allowed(here, late)
    _allowed(here, remap)
    _allowed(here, lambda: ranks.put(here, "device", b"\1" * MIB))
    _allowed(here, lambda: ranks.move(here, name, other, many))
    _allowed(here, lambda: ranks.move(here, name, other, many, write=True))
    if "late" in own.regions:
        _allowed(here, lambda: ranks.move(here, name, other, [(0, 0, 100)], local="late"))
    failure: str | None = here.any["failure"]
    return failure


def _end(here: Here) -> tuple[str | None, float, dict[str, int]]:
    """Close everything, which never raises: the first failure, the longest step, what is left."""
    began = time.monotonic()
    rank = here.any["rank"]
    if rank is not None:
        ranks.finish(here)
    here.any["sim"].clear()
    longest = max(here.any["longest"], time.monotonic() - began)
    return here.any["failure"], longest, _live(here)


def _violations(here: Here) -> str:
    text: str = here.any["sim"].violations()
    return text


def _calls(here: Here, symbols: list[str]) -> dict[str, int]:
    return {symbol: here.any["sim"].calls(symbol) for symbol in symbols}


# -- the test's side --------------------------------------------------------------------------------


class Lives:
    """Two processes that live one life after another."""

    def __init__(self, group: Ranks) -> None:
        self.group = group
        self.quiet = group.all(lambda rank: (_prepare_process, group.device_of(rank)))
        self.pids = group.all(lambda _rank: (ranks.pid,))
        self._number = 0

    def live(self, plan: Any = None) -> tuple[str | None, float, dict[str, int]]:
        """One life, with a fault on rank 0: its failure, its longest step, what is left of it."""
        name, group = f"life-{self._number}", self.group
        self._number += 1
        begun = group.all(
            lambda rank: (
                _begin, group.device_of(rank), name, None if rank else plan, group.table, self.pids
            )
        )  # fmt: skip
        if None not in begun:
            (mine, here), (theirs, there) = begun
            group[1].do(_meet_aside, name, 0, mine[1], here)
            failure = group[0].do(_meet, name, 1, theirs[0], there)
            if failure is None:
                assert group[1].do(_met_aside, name, True) is None
                group[0].do(_use, name, 1)
            result = group[0].do(_end)
            if failure is not None:
                group[1].do(_met_aside, name, False)
        else:
            result = group[0].do(_end)
        other = group[1].do(_end)
        assert other[2] == self.quiet[1], "the other rank"
        failure, longest, left = result
        return failure, longest, {k: v - self.quiet[0][k] for k, v in left.items()}


def _plans(lives: Lives, symbols: list[str]) -> Iterator[tuple[str, int, int, bool]]:
    before = lives.group[0].do(_calls, symbols)
    assert lives.live()[0] is None
    after = lives.group[0].do(_calls, symbols)
    for symbol in symbols:
        count = after[symbol] - before[symbol]
        assert count, f"{symbol} is not called"
        code = 4 if symbol.startswith("Hccl") else 507899
        for nth in sorted({*range(1, min(count, MOST_CALLS) + 1), count}):
            yield symbol, code, nth, False
            if symbol not in CREATORS:
                yield symbol, code, nth, True


NUMBERED = [name for name, (result, _) in (abi.ACL | abi.HCCL).items() if result is ctypes.c_int32]
UNUSED = {"aclrtGetDeviceInfo", "aclrtStreamQuery"}
"""Only links by address look at the device, and only late transfers over RDMA at a stream."""
OF_LINKS = [
    "HcclCommPrepare", "HcclExchangeMemDesc", "HcclBatchGet", "HcclBatchPut",
    "aclrtSynchronizeStreamWithTimeout", "aclrtStreamAbort", "aclrtDestroyStream",
    "aclrtCreateStreamWithConfig", "HcclCommUnbindMem", "HcclCommDestroy",
]  # fmt: skip
"""What a failure of these does depends on how the ranks are connected."""


def _try(lives: Lives, plan: tuple[str, int, int, bool]) -> str:
    """What is wrong with a life that has this fault; "again" where other processes are needed."""
    failure, longest, left = lives.live(plan)
    stays = {kind for kind, count in left.items() if count}
    problems = []
    if longest > LONG:
        problems.append(f"took {longest:.1f} s")
    if not stays <= ENDS.get(plan[0], set()):
        problems.append(f"left {left}")
    if plan[0] not in WRONG and (text := lives.group[0].do(_violations)):
        problems.append(text)
    if problems:
        return f"{plan}: {'; '.join(problems)} ({failure})"
    return "again" if stays or plan[0] in WRONG else ""


@pytest.mark.parametrize("part", range(PARTS))
def test_a_function_that_fails_once(start_ranks: Start, part: int) -> None:
    _try_all(start_ranks, 1, [name for name in NUMBERED if name not in UNUSED][part::PARTS])


@pytest.mark.parametrize("part", range(2))
def test_a_function_that_fails_once_over_rdma(start_ranks: Start, part: int) -> None:
    _try_all(start_ranks, 2, OF_LINKS[part::2])


def _try_all(start_ranks: Start, servers: int, symbols: list[str]) -> None:
    lives = Lives(start_ranks(2, servers, HCCS))
    problems = []
    for plan in list(_plans(lives, symbols)):
        try:
            found = _try(lives, plan)
        except (EOFError, OSError, AssertionError, RemoteError, TimeoutError) as error:
            found = f"{plan}: {type(error).__name__}: {error}"
        if found:
            for node in lives.group.nodes:
                node.kill()
            lives = Lives(start_ranks(2, servers, HCCS))
        if found not in ("", "again"):
            problems.append(found)
    assert lives.live()[0] is None
    assert not problems, "\n".join(problems)
