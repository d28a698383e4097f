"""Which memory can be read and written, from the kernel's list and by questions (memory_map.py)."""

from __future__ import annotations

import ctypes
import mmap

import pytest

from datadist.base.memory_map import (
    MAPS,
    ListedMappings,
    MemoryMap,
    NotWritable,
    QueriedMappings,
    current_mappings,
)

LINES = [
    "1000-2000 rw-p 00000000 00:00 0 ",
    "2000-3000 rw-s 00000000 00:00 0  /dev/shm/name with blanks",
    "3000-4000 r--p 00000000 00:00 0 ",
    "6000-8000 rw-p 00000000 00:00 0 ",
]


@pytest.mark.parametrize(
    ("address", "size", "fault"),
    [
        (0x1000, 0x2000, None), (0x1FFF, 2, None), (0x6000, 0x2000, None), (0x7FFF, 1, None),
        (0x1000, 0x2001, (0x3000, "r--p")), (0x3800, 1, (0x3800, "r--p")),
        (0xFFF, 2, (0xFFF, None)), (0x5000, 0x1000, (0x5000, None)),
        (0x7000, 0x1001, (0x8000, None)), (0x9000, 1, (0x9000, None)),
    ],
)  # fmt: skip
def test_a_range_is_writable_if_all_of_it_is(
    address: int, size: int, fault: tuple[int, str | None] | None
) -> None:
    mapped = ListedMappings(LINES)
    if fault is None:
        mapped.check_writable(address, size)
        return
    with pytest.raises(NotWritable) as caught:
        mapped.check_writable(address, size)
    assert (caught.value.address, caught.value.mode) == fault


def _maps() -> list[MemoryMap]:
    return [ListedMappings(MAPS.read_text().splitlines()), current_mappings()]


def test_memory_of_this_process_is_found_however_it_is_asked_for() -> None:
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 4 * page)
    held = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(held)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + 2 * page), page, mmap.PROT_READ) == 0
    for mapped in _maps():
        mapped.check_writable(address, 2 * page)
        mapped.check_writable(address + 3 * page, page)
        with pytest.raises(NotWritable) as caught:
            mapped.check_writable(address, 4 * page)
        assert caught.value.address == address + 2 * page
        assert str(caught.value.mode).startswith("r-")
    del held
    memory.close()
    for mapped in _maps():
        with pytest.raises(NotWritable) as caught:
            mapped.check_writable(8, 1)
        assert (caught.value.address, caught.value.mode) == (8, None)


def test_a_kernel_that_answers_no_questions_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: QueriedMappings, address: int) -> None:
        raise OSError(25, "Inappropriate ioctl for device")

    monkeypatch.setattr(QueriedMappings, "find", refuse)
    assert isinstance(current_mappings(), ListedMappings)
