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
    """Whether a value is a tensor with dimensions, by what its class has."""
    kind = type(value)
    if not any(
        hasattr(kind, name)
        for name in ("__array_interface__", "__dlpack__", "__cuda_array_interface__")
    ):
        return False
    shape = getattr(value, "shape", None)
    return shape is None or len(shape) > 0


def memory_of(name: str, value: Any) -> TensorMemory:
    """Where a tensor lies. Raises LLM_PARAM_INVALID for one that does not say it."""
    kind = type(value)
    try:
        if hasattr(kind, "__array_interface__"):
            return _of_interface(name, value, value.__array_interface__, CPU)
        if hasattr(kind, "__dlpack__"):
            return _of_dlpack(name, value)
        return _of_interface(name, value, value.__cuda_array_interface__, 2)
    except LLMException:
        raise
    except Exception as error:
        pass_on(error)
        raise param_invalid(
            f"{name} is a {kind.__name__} that gives no memory: {type(error).__name__}: {error}"
        ) from error


def _of_interface(
    name: str, value: Any, interface: Mapping[str, Any], device_type: int
) -> TensorMemory:
    """By ``__array_interface__`` or ``__cuda_array_interface__``."""
    order, kind, nbytes = interface["typestr"][0], interface["typestr"][1], interface["typestr"][2:]
    size = int(nbytes)
    if order == ">" and size > 1:
        raise param_invalid(f"{name} is of {interface['typestr']}, the other byte order")
    shape = tuple(interface["shape"])
    strides = interface.get("strides") or _dense(shape, size)
    own = getattr(getattr(value, "dtype", None), "name", None)
    type_name = _KINDS[kind] + ("" if kind == "b" else str(8 * size)) if kind in _KINDS else own
    return TensorMemory(
        name, int(interface["data"][0]), shape, tuple(strides), str(type_name), size, device_type
    )


def _of_dlpack(name: str, value: Any) -> TensorMemory:
    plain = value.detach() if hasattr(value, "detach") else value  # from the gradients of torch
    device_type = int(plain.__dlpack_device__()[0])
    # on a device -1 says that nobody waits for what is computed there
    capsule = plain.__dlpack__() if device_type == CPU else plain.__dlpack__(stream=-1)
    tensor = dlpack.tensor_in(capsule)
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
    return TensorMemory(name, address, shape, strides, type_name or own, size, device_type)


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
