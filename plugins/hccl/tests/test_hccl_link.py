"""Links of the hccl transport between real processes on the simulator, without core."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import cast

import pytest
from datadist_hccl import blobs
from datadist_hccl.one_sided import Hccl
from hccl_sim import ranks
from hccl_sim.ranks import MIB, SIZE, Ranks

from datadist.rank_table import parse_rank_table
from datadist.transport import LinkError, Placement, Region, TransportError
from tests.nodes import Here, RemoteError

Start = Callable[..., Ranks]

HCCS = {"HCCL_INTRA_ROCE_ENABLE": "0", "HCCL_INTRA_PCIE_ENABLE": "1"}
ROCE = {"HCCL_INTRA_ROCE_ENABLE": "1"}
ONE = [(0, 0, MIB)]


def _bytes(seed: int, size: int = SIZE) -> bytes:
    return random.Random(seed).randbytes(size)


def _segments(count: int) -> list[tuple[int, int, int]]:
    """Scattered segments that do not touch each other, in another order at the peer."""
    room = SIZE // count
    order = list(range(count))
    random.Random(count).shuffle(order)
    return [(i * room + 8, j * room + 24, room - 64 - i % 16) for i, j in enumerate(order)]


def _moved(before: bytes, source: bytes, segments: list[tuple[int, int, int]], pull: bool) -> bytes:
    result = bytearray(before)
    for local, remote, size in segments:
        to, frm = (local, remote) if pull else (remote, local)
        result[to : to + size] = source[frm : frm + size]
    return bytes(result)


@pytest.mark.parametrize(("count", "servers"), [(2, 2), (2, 1), (3, 3), (4, 2)])
def test_every_rank_reads_and_writes_every_other(
    start_ranks: Start, count: int, servers: int
) -> None:
    group = start_ranks(count, servers, HCCS).start()
    group.link()
    segments = _segments(5)
    for rank, node in enumerate(group.nodes):
        for other in set(range(count)) - {rank}:
            mine, theirs = _bytes(rank), _bytes(100 + other)
            node.do(ranks.put, "device", mine)
            group[other].do(ranks.put, "device", theirs)
            node.do(ranks.move, "link", other, segments)
            assert node.do(ranks.get, "device") == _moved(mine, theirs, segments, True)
            assert group[other].do(ranks.get, "device") == theirs
            node.do(ranks.put, "device", mine)
            node.do(partial(ranks.move, write=True), "link", other, segments)
            assert group[other].do(ranks.get, "device") == _moved(theirs, mine, segments, False)
            assert node.do(ranks.get, "device") == mine
    group.finish()


def test_batches_of_any_number_of_segments(start_ranks: Start) -> None:
    group = start_ranks().start()
    group.link()
    group[1].do(ranks.put, "device", _bytes(2))
    batches = 0
    for count in (1, 256, 257, 1024, 3000):
        segments = _segments(count)
        group[0].do(ranks.put, "device", _bytes(1))
        group[0].do(ranks.move, "link", 1, segments)
        assert group[0].do(ranks.get, "device") == _moved(_bytes(1), _bytes(2), segments, True)
        batches += -(-count // 256)
        assert group[0].do(ranks.sim, "calls", "HcclBatchGet") == batches
    group.finish()


def test_a_segment_may_span_adjacent_registrations(start_ranks: Start) -> None:
    group = start_ranks().start()
    group.all(lambda _rank: (_register_halves,))
    group.link(labels=["low", "high"])
    for rank, node in enumerate(group.nodes):
        node.do(ranks.put, "low", _bytes(rank))
    segment = (100, MIB + 50, 2 * MIB)
    group[0].do(partial(ranks.move, local="low", remote="low"), "link", 1, [segment])
    assert group[0].do(ranks.get, "low") == _moved(_bytes(0), _bytes(1), [segment], True)
    for node in group.nodes:
        node.do(_release_halves)
    group.finish()


def _register_halves(here: Here) -> None:
    """One allocation of a framework, registered as two caches that touch each other."""
    own = ranks.of(here)
    own.sim.use_device()
    base = here.any["base"] = own.sim.malloc(SIZE)
    for label, place in (("low", base), ("high", base + SIZE // 2)):
        own.regions[label] = own.transport.register(place, SIZE // 2, Placement.DEVICE)
    assert own.transport.capabilities.foreign_memory


def _release_halves(here: Here) -> None:
    own = ranks.of(here)
    own.links.pop("link").close()
    for label in ("low", "high"):
        own.transport.release(own.regions.pop(label))
    own.sim.free(here.any["base"])
    own.sim.library.aclrtResetDevice(0)


def test_read_access_forbids_writing(start_ranks: Start) -> None:
    group = start_ranks().start()
    group.link(access="read")
    with pytest.raises(RemoteError, match="granted read access only") as caught:
        group[0].do(partial(ranks.move, write=True), "link", 1, ONE)
    assert caught.value.kind == "Unsupported"
    group[0].do(ranks.move, "link", 1, ONE)
    group.finish()


def test_wrong_addresses_move_nothing(start_ranks: Start) -> None:
    group = start_ranks().start()
    group.link(labels=["device"])
    group[0].do(ranks.put, "device", _bytes(1))
    good = (0, 0, 64)
    for bad in [(64, SIZE - 1, 2), (64, SIZE, 1), (64, -1, 2), (SIZE - 1, 0, 2), (-1, 0, 2)]:
        with pytest.raises(RemoteError) as caught:
            group[0].do(ranks.move, "link", 1, [good, bad])
        assert caught.value.kind == "AddressError"
    with pytest.raises(RemoteError) as caught:
        group[0].do(ranks.move, "link", 1, [good], remote="host")
    assert caught.value.kind == "AddressError"
    assert group[0].do(ranks.get, "device") == _bytes(1)
    group.finish()


@pytest.mark.parametrize("kind", ["device", "host"])
def test_local_memory_that_the_link_does_not_expose(start_ranks: Start, kind: str) -> None:
    group = start_ranks().start()
    group.link(labels=["device"])
    for node in group.nodes:
        node.do(_allocate_late, kind)
    segments = [(0, 5, SIZE - 1000), *_segments(300)]
    mine, theirs = _bytes(1, 2 * SIZE), _bytes(2)
    group[0].do(ranks.put, "late", mine)
    group[1].do(ranks.put, "device", theirs)
    group[0].do(ranks.move, "link", 1, segments, local="late")
    pulled = _moved(mine, theirs, segments, True)
    assert group[0].do(ranks.get, "late", 2 * SIZE) == pulled
    group[0].do(ranks.move, "link", 1, [(SIZE - 7, 3, SIZE - 3)], write=True, local="late")
    pushed = _moved(theirs, pulled, [(SIZE - 7, 3, SIZE - 3)], False)
    assert group[1].do(ranks.get, "device") == pushed
    group.finish()


def _allocate_late(here: Here, kind: str) -> None:
    own = ranks.of(here)
    own.regions["late"] = own.transport.allocate(2 * SIZE, Placement[kind.upper()])


def test_host_memory_is_reached_over_rdma_and_not_over_hccs(start_ranks: Start) -> None:
    group = start_ranks(3, 2, HCCS).start()  # ranks 0 and 1 share a server
    group.link()
    for rank, node in enumerate(group.nodes):
        node.do(ranks.put, "host", _bytes(rank))
    for local in ("device", "host"):
        group[0].do(partial(ranks.move, local=local, remote="host"), "link", 2, ONE)
        assert group[0].do(ranks.get, local, MIB) == _bytes(2)[:MIB]
    with pytest.raises(
        RemoteError, match="memory of its host, which HCCS does not reach"
    ) as caught:
        group[0].do(partial(ranks.move, remote="host"), "link", 1, ONE)
    assert caught.value.kind == "AddressError"
    group[1].do(ranks.put, "device", _bytes(7))
    group[0].do(partial(ranks.move, local="host"), "link", 1, ONE)
    assert group[0].do(ranks.get, "host", MIB) == _bytes(7)[:MIB]
    group.finish()


def test_ranks_of_one_server_use_roce_where_that_is_chosen(start_ranks: Start) -> None:
    group = start_ranks(2, 1, ROCE).start()
    group.link()
    group[1].do(ranks.put, "host", _bytes(1))
    group[0].do(partial(ranks.move, remote="host"), "link", 1, ONE)
    assert group[0].do(ranks.get, "device", MIB) == _bytes(1)[:MIB]
    group.finish()


def test_physical_numbers_of_devices_need_not_be_the_logical_ones(start_ranks: Start) -> None:
    group = start_ranks(2, 1, HCCS, physical="5,3,1,0")
    group.table = group.table.replace('"device_id": "0"', '"device_id": "5"').replace(
        '"device_id": "1"', '"device_id": "3"'
    )
    for device, node in enumerate(group.nodes):
        node.do(ranks.start, device, {})
    group.pids = group.all(lambda _rank: (ranks.pid,))
    group.link()
    group[0].do(ranks.move, "link", 1, ONE)
    group.finish()
    group[0].do(ranks.start, 1, {})
    with pytest.raises(RemoteError, match="runs on physical device 3"):
        group[0].do(_check_table, group.table)


def _check_table(here: Here, table: str) -> None:
    ranks.of(here).transport.check_table(parse_rank_table(table), 0)


@pytest.mark.parametrize("count", [2, 4])
def test_blobs_of_any_size_are_exchanged(start_ranks: Start, count: int) -> None:
    group = start_ranks(count).start()
    group.link()
    for size in (0, 1, 496, 497, 5000, 65536):
        sent = [_bytes(rank, size if rank % 2 == 0 else 3) for rank in range(count)]
        assert _exchange(group, sent) == [sent] * count
    group.finish()


def _exchange(group: Ranks, sent: list[bytes]) -> list[list[bytes]]:
    return group.all(lambda rank: (ranks.exchange, "link", sent[rank]))


def test_traffic_class_and_service_level_reach_the_library(start_ranks: Start) -> None:
    group = start_ranks()
    group.options = {"traffic_class": 252, "service_level": 7}
    group.start()
    group.link()
    group.finish()
    for options in ({"traffic_class": 100 + 1}, {"traffic_class": 256}, {"service_level": 8}):
        with pytest.raises(RemoteError, match="it must be") as caught:
            group[0].do(ranks.start, 0, options)
        assert caught.value.kind == "OptionError"


def test_the_threads_own_context_comes_back(start_ranks: Start) -> None:
    group = start_ranks().start()
    group.link()
    group[0].do(_with_contexts, ONE)
    group.finish()


def _with_contexts(here: Here, segments: list[tuple[int, int, int]]) -> None:
    import ctypes
    import threading

    library = ranks.of(here).sim.library
    failures: list[str] = []

    def current() -> int | None:
        found = ctypes.c_void_p()
        library.aclrtGetCurrentContext(ctypes.byref(found))
        return found.value

    def use(device: int | None) -> None:
        if device is not None:
            library.aclrtSetDevice(device)
        before = current()
        ranks.move(here, "link", 1, segments)
        after = current()
        library.aclrtSetDevice(0)
        default = current()
        library.aclrtResetDevice(0)
        if after != (default if before is None else before):
            failures.append(f"device {device}: {before} became {after}")
        if device is not None:
            library.aclrtResetDevice(device)

    for device in (None, 0, 5):
        thread = threading.Thread(target=use, args=(device,))
        thread.start()
        thread.join(20)
    assert not failures, failures


def test_views_of_host_memory_outlive_the_transport(start_ranks: Start) -> None:
    group = start_ranks(1, 1, HCCS)
    group[0].do(ranks.start, 0, {})
    assert group[0].do(_finish_with_a_view) == bytes(16)


def _finish_with_a_view(here: Here) -> bytes:
    import ctypes

    own = ranks.of(here)
    region = own.regions["host"]
    address, keeper = region.address, region.keeper
    del region
    left = ranks.finish(here)
    assert left == dict.fromkeys(left, 0) | {"allocations": 1, "contexts": 1, "devices": 1}
    data = ctypes.string_at(address, 16)
    del keeper
    assert not any(own.sim.live().values())
    return data


def test_links_that_are_made_at_the_same_time(start_ranks: Start) -> None:
    group = start_ranks().start()
    names = [f"link-{number}" for number in range(12)]
    for name in names:
        group.open(name)
    group.all(lambda rank: (_join_all, names[:: 1 if rank else -1]))
    for name in names:
        group[0].do(ranks.move, name, 1, ONE)
    group.finish()


def _join_all(here: Here, names: list[str]) -> None:
    with ThreadPoolExecutor(len(names)) as pool:
        for result in [pool.submit(ranks.join, here, name, 20.0) for name in names]:
            result.result()


def test_a_name_can_be_used_again_after_its_link_was_closed(start_ranks: Start) -> None:
    group = start_ranks().start()
    for _ in range(3):
        group.link("again")
        group[0].do(ranks.move, "again", 1, [(0, 0, 64)])
        group.close("again")
    group.finish()


def test_no_link_is_forgotten_when_several_are_opened_at_once(start_ranks: Start) -> None:
    group = start_ranks().start()
    group.open("first")
    assert group[0].do(_open_at_once, group.pids, group.table, ["second", "third"]) == 3
    group.finish()


def _open_at_once(here: Here, pids: list[int], table: str, names: list[str]) -> int:
    """How many communicators the transport knows then."""
    import time

    from datadist_hccl.communicator import Communicator

    ended = Communicator.ended

    def slowly(self: Communicator) -> bool:
        time.sleep(0.2)
        return bool(ended.__get__(self))

    Communicator.ended = property(slowly)  # type: ignore[method-assign,assignment]
    with ThreadPoolExecutor(len(names)) as pool:
        for result in [
            pool.submit(ranks.open_link, here, name, 0, pids, table, "read", ["device"], 20.0)
            for name in names
        ]:
            result.result()
    Communicator.ended = ended  # type: ignore[method-assign]
    return len(ranks.of(here).transport._communicators)


def test_512_links_of_one_process(start_ranks: Start) -> None:
    import time

    group = start_ranks().start()
    began = time.monotonic()
    group.all(lambda rank: (_limits, os.getpid()))
    for number in range(512):
        group.link(f"link-{number}", labels=["device"])
    print(f"\n512 links: {(time.monotonic() - began) / 512 * 1e3:.1f} ms each, both ranks")
    group[0].do(ranks.move, "link-511", 1, ONE)
    group[0].do(ranks.move, "link-0", 1, ONE)
    group.finish()


def _limits(_here: Here, _pid: int) -> None:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))


def test_device_memory_is_remapped_for_every_link(start_ranks: Start) -> None:
    group = start_ranks().start()
    for name in ("one", "two"):
        group.link(name)
    group[0].do(_remap, 4096, MIB)
    assert group[0].do(ranks.sim, "calls", "HcclRemapRegistedMemory") == 2
    with pytest.raises(RemoteError, match="in no registered memory") as caught:
        group[0].do(_remap, SIZE - 1, 2)
    assert caught.value.kind == "RegistrationError"
    group[0].do(ranks.move, "one", 1, ONE)
    group.finish()


def _remap(here: Here, offset: int, size: int) -> None:
    own = ranks.of(here)
    address = own.regions["device"].address + offset
    own.transport.remap([Region(address, size, Placement.DEVICE)])


@pytest.mark.parametrize("pods", [[["10.0.0.1", "10.0.0.2"]], [["10.0.0.1"], ["10.0.0.2"]]])
def test_super_nodes_of_a3(start_ranks: Start, pods: list[list[str]]) -> None:
    group = start_ranks(2, 2, None, soc="Ascend910_9391")
    table = json.loads(group.table) | {"version": "1.2"}
    table["super_pod_list"] = [
        {"super_pod_id": str(number), "server_list": [{"server_id": name} for name in names]}
        for number, names in enumerate(pods)
    ]
    for number, server in enumerate(table["server_list"]):
        server["device"][0]["super_device_id"] = str(number)
    group.table = json.dumps(table)
    group.start()
    group.link()
    group[1].do(ranks.put, "device", _bytes(1))
    group[0].do(ranks.move, "link", 1, ONE)
    assert group[0].do(ranks.get, "device", MIB) == _bytes(1)[:MIB]
    if len(pods) == 2:  # RDMA
        group[0].do(ranks.move, "link", 1, ONE, remote="host")
    else:
        with pytest.raises(RemoteError, match="which HCCS does not reach"):
            group[0].do(ranks.move, "link", 1, ONE, remote="host")
    group.finish()


class _Peer:
    """A library that receives what a test says."""

    def __init__(self, *answers: list[bytes]) -> None:
        self.answers = list(answers)

    def exchange(self, *_args: object) -> list[bytes]:
        return [data.ljust(504, b"\0") for data in self.answers.pop(0)]


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        ([[b"else"]], "exchanges data in another form"),
        ([[blobs.HEADER.pack(blobs.MAGIC, blobs.MAX_BYTES + 1)]], "exchanges data in another form"),
        ([[]], "sent 0 descriptors, expected one"),
        ([[b"a", b"b"]], "sent 2 descriptors, expected one"),
        ([[blobs.HEADER.pack(blobs.MAGIC, 2000)], [b"a"]], "announced 2000 bytes and sent 1000"),
    ],
)
def test_blobs_that_are_none_are_refused_for_good(answers: list[list[bytes]], problem: str) -> None:
    with pytest.raises(TransportError, match=problem) as caught:
        blobs.swap(cast("Hccl", _Peer(*answers)), 1, 0, 1, b"mine", 1)
    assert not isinstance(caught.value, LinkError), "which would be tried again"


def test_memory_that_is_not_aligned_is_refused_where_hccs_needs_it(start_ranks: Start) -> None:
    group = start_ranks(2, 1, HCCS).start()
    group.all(lambda _rank: (_register_unaligned,))
    with pytest.raises(RemoteError, match="not aligned to 2 MiB, which HCCS needs") as caught:
        group.open(labels=["odd"])
    assert caught.value.kind == "LinkError"
    for node in group.nodes[1:]:
        with pytest.raises(RemoteError):
            node.result()
    for node in group.nodes:
        node.do(_release_unaligned)
    group.finish()


def _register_unaligned(here: Here) -> None:
    own = ranks.of(here)
    own.sim.use_device(0)
    base = here.any["base"] = own.sim.malloc(MIB)
    own.regions["odd"] = own.transport.register(base + 4096, 4096, Placement.DEVICE)


def _release_unaligned(here: Here) -> None:
    own = ranks.of(here)
    own.transport.release(own.regions.pop("odd"))
    own.sim.free(here.any["base"])
    own.sim.library.aclrtResetDevice(0)
