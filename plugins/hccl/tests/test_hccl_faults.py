"""What goes wrong: every fault gives its documented error, leaks nothing, and ends in time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hccl_sim import ranks
from hccl_sim.ranks import MIB, Ranks

from datadist.transport import Placement
from tests import torn
from tests.nodes import Here, RemoteError
from tests.waiting import until

Start = Callable[..., Ranks]

HCCS = {"HCCL_INTRA_ROCE_ENABLE": "0", "HCCL_INTRA_PCIE_ENABLE": "1"}
ONE = [(0, 0, MIB)]
SOON = 30.0
"""Seconds within which everything ends that must not wait: far from the limits of what would."""
LONG = 120.0
"""Such a limit, in seconds."""
OLD, NEW = b"\0" * ranks.SIZE, b"\1" * ranks.SIZE

WHILE_STARTING = [
    ("aclInit", 100000),
    ("aclrtGetDeviceCount", 507000),
    ("aclrtSetDevice", 107001),
    ("aclrtGetPhyDevIdByLogicDevId", 507000),
    ("aclrtCreateContext", 507000),
    ("aclrtMalloc", 207001),
    ("aclrtMemset", 507000),
    ("HcclRegisterGlobalMem", 1),
]


@pytest.mark.parametrize(("symbol", "code"), WHILE_STARTING)
def test_a_device_that_does_not_start(start_ranks: Start, symbol: str, code: int) -> None:
    group = start_ranks(1, 1)
    assert group[0].do(_fail_to_start, symbol, code) == ("TransportError", True)
    group[0].do(ranks.start, 0, {})
    assert not any(group[0].do(ranks.finish).values())


def _fail_to_start(_here: Here, symbol: str, code: int) -> tuple[str, bool]:
    import os

    import hccl_sim
    from datadist_hccl import HcclTransport

    from datadist.transport import TransportError, TransportOptions

    sim = hccl_sim.Simulator(os.environ["DATADIST_HCCL_LIBRARIES"])
    sim.fault(symbol, code)
    try:
        HcclTransport(TransportOptions())
    except TransportError as error:
        assert not any(sim.live().values())
        return type(error).__name__, f"returned {code} (" in str(error)
    raise AssertionError("it started")


MEMORY = [
    ("aclrtMalloc", 207001, "MemoryError", Placement.DEVICE),
    ("aclrtMalloc", 207018, "MemoryError", Placement.DEVICE),
    ("aclrtMalloc", 507000, "RegistrationError", Placement.DEVICE),
    ("aclrtMemset", 507000, "RegistrationError", Placement.DEVICE),
    ("aclrtMallocHost", 207001, "MemoryError", Placement.HOST),
]


def test_memory_that_cannot_be_allocated(start_ranks: Start) -> None:
    group = start_ranks(1, 1)
    group[0].do(ranks.start, 0, {})
    before = group[0].do(ranks.sim, "live")
    for symbol, code, kind, placement in MEMORY:
        group[0].do(ranks.sim, "clear")
        group[0].do(ranks.sim, "fault", symbol, code)
        with pytest.raises(RemoteError, match=str(code)) as caught:
            group[0].do(_allocate, placement)
        assert caught.value.kind == kind
        assert group[0].do(ranks.sim, "live") == before
    assert not any(group[0].do(ranks.finish).values())


def _allocate(here: Here, placement: Placement) -> None:
    ranks.of(here).transport.allocate(MIB, placement)


def test_memory_that_is_not_what_it_is_said_to_be(start_ranks: Start) -> None:
    group = start_ranks(1, 1)
    group[0].do(ranks.start, 0, {})
    for where, placement in (
        ("host", 1),
        ("numpy", 1),
        ("device", 0),
        ("nowhere", 0),
        ("nowhere", 1),
    ):
        with pytest.raises(RemoteError, match="are not") as caught:
            group[0].do(_register, where, placement)
        assert caught.value.kind == "RegistrationError"
    assert not any(group[0].do(ranks.finish).values())


def _register(here: Here, where: str, placement: int) -> None:
    own = ranks.of(here)
    array = here.any["array"] = np.zeros(4096, np.int8)
    address = {"numpy": array.ctypes.data, "nowhere": 4096}.get(where) or own.regions[where].address
    own.transport.register(address, 4096, Placement(placement))


def test_device_memory_has_an_end(start_ranks: Start) -> None:
    group = start_ranks(1, 1, None, capacity=10 * MIB)
    group[0].do(ranks.start, 0, {})
    with pytest.raises(RemoteError, match="207001"):
        group[0].do(_allocate_large)
    assert not any(group[0].do(ranks.finish).values())


def _allocate_large(here: Here) -> None:
    ranks.of(here).transport.allocate(4 * MIB, Placement.DEVICE)


def test_more_ranges_than_hccl_takes(start_ranks: Start) -> None:
    group = start_ranks(1, 1).start()
    with pytest.raises(
        RemoteError, match="4096 ranges are registered and HCCL takes no more"
    ) as caught:
        group[0].do(_register_many, 4096)
    assert caught.value.kind == "RegistrationError"
    group[0].do(_release_many)
    group[0].do(_register_many, 4000)
    group[0].do(_release_many)
    group.finish()


def _register_many(here: Here, count: int) -> None:
    own = ranks.of(here)
    own.sim.use_device()
    base = here.any["base"] = own.sim.malloc(count * 64)
    regions = here.any["many"] = list[Any]()
    for number in range(count):
        regions.append(own.transport.register(base + 64 * number, 64, Placement.DEVICE))


def _release_many(here: Here) -> None:
    own = ranks.of(here)
    for region in here.any.pop("many"):
        own.transport.release(region)
    own.sim.free(here.any["base"])
    own.sim.library.aclrtResetDevice(0)


LINKING = [
    ("HcclRegisterGlobalMem", 1, "RegistrationError"),
    ("HcclCommInitClusterInfoMemConfig", 1, "LinkError"),
    ("HcclCommInitClusterInfoMemConfig", 15, "LinkError"),
    ("HcclCommBindMem", 1, "LinkError"),
    ("aclrtCreateStreamWithConfig", 207008, "LinkError"),
    ("HcclCommPrepare", 1, "LinkError"),
    ("HcclCommPrepare", 5, "LinkError"),
    ("HcclCommPrepare", 6, "LinkError"),
]


def test_a_link_that_cannot_be_made(start_ranks: Start) -> None:
    group = start_ranks().start()
    quiet = group.sim("live")
    for number, (symbol, code, kind) in enumerate(LINKING):
        for nth in (1, 2) if symbol in ("HcclRegisterGlobalMem", "HcclCommBindMem") else (1,):
            name = f"link-{number}-{nth}"
            group.open(name)
            after = symbol == "HcclCommBindMem" and nth == 2  # the library did it all the same
            fault = partial(ranks.sim, first=nth, last=nth, after=after)
            group[0].do(fault, "fault", symbol, code)
            with pytest.raises(RemoteError, match=rf"returned {code} \(") as caught:
                group[0].do(ranks.join, name, 10.0)
            assert caught.value.kind == kind, symbol
            group[0].do(ranks.sim, "clear")
            assert all(took < SOON for _, took in group.close(name))
            assert group.sim("live") == quiet, symbol
    group.link("again")
    group[0].do(ranks.move, "again", 1, ONE)
    group.finish()


@pytest.mark.parametrize("code", [4, 11])
def test_attempts_to_meet_that_fail_are_repeated(start_ranks: Start, code: int) -> None:
    group = start_ranks()
    group.options = {"retry_count": 2}
    group.start()
    group[0].do(partial(ranks.sim, last=2), "fault", "HcclCommPrepare", code)
    group.link()
    group[0].do(ranks.move, "link", 1, ONE)
    group.close()
    group[0].do(partial(ranks.sim, last=99), "fault", "HcclCommPrepare", code)
    group.open("never", seconds=6)
    group[1].begin(ranks.join, "never", 6.0)
    with pytest.raises(RemoteError, match=rf"returned {code} \("):
        group[0].do(ranks.join, "never", 6.0)
    with pytest.raises(RemoteError, match="did not link in time"):
        group[1].result()
    group[0].do(ranks.sim, "clear")
    group.finish()


def test_a_rank_that_comes_late(start_ranks: Start) -> None:
    group = start_ranks(3).start()
    group.open(seconds=40)
    group[0].begin(ranks.join, "link", 40.0)
    group[1].begin(ranks.join, "link", 40.0)
    time.sleep(11.0)  # later than a slice
    assert group[2].do(ranks.join, "link", 40.0) < 20
    for node in group.nodes[:2]:
        assert 10 < node.result() < 30
    group[0].do(ranks.move, "link", 2, ONE)
    group.finish()


def test_a_rank_that_never_comes(start_ranks: Start) -> None:
    group = start_ranks().start()
    group.open(seconds=LONG)
    began = time.monotonic()
    with pytest.raises(RemoteError, match="did not link in time, or its rank table differs"):
        group[0].do(ranks.join, "link", 3.0)
    assert 2 < time.monotonic() - began < SOON
    group.finish()


def test_unlink_while_the_peers_are_awaited(start_ranks: Start) -> None:
    group = start_ranks().start()
    before = group[0].do(ranks.sim, "live")
    group.open(seconds=LONG)
    took, text, left = group[0].do(_close_while_joining)
    assert took < SOON
    assert "closed or aborted meanwhile" in text
    assert left == before
    group.link("again")
    group.finish()


def _close_while_joining(here: Here) -> tuple[float, str, dict[str, int]]:
    import threading

    from datadist_hccl import communicator

    from datadist.transport import LinkError

    communicator.FIRST_SLICE_SECONDS = communicator.SLICE_SECONDS
    own = ranks.of(here)
    link = own.links.pop("link")
    errors: list[str] = []

    def joining() -> None:
        try:
            link.join(LONG)
        except LinkError as error:
            errors.append(str(error))

    thread = threading.Thread(target=joining)
    thread.start()
    until(lambda: own.sim.calls("HcclCommPrepare") > 0)
    began = time.monotonic()
    link.close()
    took = time.monotonic() - began
    held = own.sim.live()
    assert held["communicators"] == 1, "it was destroyed while the library was inside"
    region = own.regions.pop("device")
    own.transport.release(region)
    assert own.sim.live()["allocations"] == held["allocations"], "memory freed under the library"
    thread.join(35)
    own.regions["device"] = own.transport.allocate(ranks.SIZE, Placement.DEVICE)
    return took, errors[0], own.sim.live()


MOVING = [
    ("HcclBatchGet", 1, "TransferError"),
    ("HcclBatchGet", 4, "TransferError"),
    ("aclrtSynchronizeStreamWithTimeout", 507057, "PeerLost"),
    ("aclrtSynchronizeStreamWithTimeout", 507056, "PeerLost"),
    ("aclrtSynchronizeStreamWithTimeout", 507013, "TransferError"),
    ("aclrtSynchronizeStreamWithTimeout", 507046, "TransferTimeout"),
]


@pytest.mark.parametrize("servers", [1, 2])
def test_a_transfer_that_fails(start_ranks: Start, servers: int) -> None:
    group = start_ranks(2, servers, HCCS).start()
    quiet = group.sim("live")
    many = [(4096 * i, 4096 * i, 4000) for i in range(600)]
    source = np.random.default_rng(1).integers(1, 256, ranks.SIZE, np.uint8).tobytes()
    group[1].do(ranks.put, "device", source)
    for number, (symbol, code, kind) in enumerate(MOVING):
        group[0].do(ranks.put, "device", OLD)
        name = f"link-{number}"
        group.link(name)
        nth = 2 if symbol == "HcclBatchGet" else 1  # an earlier batch is queued already
        group[0].do(partial(ranks.sim, first=nth, last=nth), "fault", symbol, code)
        found, usable, _, text = group[0].do(ranks.try_move, name, 1, many)
        assert (found, str(code) in text or "not complete" in text) == (kind, True), symbol
        assert usable is (code == 507046)
        in_flight = group[0].do(ranks.settled, 30.0)
        assert in_flight is (True if usable and servers == 2 else None), "of itself"
        _check_torn(group[0].do(ranks.get, "device"), many, source)
        assert group[1].do(ranks.get, "device") == source
        again = group[0].do(ranks.move if usable else ranks.try_move, name, 1, ONE)
        assert usable or again[0] == "TransferError"
        group[0].do(ranks.sim, "clear")
        assert all(took < SOON for _, took in group.close(name))
        assert group.sim("live") == quiet, symbol
    group.finish()


@pytest.mark.parametrize("servers", [1, 2])
def test_what_a_signal_handler_raises_leaves_nothing_in_flight(
    start_ranks: Start, servers: int
) -> None:
    group = start_ranks(2, servers, HCCS).start()
    group.link()
    group[1].do(ranks.put, "device", NEW)
    group[0].do(partial(ranks.sim, stuck=True), "tasks")
    assert group[0].do(_interrupt) == "KeyboardInterrupt"
    group[0].do(ranks.sim, "clear")
    time.sleep(0.5)  # what were queued still would move now
    assert group[0].do(ranks.get, "device") == OLD
    if servers == 1:
        group[0].do(ranks.move, "link", 1, ONE)
    group.close()
    group.link("again")
    group[0].do(ranks.move, "again", 1, ONE)
    assert group[0].do(ranks.get, "device") == NEW[:MIB] + OLD[MIB:]
    group.finish()


def _interrupt(here: Here) -> str:
    runtime: Any = ranks.of(here).transport._device.runtime

    def synchronize(_stream: int, _seconds: float) -> int:
        del runtime.synchronize
        raise KeyboardInterrupt

    runtime.synchronize = synchronize
    try:
        ranks.move(here, "link", 1, ONE)
    except KeyboardInterrupt as error:
        return type(error).__name__
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("servers", [1, 2])
def test_what_was_queued_before_a_refused_batch_moves_nothing_later(
    start_ranks: Start, servers: int
) -> None:
    group = start_ranks(2, servers, HCCS).start()
    group.link()
    group[1].do(ranks.put, "device", NEW)
    group[0].do(partial(ranks.sim, stuck=True), "tasks")
    group[0].do(partial(ranks.sim, first=2, last=2), "fault", "HcclBatchGet", 4)
    many = [(4096 * i, 4096 * i, 4000) for i in range(600)]
    kind, _, took, text = group[0].do(ranks.try_move, "link", 1, many)
    assert kind == "TransferError"
    assert "HCCL refused a batch for rank 1" in text
    assert took < SOON
    group[0].do(ranks.sim, "clear")  # what is queued still would move now
    time.sleep(0.5)
    assert group[0].do(ranks.get, "device") == OLD
    assert all(took < SOON for _, took in group.close())
    group.finish()


def test_a_slow_transfer_has_the_time_that_it_is_given(start_ranks: Start) -> None:
    group = start_ranks(2, 1, HCCS).start()
    group.link()
    group[1].do(ranks.put, "device", b"\1" * MIB)
    group[0].do(partial(ranks.sim, delay_ms=300), "tasks")
    four = [(n * 8192, n * 8192, 4096) for n in range(4)]
    kind, usable, took, _ = group[0].do(partial(ranks.try_move, timeout=0.5), "link", 1, four)
    assert (kind, usable) == ("TransferTimeout", True)
    assert 0.4 < took < SOON  # the library counts in milliseconds
    _check_torn(group[0].do(ranks.get, "device"), four)
    assert group[0].do(partial(ranks.move, timeout=50), "link", 1, four) >= 1.2
    assert group[0].do(ranks.get, "device") == _moved(four)
    assert group[1].do(ranks.get, "device") == NEW[:MIB] + OLD[MIB:]
    group.finish()


def _moved(segments: list[tuple[int, int, int]]) -> bytes:
    """Zeros of our memory after segments of ones have come."""
    memory = bytearray(OLD)
    for here, _, size in segments:
        memory[here : here + size] = NEW[:size]
    return bytes(memory)


def _check_torn(found: bytes, segments: list[tuple[int, int, int]], source: bytes = NEW) -> None:
    """Every byte is from before or after a move of these segments out of the start of ``source``."""
    old, new = bytearray(OLD), bytearray(OLD)
    for here, there, size in segments:
        new[here : here + size] = source[there : there + size]
    found_, *both = (np.frombuffer(each, np.uint8) for each in (found, bytes(old), bytes(new)))
    torn.check_torn([found_], [both[0]], [both[1]], "our memory")


def test_a_transfer_that_cannot_be_stopped_ends_the_link_and_keeps_the_memory(
    start_ranks: Start,
) -> None:
    group = start_ranks(2, 1, HCCS).start()
    group.link()
    group[1].do(ranks.put, "device", NEW)
    group[0].do(partial(ranks.sim, stuck=True), "tasks")
    group[0].do(partial(ranks.sim, last=99), "fault", "aclrtStreamAbort", 507899)
    kind, usable, took, _ = group[0].do(partial(ranks.try_move, timeout=0.5), "link", 1, ONE)
    assert (kind, usable) == ("TransferTimeout", False)
    assert took < SOON
    _, _, _, text = group[0].do(ranks.try_move, "link", 1, ONE)
    assert "cannot be stopped: aclrtStreamAbort returned 507899" in text
    reported, took = group[0].do(ranks.close_link, "link")
    assert (reported, took < SOON) == ([1], True)
    assert group[1].do(ranks.get, "device") == NEW
    allocations = group[0].do(ranks.sim, "live")["allocations"]
    group[0].do(_release, "device")
    assert group[0].do(ranks.sim, "live")["allocations"] == allocations, "a copy may still write it"
    group[0].do(ranks.sim, "clear")
    group.finish()


@pytest.mark.parametrize("end", ["abort", "close"])
@pytest.mark.parametrize("servers", [1, 2])
def test_a_stuck_transfer_is_ended_from_another_thread(
    start_ranks: Start, servers: int, end: str
) -> None:
    group = start_ranks(2, servers, HCCS).start()
    group.link()
    group[1].do(ranks.put, "device", NEW)
    kind, text, took = group[0].do(_end_stuck, end)
    assert kind == "TransferError"
    assert "closed or aborted" in text
    assert took < SOON
    group[0].do(ranks.sim, "clear")
    assert [node.do(ranks.get, "device") for node in group.nodes] == [OLD, NEW]
    group.finish()


def _end_stuck(here: Here, end: str) -> tuple[str, str, float]:

    own = ranks.of(here)
    own.sim.tasks(stuck=True)
    thread = ranks.begin_move(here, "link", 1, ONE, timeout=LONG)
    began = time.monotonic()
    if end == "abort":
        own.links["link"].abort(1)
    else:
        own.links.pop("link").close()
    thread.join(SOON)
    kind, _, _, text = here.any["outcome"]
    return kind, text, time.monotonic() - began


def test_an_aborted_rank_leaves_the_others_usable(start_ranks: Start) -> None:
    group = start_ranks(3).start()
    group.link()
    group[0].do(ranks.abort, "link", 1)
    assert group[0].do(ranks.try_move, "link", 1, ONE)[0] == "TransferError"
    group[0].do(ranks.move, "link", 2, ONE)
    group.finish()


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("code", [507057, 507056, 0])
def test_a_peer_that_dies(start_ranks: Start, servers: int, code: int) -> None:
    for idle in (True, False):
        group = start_ranks(2, servers, HCCS).start()
        quiet = group[0].do(ranks.sim, "live")
        group.link()
        group[1].do(ranks.put, "device", NEW)
        group[0].do(ranks.sim, "peer_code", code)
        if idle:
            group[1].kill()
            outcome = group[0].do(ranks.try_move, "link", 1, ONE)
        else:
            group[0].do(partial(ranks.sim, stuck=True), "tasks")
            grace_seconds = 3.0 if code == 0 else 55.0
            group[0].begin(_move_while_it_dies, group[1].pid, grace_seconds)
            outcome = group[0].result()
            group[1].kill()
        kind, usable, took, _ = outcome
        assert kind == ("TransferTimeout" if code == 0 and not idle else "PeerLost")
        assert took < SOON
        assert group[0].do(ranks.get, "device") == OLD
        if kind == "PeerLost":
            assert usable is False
        group[0].do(ranks.sim, "clear")
        assert group[0].do(ranks.close_link, "link")[1] < SOON
        assert group[0].do(ranks.sim, "live") == quiet
        assert not any(group[0].do(ranks.finish).values())


def _move_while_it_dies(here: Here, pid: int, timeout: float) -> tuple[str, bool, float, str]:
    """Kill the peer once the library has a transfer with it; what came of that."""
    thread = ranks.begin_move(here, "link", 1, ONE, timeout=timeout)
    os.kill(pid, signal.SIGKILL)
    thread.join()
    outcome: tuple[str, bool, float, str] = here.any["outcome"]
    return outcome


def test_who_closes_a_link_finds_the_device_given_back_whoever_did_it(start_ranks: Start) -> None:
    group = start_ranks(2, 1, HCCS).start()
    group.link()
    group[0].do(partial(ranks.sim, stuck=True), "tasks")
    assert group[0].do(_finish_while_moving) == {}
    group[1].do(ranks.finish)


def _finish_while_moving(here: Here) -> dict[str, int]:
    """Give the device back slowly, while another thread comes out of the link as the last one."""
    import threading

    from datadist_hccl.acl import Device

    own, drop = ranks.of(here), Device.drop
    moving = ranks.begin_move(here, "link", 1, ONE)

    def slow_drop(device: Device) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(1)
        drop(device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Device, "drop", slow_drop)
        left = ranks.finish(here)
    moving.join()
    assert not any(own.sim.live().values())
    return {kind: count for kind, count in left.items() if count}


CLOSING = ["aclrtStreamAbort", "aclrtDestroyStream", "HcclCommUnbindMem", "HcclCommDestroy"]


def test_a_busy_communicator_is_destroyed_when_it_is_idle(start_ranks: Start) -> None:
    group = start_ranks().start()
    quiet = group.sim("live")
    group.link()
    group[0].do(partial(ranks.sim, last=10), "fault", "HcclCommDestroy", 20)
    assert all(took < SOON for _, took in group.close())
    assert group.sim("live") == quiet
    group.finish()


@pytest.mark.parametrize("symbol", CLOSING)
def test_what_cannot_be_closed_keeps_its_memory_and_is_closed_later(
    start_ranks: Start, symbol: str
) -> None:
    group = start_ranks().start()
    group.link()
    code = {"HcclCommDestroy": 20, "aclrtDestroyStream": 107003}.get(symbol, 4)
    group[0].do(partial(ranks.sim, last=60), "fault", symbol, code)
    reported, took = group[0].do(ranks.close_link, "link")
    assert took < SOON
    assert reported == [1], "rank 1 may still write"
    allocations = group[0].do(ranks.sim, "live")["allocations"]
    group[0].do(_release, "device")
    assert group[0].do(ranks.sim, "live")["allocations"] == allocations
    group[0].do(ranks.sim, "clear")
    group.finish()


def _release(here: Here, label: str) -> None:
    own = ranks.of(here)
    own.transport.release(own.regions.pop(label))


# -- the fence ---------------------------------------------------------------------------------


@pytest.mark.parametrize("servers", [1, 2])
def test_after_close_peers_cannot_reach_the_memory(start_ranks: Start, servers: int) -> None:
    group = start_ranks(2, servers, HCCS).start()
    group.link()
    assert group[0].do(ranks.close_link, "link")[0] == []
    write = partial(ranks.try_move, write=True)
    kind, usable, _, _ = group[1].do(write, "link", 0, ONE)
    assert (kind, usable) == ("PeerLost", False)
    assert group[0].do(ranks.get, "device") == bytes(ranks.SIZE)
    group.finish()


def test_memory_that_another_link_exposes_may_still_be_written_over_hccs(
    start_ranks: Start,
) -> None:
    group = start_ranks(2, 1, HCCS).start()
    group.link("one")
    group.link("two")
    assert group[0].do(ranks.close_link, "one")[0] == [1]
    group[1].do(partial(ranks.move, write=True), "one", 0, ONE)
    assert group[0].do(ranks.close_link, "two")[0] == []
    assert group[1].do(partial(ranks.try_move, write=True), "one", 0, ONE)[0] == "PeerLost"
    group.finish()


def test_memory_that_no_other_link_exposes_is_out_of_reach(start_ranks: Start) -> None:
    group = start_ranks(2, 1, HCCS).start()
    group.link("one", labels=["device"])
    group.link("two", labels=["host"])
    assert group[0].do(ranks.close_link, "one")[0] == []
    assert group[1].do(partial(ranks.try_move, write=True), "one", 0, ONE)[0] == "PeerLost"
    group.finish()


def test_a_range_is_registered_again_before_the_last_link_lets_go_of_it(start_ranks: Start) -> None:
    group = start_ranks().start()
    group.all(lambda _rank: (_register_own,))
    group.link("one", labels=["own"])
    group[0].do(_release, "own")
    group[0].do(_register_own)
    group.link("two", labels=["own"])
    group.close("one")
    group[0].do(partial(ranks.move, local="own", remote="own"), "two", 1, ONE)
    for node in group.nodes:
        node.do(ranks.close_link, "two")
        node.do(_release, "own")
        node.do(_free_own)
    group.finish()


def _register_own(here: Here) -> None:
    own = ranks.of(here)
    if "base" not in here.any:
        own.sim.use_device()
        here.any["base"] = own.sim.malloc(MIB)
    own.regions["own"] = own.transport.register(here.any["base"], MIB, Placement.DEVICE)


def _free_own(here: Here) -> None:
    own = ranks.of(here)
    own.sim.free(here.any["base"])
    own.sim.library.aclrtResetDevice(0)


# -- the GIL -----------------------------------------------------------------------------------

BLOCKING = [
    "HcclCommInitClusterInfoMemConfig",
    "HcclCommPrepare",
    "HcclCommBindMem",
    "HcclRegisterGlobalMem",
    "HcclBatchGet",
    "aclrtSynchronizeStreamWithTimeout",
    "aclrtMemcpy",
    "aclrtMalloc",
    "aclrtMemset",
    "HcclExchangeMemDesc",
    "aclrtStreamAbort",
    "aclrtDestroyStream",
    "HcclCommUnbindMem",
    "HcclCommDestroy",
    "HcclDeregisterGlobalMem",
]


def test_other_threads_run_during_every_blocking_call(start_ranks: Start) -> None:
    group = start_ranks().start()
    for number, symbol in enumerate(BLOCKING):
        name = f"link-{number}"
        group.open(name)
        group[1].begin(_all_stages, name)
        assert group[0].do(_seen, name, symbol) == SIGHTS, f"{symbol} keeps the GIL"
        group[1].result()
        group[0].do(ranks.sim, "clear")
    group.finish()


def _all_stages(here: Here, name: str) -> None:
    own = ranks.of(here)
    ranks.join(here, name, 20.0)
    ranks.exchange(here, name, b"x")
    if 1 in own.remote[name]:
        ranks.move(here, name, 1, ONE)
    _allocate_and_release(own)
    ranks.put(here, "device", b"x" * 100)
    ranks.exchange(here, name, b"x")
    ranks.close_link(here, name)


def _allocate_and_release(own: ranks.Rank) -> None:
    own.transport.release(own.transport.allocate(MIB, Placement.DEVICE))


SIGHTS = 2
"""Who holds the GIL may be seen once, by a thread that has just begun to look."""


def _seen(here: Here, name: str, symbol: str) -> int:
    """How often another thread saw a call of a function take long, which then goes on."""
    import threading

    sim, over, sights = ranks.of(here).sim, threading.Event(), 0

    def current_mappings() -> None:
        nonlocal sights
        while sights < SIGHTS and not over.is_set():
            time.sleep(0.002)
            sights += sim.delayed() > 0
        sim.let_go()

    looking = threading.Thread(target=current_mappings)
    sim.fault(symbol, ms=15_000)
    looking.start()
    try:
        _all_stages(here, name)
    finally:
        over.set()
        looking.join()
    return sights
