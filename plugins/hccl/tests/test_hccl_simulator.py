"""The simulator is strict where the real libraries are, or where they do not forgive."""

from __future__ import annotations

import ctypes
import json
import os
import threading
from collections.abc import Callable
from typing import Any

import hccl_sim
import pytest
from datadist_hccl import abi
from datadist_hccl.one_sided import _config
from hccl_sim import ranks
from hccl_sim.ranks import Ranks

from tests.nodes import Here, Node

Start = Callable[..., Node]
StartRanks = Callable[..., Ranks]


class Raw:
    """The library, called without any of the transport's care."""

    def __init__(self) -> None:
        self.sim = hccl_sim.Simulator()
        self.library = self.sim.library
        self.sim.use_device()

    def out(self, name: str, *args: Any) -> tuple[int, int]:
        """Call a function whose first argument takes a pointer out: its code and the pointer."""
        pointer = ctypes.c_void_p()
        code = getattr(self.library, name)(ctypes.byref(pointer), *args)
        return code, pointer.value or 0

    def create(self, table: str, rank: int = 0, name: str = "c", **fields: int) -> tuple[int, int]:
        """Make a communicator: its code and handle."""
        config, handle = _config(name, None, None), ctypes.c_void_p()
        for field, value in fields.items():
            setattr(config, field, value)
        code = self.library.HcclCommInitClusterInfoMemConfig(
            table.encode(), rank, ctypes.byref(config), ctypes.byref(handle)
        )
        return code, handle.value or 0

    def register(self, address: int, size: int, kind: int = abi.MEM_DEVICE) -> tuple[int, int]:
        """Register a range: the code and the handle."""
        memory, handle = abi.CommMem(kind, address, size), ctypes.c_void_p()
        code = self.library.HcclRegisterGlobalMem(ctypes.byref(memory), ctypes.byref(handle))
        return code, handle.value or 0


def _dies(start_node: Start, function: Callable[[Here], object]) -> bool:
    """Whether the process that runs a function is ended by that."""
    node = start_node()
    node.begin(function)
    try:
        node.result(20)
    except EOFError:
        return True
    return False


def test_the_host_cannot_touch_memory_of_the_device(start_node: Start) -> None:
    assert _dies(start_node, _touch_device_memory)


def _touch_device_memory(_here: Here) -> None:
    raw = Raw()
    ctypes.memset(raw.sim.malloc(4096), 0, 1)


def test_two_communicators_at_once_end_the_process(start_node: Start) -> None:
    assert _dies(start_node, _create_twice_at_once)
    assert not _dies(start_node, _create_one_after_the_other)


def _create_twice_at_once(_here: Here) -> None:
    raw = Raw()
    raw.library.HcclCommInitClusterInfoMemConfig  # noqa: B018 - bound before the threads run

    def create(name: str) -> None:
        raw.sim.use_device()
        for number in range(100):
            raw.create(hccl_sim.table(), name=f"{name}{number}")

    threads = [threading.Thread(target=create, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _create_one_after_the_other(_here: Here) -> None:
    raw = Raw()
    for name in "ab":
        assert raw.create(hccl_sim.table(), name=name)[0] == 0


def test_a_stale_communicator_ends_the_process(start_node: Start) -> None:
    assert _dies(start_node, _use_after_destroy)


def _use_after_destroy(_here: Here) -> None:
    raw = Raw()
    _, handle = raw.create(hccl_sim.table())
    assert raw.library.HcclCommDestroy(handle) == 0
    raw.library.HcclCommDestroy(handle)


def test_codes_of_the_runtime(start_node: Start) -> None:
    start_node(devices=2).do(_codes_of_the_runtime)


def _codes_of_the_runtime(_here: Here) -> None:
    raw = Raw()
    library = raw.library
    assert library.aclInit(None) == 100002
    assert library.aclrtSetDevice(2) == 107001
    assert raw.out("aclrtMalloc", 0, 1)[0] == 107000
    assert raw.out("aclrtMalloc", 64, 99)[0] == 107018
    _, huge = raw.out("aclrtMalloc", 3 << 20, 1)
    _, small = raw.out("aclrtMalloc", 3 << 20, 2)
    assert huge % (2 << 20) == 0
    assert (small % 64, small % 4096) == (0, 64)
    assert raw.out("aclrtMallocHost", 64)[1] % 4096 == 64, "aligned to 64 bytes, and no more"
    assert library.aclrtFree(None) == 107000
    assert library.aclrtFreeHost(huge) == 107000
    assert library.aclrtFree(small) == 0
    assert library.aclrtFree(small) == 107000
    data = ctypes.create_string_buffer(8)
    assert library.aclrtMemcpy(data, 8, huge, 9, 2) == 107000, "more than there is room for"
    assert library.aclrtMemcpy(data, 8, huge, 8, 0) == 107000, "not the kind that it is"
    assert library.aclrtMemcpy(data, 8, huge, 8, 2) == 0
    assert data.raw == b"\xa5" * 8, "memory is not cleared"
    _, stream = raw.out("aclrtCreateStreamWithConfig", 0, 3)
    assert library.aclrtSynchronizeStreamWithTimeout(stream, 0) == 107000
    assert library.aclrtSynchronizeStreamWithTimeout(stream, 1) == 0
    _, other = raw.out("aclrtCreateContext", 0)
    assert library.aclrtDestroyStream(stream) == 107003
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(raw.out("aclrtMalloc", 64, 1)[0]))
    thread.start()
    thread.join()
    assert codes == [107002], "contexts belong to threads"
    assert library.aclrtDestroyContext(other) == 0


def test_nothing_works_after_the_end_of_the_runtime(start_node: Start) -> None:
    assert start_node().do(_finalize) == "aclFinalize: nothing works after it\n"


def _finalize(_here: Here) -> str:
    raw = Raw()
    assert raw.library.aclFinalize() == 0
    assert raw.library.aclFinalize() == 100037
    assert raw.library.aclrtSetDevice(0) == 100001
    return raw.sim.violations()


def test_codes_of_registrations_and_communicators(start_node: Start) -> None:
    start_node().do(_codes_of_hccl)


def _codes_of_hccl(_here: Here) -> None:
    raw = Raw()
    library, base = raw.library, raw.sim.malloc(4 << 20)
    assert raw.register(0, 4)[0] == raw.register(base, 0)[0] == abi.HCCL_PARA
    _, handle = raw.register(base, 4096)
    assert raw.register(base, 4096) == (0, handle), "the same range, the same handle"
    assert raw.register(base + 4095, 10)[0] == abi.HCCL_PARA, "an overlap"
    table = hccl_sim.table()
    assert raw.create(table, magic=1)[0] == abi.HCCL_PARA
    assert raw.create(table, version=1)[0] == abi.HCCL_PARA, "no name before version 2"
    assert raw.create(table, traffic_class=3)[0] == abi.HCCL_PARA
    assert raw.create(table, rank=2)[0] == abi.HCCL_PARA
    code, comm = raw.create(table)
    assert code == 0
    assert raw.create(table)[0] == abi.HCCL_PARA, "the name is in use"
    assert library.HcclCommBindMem(comm, handle) == 0
    assert library.HcclCommBindMem(comm, handle) == abi.HCCL_PARA
    assert library.HcclDeregisterGlobalMem(handle) == abi.HCCL_PARA
    assert library.HcclCommDestroy(comm) == abi.HCCL_PARA, "memory is bound"
    _, stream = raw.out("aclrtCreateStreamWithConfig", 0, 0)
    items = (abi.OpDesc * 257)()
    address = ctypes.addressof(items)
    assert library.HcclBatchGet(comm, 1, address, 257, stream) == abi.HCCL_PARA
    assert library.HcclBatchGet(comm, 0, address, 1, stream) == abi.HCCL_PARA, "one's own rank"
    assert library.HcclBatchGet(comm, 1, address, 1, None) == abi.HCCL_PTR
    assert library.HcclBatchGet(comm, 1, address, 1, stream) == abi.HCCL_NOT_FOUND, "not prepared"
    assert library.HcclCommUnbindMem(comm, handle) == 0
    assert library.HcclCommUnbindMem(comm, handle) == abi.HCCL_PARA
    assert library.HcclCommDestroy(comm) == library.HcclCommDestroy(None) == 0
    assert library.HcclDeregisterGlobalMem(handle) == 0
    assert library.HcclDeregisterGlobalMem(handle) == abi.HCCL_PARA


def test_memory_that_is_freed_while_it_is_registered_is_noticed(start_node: Start) -> None:
    assert "freed while it is registered" in start_node().do(_free_registered)


def _free_registered(_here: Here) -> str:
    raw = Raw()
    base = raw.sim.malloc(4096)
    raw.register(base, 4096)
    raw.sim.free(base)
    return raw.sim.violations()


def test_memory_that_is_freed_while_it_is_copied_is_noticed(start_ranks: StartRanks) -> None:
    group = start_ranks().start()
    group.link()
    text = group[0].do(_free_under_a_copy)
    assert "memory freed while a copy of it is queued" in text


def _free_under_a_copy(here: Here) -> str:
    own = ranks.of(here)
    own.sim.tasks(stuck=True)
    moving = ranks.begin_move(here, "link", 1, [(0, 0, 64)], timeout=3.0)
    own.sim.use_device()
    own.sim.free(own.regions["device"].address)
    moving.join()
    return own.sim.violations()


def test_an_exchange_writes_what_comes_whatever_room_there_is(start_ranks: StartRanks) -> None:
    group = start_ranks().start()
    group.link()
    group[0].begin(_exchange, 3, 8)
    assert group[1].do(_exchange, 1, 1) == (3, 1, [b"0", b"1", b"2", b""])
    assert group[0].result()[:2] == (1, 8)
    assert "3 descriptors came, there was room for 1" in group[1].do(ranks.sim, "violations")


def _exchange(here: Here, count: int, room: int) -> tuple[int, int, list[bytes]]:
    """Swap descriptors: how many came, the room that is told afterwards, the first four places."""
    own, sent, received = ranks.of(here), (abi.MemDesc * count)(), (abi.MemDesc * 8)()
    for number, item in enumerate(sent):
        item.remote_rank, item.desc = abi.ANY_RANK, str(number).encode()
    mine, theirs = abi.MemDescs(sent, count), abi.MemDescs(received, room)
    link, found = own.links["link"], ctypes.c_uint32()
    handle = link._communicator._handle  # type: ignore[attr-defined]
    other = 1 - link._group.rank  # type: ignore[attr-defined]
    with own.transport._device.bound():
        code = own.sim.library.HcclExchangeMemDesc(
            handle, other, ctypes.byref(mine), 0, ctypes.byref(theirs), ctypes.byref(found)
        )
    assert code == 0
    return found.value, theirs.length, [item.desc for item in received[:4]]


def _changed(change: Callable[[dict[str, Any]], object]) -> str:
    table = json.loads(hccl_sim.table())
    change(table)
    return json.dumps(table)


def _device(table: dict[str, Any], number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = table["server_list"][number]["device"][0]
    return found


TABLES = {
    "as it should be": (hccl_sim.table(), 0),
    "no text": ("", abi.HCCL_PARA),
    "a trailing comma": (hccl_sim.table().replace("]}", ",]}", 1), abi.HCCL_PARA),
    "no version": (_changed(lambda t: t.pop("version")), abi.HCCL_NOT_FOUND),
    "another version": (_changed(lambda t: t.update(version="3")), abi.HCCL_NOT_SUPPORT),
    "no status": (_changed(lambda t: t.pop("status")), abi.HCCL_NOT_FOUND),
    "a number": (_changed(lambda t: _device(t).update(rank_id=0)), abi.HCCL_PARA),
    "no number": (_changed(lambda t: _device(t).update(rank_id="x")), abi.HCCL_PARA),
    "a gap": (_changed(lambda t: _device(t, 1).update(rank_id="2")), abi.HCCL_PARA),
    "no server": (_changed(lambda t: t.update(server_list=[])), abi.HCCL_PARA),
    "a wrong count": (_changed(lambda t: t.update(server_count="3")), abi.HCCL_PARA),
    "another device": (_changed(lambda t: _device(t).update(device_id="1")), abi.HCCL_UNAVAIL),
    "no address": (_changed(lambda t: _device(t).pop("device_ip")), abi.HCCL_PARA),
    "two families": (_changed(lambda t: _device(t).update(device_ip="::1")), abi.HCCL_PARA),
}


def test_codes_of_rank_tables(start_node: Start) -> None:
    found = start_node().do(_codes_of_tables)
    assert found == {name: code for name, (_, code) in TABLES.items()}


def _codes_of_tables(_here: Here) -> dict[str, int]:
    raw = Raw()
    return {
        name: raw.create(text, name=f"c{number}")[0]
        for number, (name, (text, _)) in enumerate(TABLES.items())
    }


@pytest.mark.parametrize(
    "environ",
    [
        {"HCCL_INTRA_ROCE_ENABLE": "1", "HCCL_INTRA_PCIE_ENABLE": "1"},
        {"HCCL_INTRA_ROCE_ENABLE": "0"},
        {"HCCL_CONNECT_TIMEOUT": "10"},
        {"HCCL_RDMA_TC": "3"},
        {"HCCL_RDMA_SL": "00000000001"},
        {"HCCL_RDMA_TIMEOUT": "21"},
        {"HCCL_RDMA_RETRY_CNT": "0"},
    ],
)
def test_environments_that_hccl_refuses(start_node: Start, environ: dict[str, str]) -> None:
    assert start_node(environ).do(_create_code) == abi.HCCL_PARA


def _create_code(_here: Here) -> int:
    return Raw().create(hccl_sim.table())[0]


def test_the_environment_is_read_once(start_node: Start) -> None:
    assert start_node().do(_change_environment) == [abi.HCCL_PARA, 0, 0]


def _change_environment(_here: Here) -> list[int]:
    raw = Raw()
    table = json.loads(hccl_sim.table(2, 1))
    for device in table["server_list"][0]["device"]:
        del device["device_ip"]  # which RoCE would need
    codes = []
    for number, value in enumerate(("nonsense", None, "1")):
        os.environ.pop("HCCL_INTRA_ROCE_ENABLE", None)
        if value is not None:
            os.environ["HCCL_INTRA_ROCE_ENABLE"] = value
        codes.append(raw.create(json.dumps(table), name=f"c{number}")[0])
    return codes


def test_ranks_and_remapping(start_node: Start) -> None:
    start_node().do(_ranks_and_remapping)


def _ranks_and_remapping(_here: Here) -> None:
    raw = Raw()
    library, number = raw.library, ctypes.c_uint32()
    _, comm = raw.create(hccl_sim.table(3), rank=0)
    handles = (ctypes.c_void_p * 1)(comm)
    assert library.HcclGetRankSize(ctypes.c_void_p(comm), ctypes.byref(number)) == 0
    assert number.value == 3
    assert library.HcclGetRankId(ctypes.c_void_p(comm), ctypes.byref(number)) == 0
    assert number.value == 0
    base = raw.sim.malloc(4096)
    raw.register(base, 4096)
    known, unknown = abi.CommMem(0, base, 4096), abi.CommMem(0, base + 64, 64)
    skipped = abi.CommMem(1, base + 64, 64)

    def remap(*memories: abi.CommMem) -> int:
        array = (abi.CommMem * max(1, len(memories)))(*memories)
        code: int = library.HcclRemapRegistedMemory(handles, array, 1, len(memories))
        return code

    assert remap(known) == remap(known, skipped, abi.CommMem()) == 0
    assert remap(unknown) == remap() == abi.HCCL_PARA
    assert library.HcclRemapRegistedMemory(None, None, 1, 1) == abi.HCCL_PTR
