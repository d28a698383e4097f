"""Tensors of other libraries as memory: NumPy, torch, and all that speaks DLPack.

What is needed is read by protocols (``__array_interface__``, ``__dlpack__``,
``__cuda_array_interface__``); no library is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datadist import dlpack
from datadist.base.callers import pass_on
from datadist.status import LLMException, param_invalid

__all__ = [
    "HOST_DEVICES",
    "MANAGED_DEVICES",
    "TensorMemory",
    "is_tensor",
    "memory_of",
    "stride_of_all",
]

CPU = 1
HOST_DEVICES = frozenset({CPU, 3, 11})
"""Device types of DLPack whose memory is the host's: the CPU, and pinned memory of CUDA and ROCm."""
MANAGED_DEVICES = frozenset({13})
"""Memory that both can address."""
_KINDS = {
    "i": "int", "u": "uint", "f": "float", "b": "bool", 0: "int", 1: "uint", 2: "float",
    dlpack.BFLOAT: "bfloat", 6: "bool",
}  # fmt: skip
"""Names of types without their bits, by kind of NumPy and by type code of DLPack."""


@dataclass(frozen=True)
class TensorMemory:
    """Where a tensor lies."""

    name: str
    """How the argument is called."""
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Bytes, per dimension."""
    type_name: str
    element_bytes: int
    device_type: int
    """Of DLPack."""
    read_only: bool
    keeper: object = None
    """What keeps the memory, whatever becomes of the tensor; None where the tensor alone does."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a block: of all dimensions but the first one.

        Raises LLM_PARAM_INVALID where these do not lie side by side.
        """
        expected = self.element_bytes
        for size, stride in zip(self.shape[:0:-1], self.strides[:0:-1], strict=True):
            if size != 1 and stride != expected:
                raise param_invalid(
                    f"{self.name} has strides {list(self.strides)} (bytes) and shape {list(self.shape)}: "
                    "only the first dimension may lie apart; give it permuted to the order of memory, "
                    "or a contiguous copy"
                )
            expected *= size
        return expected

    @property
    def block_stride(self) -> int | None:
        """Bytes from one block to the next; None where they lie side by side, or there is one."""
        if self.shape[0] == 1 or self.strides[0] == self.block_bytes:
            return None
        return self.strides[0]


def is_tensor(value: object) -> bool:
    """Whether a value is a tensor, by what its class has; not where it says that it has no dimensions."""
    kind = type(value)
    if not any(
        hasattr(kind, name)
        for name in ("__array_interface__", "__dlpack__", "__cuda_array_interface__")
    ):
        return False
    try:
        return len(getattr(value, "shape", (1,))) > 0
    except Exception as error:  # `memory_of` says what is wrong
        pass_on(error)
        return True


def memory_of(name: str, value: Any) -> TensorMemory:
    """Where a tensor lies. Raises LLM_PARAM_INVALID for one that does not say it."""
    kind = type(value)
    try:
        found = _memory_of(name, value)
    except LLMException:
        raise
    except Exception as error:
        pass_on(error)
        raise param_invalid(
            f"{name} is a {kind.__name__} that gives no memory: {type(error).__name__}: {error}"
        ) from error
    if not found.shape:
        raise param_invalid(
            f"{name} is a {kind.__name__} without dimensions: the first one counts blocks"
        )
    return found


def _memory_of(name: str, value: Any) -> TensorMemory:
    kind = type(value)
    if hasattr(kind, "__array_interface__"):
        return _of_interface(name, value, value.__array_interface__, CPU)
    if hasattr(kind, "__dlpack__"):
        return _of_dlpack(name, value)
    return _of_interface(name, value, value.__cuda_array_interface__, 2)


def _of_interface(
    name: str, value: Any, interface: Mapping[str, Any], device_type: int
) -> TensorMemory:
    """By ``__array_interface__`` or ``__cuda_array_interface__``."""
    order, kind, nbytes = interface["typestr"][0], interface["typestr"][1], interface["typestr"][2:]
    if kind == "O":
        raise param_invalid(f"{name} has elements that are objects of Python: give one of numbers")
    size = int(nbytes)
    if order == ">" and size > 1:
        raise param_invalid(f"{name} is of {interface['typestr']}, the other byte order")
    shape = tuple(interface["shape"])
    strides = interface.get("strides") or _dense(shape, size)
    own = getattr(getattr(value, "dtype", None), "name", None)
    type_name = _KINDS[kind] + ("" if kind == "b" else str(8 * size)) if kind in _KINDS else own
    address, read_only = interface["data"]
    return TensorMemory(
        name,
        int(address),
        shape,
        tuple(strides),
        str(type_name),
        size,
        device_type,
        bool(read_only),
    )


def _of_dlpack(name: str, value: Any) -> TensorMemory:
    plain = value.detach() if hasattr(value, "detach") else value  # from the gradients of torch
    device_type = int(plain.__dlpack_device__()[0])
    # on a device -1 says that nobody waits for what is computed there
    capsule = _capsule_of(plain, **({} if device_type == CPU else {"stream": -1}))
    tensor, flags = dlpack.tensor_in(capsule), dlpack.flags_in(capsule)
    if flags & dlpack.IS_COPIED:
        raise param_invalid(
            f"{name} is a {type(value).__name__} that gives a copy of its memory only"
        )
    count, bits = tensor.ndim, tensor.dtype.bits * tensor.dtype.lanes
    if bits % 8:
        raise param_invalid(f"{name} has elements of {bits} bits, which are no bytes")
    size, code = bits // 8, tensor.dtype.code
    shape = tuple(tensor.shape[:count])
    strides = (
        tuple(size * stride for stride in tensor.strides[:count])
        if tensor.strides
        else _dense(shape, size)
    )
    type_name = _KINDS[code] + ("" if code == 6 else str(bits)) if code in _KINDS else None
    own = str(getattr(value, "dtype", f"DLPack type {code} of {bits} bits"))
    address = (tensor.data or 0) + tensor.byte_offset
    return TensorMemory(
        name, address, shape, strides, type_name or own, size, device_type,
        bool(flags & dlpack.READ_ONLY), capsule,
    )  # fmt: skip


def _capsule_of(plain: Any, **options: int) -> object:
    """Of version 1 of the protocol, which tells of read-only memory and copies, or of the one before."""
    try:
        return plain.__dlpack__(max_version=(1, 0), copy=False, **options)
    except TypeError as error:
        pass_on(error)
        return plain.__dlpack__(**options)


def _dense(shape: Sequence[int], size: int) -> tuple[int, ...]:
    strides = [size]
    for dim in reversed(shape[1:]):
        strides.append(strides[-1] * dim)
    return tuple(reversed(strides))


def stride_of_all(tensors: Sequence[TensorMemory]) -> int | None:
    """Bytes from one block to the next in tensors of one shape; None where blocks lie side by side.

    Raises LLM_PARAM_INVALID where tensors differ, and for blocks that are not contiguous.
    """
    for tensor in tensors:
        _ = tensor.block_bytes  # raises
        if tensor.block_stride != tensors[0].block_stride:
            raise param_invalid(
                f"{tensor.name} has strides {list(tensor.strides)} (bytes), and {tensors[0].name} "
                f"{list(tensors[0].strides)}: blocks must lie equally far apart in all tensors of a cache"
            )
    return tensors[0].block_stride
