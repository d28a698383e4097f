"""Operations on memory that the kit's processes run; each function runs in such a process."""

from __future__ import annotations

import ctypes
import gc
import importlib
import mmap
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from datadist.testing.child import State
from datadist.testing.outcome import Outcome, outcome_of
from datadist.testing.pattern import ExpectedWrite, difference, expected, pattern
from datadist.transport import Placement, Region, TransportError

MAP_FIXED = 0x10
PART = 4 << 20
"""Bytes that are compared at a time."""


def allocate(state: State, label: str, size: int, placement: Placement) -> Outcome:
    """A region of the transport; the value is its address, size and placement."""
    return _keep(state, label, lambda: state.live.allocate(size, placement))


def register(
    state: State, label: str, size: int, placement: Placement, maker: str | None, steps: int = 0
) -> Outcome:
    """A region over memory of the user, ``steps`` alignments behind where that begins.

    ``maker`` names the function that makes it, "module:function"; None takes memory of the process.
    """
    offset = steps * state.live.capabilities.alignment
    if maker is None:
        address, keeper = _memory_of_process(size + offset, state.live.capabilities.alignment)
    else:
        module, _, name = maker.partition(":")
        address, keeper = getattr(importlib.import_module(module), name)(size + offset, placement)
    state.buffers[label] = keeper
    return _keep(state, label, lambda: state.live.register(address + offset, size, placement))


def _memory_of_process(size: int, alignment: int) -> tuple[int, object]:
    buffer = mmap.mmap(-1, size + alignment)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    return address + -address % alignment, buffer


def replace(state: State, label: str, seed: int) -> None:
    """Map other memory at the whole pages of a region, with the pattern of a seed."""
    region = state.regions[label]
    begin = region.address + -region.address % mmap.PAGESIZE
    size = (region.address + region.size - begin) // mmap.PAGESIZE * mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    if libc.mmap(begin, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) != begin:
        raise OSError(ctypes.get_errno(), "mmap over a region")
    fill(state, label, seed)


def register_at(state: State, label: str, address: int, size: int, placement: Placement) -> Outcome:
    """A region over any address."""
    return _keep(state, label, lambda: state.live.register(address, size, placement))


def allocate_too_much(state: State, size: int, placement: Placement) -> str:
    """The name of the error that an allocation raises."""
    try:
        state.live.release(state.live.allocate(size, placement))
    except (MemoryError, TransportError) as error:
        names = [base.__name__ for base in type(error).__mro__]
        return "RegistrationError" if "RegistrationError" in names else names[0]
    return f"success: {size} bytes were allocated"


def _keep(state: State, label: str, make: Callable[[], Any]) -> Outcome:
    def call() -> tuple[int, int, int]:
        region = make()
        _announce(state, label, region)
        state.regions[label] = region
        return region.address, region.size, int(region.placement)

    return outcome_of(call)


def _announce(state: State, label: str, region: Region) -> None:
    """Tell the open links of a new region; one that refuses it undoes the registration."""
    told: list[str] = []
    try:
        for link in list(state.links):
            state.links[link].region_added(region)
            told.append(link)
    except TransportError:
        for link in told:
            state.links[link].region_removed(region)
        state.live.release(region)
        raise
    for link in told:
        state.added[link].add(label)


def release(state: State, label: str) -> None:
    """Release a region and the kit's memory behind it."""
    region = state.regions.pop(label)
    for link, labels in state.added.items():
        if label in labels:
            labels.remove(label)
            state.links[link].region_removed(region)
    state.live.release(region)
    state.buffers.pop(label, None)


def release_all(state: State) -> None:
    """Release what is left."""
    for label in list(state.regions):
        release(state, label)


def touch_after_release(state: State, label: str) -> bytes | None:
    """Release a region while holding its keeper, as an array view does, and use the memory."""
    region = state.regions[label]
    keeper, address = region.keeper, region.address
    release(state, label)
    del region
    gc.collect()
    return None if keeper is None else ctypes.string_at(address, 16)


def _addressable(state: State, label: str) -> bool:
    return state.regions[label].placement in state.live.capabilities.host_addressable


def _put(state: State, label: str, data: bytes) -> None:
    region = state.regions[label]
    if _addressable(state, label):
        ctypes.memmove(region.address, data, len(data))
    else:
        _through_staging(state, label, data)


def _get(state: State, label: str) -> Iterator[tuple[int, bytes]]:
    """The content of a region, in parts with their offsets, so that large memory is not copied as a
    whole.
    """
    region = state.regions[label]
    if not _addressable(state, label):
        yield 0, _through_staging(state, label, None)
        return
    for at in range(0, region.size, PART):
        yield at, ctypes.string_at(region.address + at, min(PART, region.size - at))


def _through_staging(state: State, label: str, data: bytes | None) -> bytes:
    """Write (``data``) or read memory that the CPU cannot access, with the transport's own copy."""
    region = state.regions[label]
    return _staged(state, region.address, region.size, data)


def _staged(state: State, address: int, size: int, data: bytes | None) -> bytes:
    host = state.live.allocate(size, Placement.HOST)
    try:
        there, here = array("q", [address]), array("q", [host.address])
        if data is not None:
            ctypes.memmove(host.address, data, len(data))
            there, here = here, there
        state.live.copy(here, there, array("q", [size]))
        return ctypes.string_at(host.address, size)
    finally:
        state.live.release(host)


def content(state: State, label: str, at: int, size: int) -> bytes:
    """A copy of a part of a region."""
    address = state.regions[label].address + at
    if _addressable(state, label):
        return ctypes.string_at(address, size)
    return _staged(state, address, size, None)


def fill(state: State, label: str, seed: int) -> None:
    """Fill a region with the pattern of a seed."""
    _put(state, label, pattern(seed, state.regions[label].size))


def wrong(
    state: State, label: str, seed: int, expected_write: Sequence[ExpectedWrite]
) -> str | None:
    """How a region differs from its pattern with these arrivals; None where all is right."""
    wanted = expected(seed, state.regions[label].size, expected_write)
    for at, part in _get(state, label):
        text = difference(part, wanted[at : at + len(part)], at)
        if text:
            return text
    return None


def torn(
    state: State, label: str, seed: int, expected_write: Sequence[ExpectedWrite]
) -> str | None:
    """As :func:`wrong`, but each byte of these writes may also have its old value."""
    size = state.regions[label].size
    before, after = pattern(seed, size), expected(seed, size, expected_write)
    for at, part in _get(state, label):
        end = at + len(part)
        found, old, new = (
            np.frombuffer(b, np.uint8) for b in (part, before[at:end], after[at:end])
        )
        text = difference(part, np.where(found == new, new, old).tobytes(), at)
        if text:
            return text
    return None


def is_zero(state: State, label: str) -> bool:
    """Whether a region holds nothing but zeros."""
    return all(part.count(0) == len(part) for _, part in _get(state, label))


def copy(state: State, dst: array[int], src: array[int], length: array[int]) -> Outcome:
    """A local copy by the transport."""
    return outcome_of(lambda: state.live.copy(dst, src, length))
