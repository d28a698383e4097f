"""Tensors that a program registers: checked against the description of the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from datadist.base import checks
from datadist.base.hints import ADDRESSES
from datadist.status import param_invalid
from datadist.tensors import (
    HOST_DEVICES,
    MANAGED_DEVICES,
    TensorMemory,
    is_tensor,
    memory_of,
    stride_of_all,
)
from datadist.transport import Placement
from datadist.types import ARRAY_TYPES, CacheDesc, DataType, element_size, fixed, with_block_stride

__all__ = ["Given", "check_memory", "take"]


class Given(NamedTuple):
    """What a program gave to register: addresses, and the tensors among them."""

    desc: CacheDesc
    """Fixed, with the stride of the tensors."""
    addresses: list[int]
    tensors: list[object]
    """What keeps the memory."""


def check_memory(addrs: object) -> None:
    """Raise ``TypeError`` unless it is a list of addresses and tensors."""
    checks.check_isinstance("addrs", addrs, list, allow_none=False, use=ADDRESSES)
    assert isinstance(addrs, list)
    if not any(map(is_tensor, addrs)):
        checks.check_list_of_int("addrs", addrs, ADDRESSES)
        return
    for place, value in enumerate(addrs):
        if not is_tensor(value):
            checks.check_isinstance(f"addrs[{place}]", value, int, allow_none=False, use=ADDRESSES)


def take(
    desc: CacheDesc, addrs: Sequence[Any], host_addressable: Callable[[], frozenset[Placement]]
) -> Given:
    """Addresses of tensors, which are checked against the description; of those that lie apart it
    takes the stride.

    ``host_addressable`` gives the placements that are memory of the host with this transport. Raises
    LLM_PARAM_INVALID.
    """
    desc = fixed(desc)
    if not any(map(is_tensor, addrs)):
        return Given(desc, list(addrs), [])
    found = {
        place: memory_of(f"addrs[{place}]", value)
        for place, value in enumerate(addrs)
        if is_tensor(value)
    }
    for tensor in found.values():
        _check_shape(desc, tensor)
        _check_type(desc, tensor)
        _check_device(desc, tensor, host_addressable())
    made = with_block_stride(desc, _stride(desc, list(found.values())))
    for tensor in found.values():
        _check_writable(tensor)
    addresses = [
        found[place].address if place in found else int(value) for place, value in enumerate(addrs)
    ]
    keepers: list[object] = [(addrs[place], tensor.keeper) for place, tensor in found.items()]
    return Given(made, addresses, keepers)


# -- against a description -----------------------------------------------------------------------


def _check_writable(tensor: TensorMemory) -> None:
    """A cache is also written: by pulls, copies, and peers."""
    if tensor.read_only:
        raise param_invalid(
            f"{tensor.name} is read-only, and caches are written: give a writable copy"
        )


def _check_shape(desc: CacheDesc, tensor: TensorMemory) -> None:
    if list(tensor.shape) != list(desc.shape):
        raise param_invalid(
            f"{tensor.name} has shape {list(tensor.shape)}, and the description says "
            f"{list(desc.shape)}: they must be equal (CacheDesc.from_tensors makes one)"
        )


def _check_type(desc: CacheDesc, tensor: TensorMemory) -> None:
    """Types must be equal; one that the API has no name for may stand for one of its size."""
    wanted = desc.data_type
    size = element_size(wanted)
    known = tensor.type_name in ARRAY_TYPES.values()
    words = wanted is DataType.DT_BF16 and tensor.type_name == "uint16"  # so has NumPy bfloat16
    if (
        tensor.type_name == ARRAY_TYPES.get(wanted)
        or words
        or (not known and tensor.element_bytes == size)
    ):
        return
    raise param_invalid(
        f"{tensor.name} has elements of type {tensor.type_name} ({tensor.element_bytes} bytes), and the "
        f"description says {wanted.name} ({size} bytes): give a view of that type, or correct data_type"
    )


def _check_device(
    desc: CacheDesc, tensor: TensorMemory, host_addressable: frozenset[Placement]
) -> None:
    if tensor.device_type in MANAGED_DEVICES:
        return
    in_host = tensor.device_type in HOST_DEVICES
    if in_host == (desc.placement in host_addressable):
        return
    where = (
        "memory of the host"
        if in_host
        else f"memory of a device (DLPack type {tensor.device_type})"
    )
    raise param_invalid(
        f"{tensor.name} lies in {where}, and with this backend {desc.placement.name} memory is "
        f"{'that of the device' if in_host else 'that of the host'}: give another placement or tensor"
    )


def _stride(desc: CacheDesc, tensors: Sequence[TensorMemory]) -> int | None:
    """Bytes from one block of the tensors to the next; of one block any stride is right."""
    stride = stride_of_all(tensors)
    dense = tensors[0].block_bytes
    if desc.block_stride is None or desc.shape[0] == 1:
        return desc.block_stride if desc.shape[0] == 1 else stride
    if (stride or dense) != desc.block_stride:
        raise param_invalid(
            f"{tensors[0].name} has blocks that lie {stride or dense} bytes apart, and the description "
            f"says block_stride {desc.block_stride}: they must be equal"
        )
    return desc.block_stride
