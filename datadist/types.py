"""Types of the API: enumerations, cache descriptions, memory and cluster descriptions."""

from __future__ import annotations

import copy
import math
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from datadist.base import checks
from datadist.base.addresses import parse_ipv4
from datadist.base.callers import pass_on
from datadist.base.enums import NamedInt
from datadist.base.hints import ADDRESSES, TENSORS
from datadist.base.keywords import named_keywords
from datadist.base.names import CheckedAttributes, NamedMembers
from datadist.keys import INVALID_ID, BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from datadist.status import LLMException, param_invalid
from datadist.tensors import TensorMemory, is_tensor, memory_of, stride_of_all
from datadist.transport import Placement

__all__ = [
    "ARRAY_TYPES",
    "INVALID_ID",
    "BlocksCacheKey",
    "CacheDesc",
    "CacheKey",
    "CacheKeyByIdAndIndex",
    "DataType",
    "LLMClusterInfo",
    "LLMRole",
    "MemInfo",
    "Memtype",
    "Placement",
    "ReceivedMessage",
    "RegisterMemStatus",
    "check_block_stride",
    "element_size",
    "fixed",
    "ipv4_number",
    "ipv4_text",
    "with_block_stride",
]


@named_keywords
@dataclass(frozen=True, slots=True)
class ReceivedMessage:
    """A message of the program of another cluster; from :meth:`LLMDataDist.messages`.

    ``cluster_id, data = message`` takes it apart.
    """

    cluster_id: int
    """The sender's."""
    data: bytes

    def __iter__(self) -> Iterator[Any]:
        return iter((self.cluster_id, self.data))


class LLMRole(NamedInt, metaclass=NamedMembers):
    """The role of an engine; a label without effect."""

    PROMPT = 1
    DECODER = 2
    MIX = 3


class RegisterMemStatus(Enum, metaclass=NamedMembers):
    """State of a communication domain."""

    OK = 0
    PREPARING = 1
    FAILED = 2


class Memtype(Enum, metaclass=NamedMembers):
    """Where memory lies, in :class:`MemInfo` (numbered the other way round than Placement)."""

    MEM_TYPE_DEVICE = 0
    MEM_TYPE_HOST = 1


class DataType(Enum, metaclass=NamedMembers):
    """Element types; numbers are those of the graph engine's tensor types."""

    DT_FLOAT = 0
    DT_FLOAT16 = 1
    DT_INT8 = 2
    DT_INT32 = 3
    DT_UINT8 = 4
    DT_INT16 = 6
    DT_UINT16 = 7
    DT_UINT32 = 8
    DT_INT64 = 9
    DT_UINT64 = 10
    DT_DOUBLE = 11
    DT_BOOL = 12
    DT_STRING = 13
    DT_BF16 = 27


ARRAY_TYPES = {
    DataType.DT_FLOAT: "float32",
    DataType.DT_FLOAT16: "float16",
    DataType.DT_INT8: "int8",
    DataType.DT_INT32: "int32",
    DataType.DT_UINT8: "uint8",
    DataType.DT_INT16: "int16",
    DataType.DT_UINT16: "uint16",
    DataType.DT_UINT32: "uint32",
    DataType.DT_INT64: "int64",
    DataType.DT_UINT64: "uint64",
    DataType.DT_DOUBLE: "float64",
    DataType.DT_BOOL: "bool",
    DataType.DT_BF16: "bfloat16",
}
"""What NumPy (for bfloat16: ml_dtypes) and torch call them; DT_STRING has no such name."""

_SIZES = {
    DataType.DT_FLOAT: 4,
    DataType.DT_FLOAT16: 2,
    DataType.DT_INT8: 1,
    DataType.DT_INT32: 4,
    DataType.DT_UINT8: 1,
    DataType.DT_INT16: 2,
    DataType.DT_UINT16: 2,
    DataType.DT_UINT32: 4,
    DataType.DT_INT64: 8,
    DataType.DT_UINT64: 8,
    DataType.DT_DOUBLE: 8,
    DataType.DT_BOOL: 1,
    DataType.DT_STRING: 16,
    DataType.DT_BF16: 2,
}


def element_size(data_type: DataType) -> int:
    """Bytes of one element. Raises ``TypeError`` for anything but a member of DataType."""
    checks.check_isinstance("data_type", data_type, DataType, allow_none=False)
    return _SIZES[data_type]


@named_keywords
class CacheDesc(CheckedAttributes):
    """``num_tensors`` tensors of one ``shape`` and type.

    Dimension 0 counts the batch slots of a contiguous cache or the blocks of a blocks cache.
    ``batch_dim_index``, ``seq_len_dim_index`` and ``kv_tensor_format`` are kept but mean nothing in
    cache-manager mode.

    ``tensors_per_layer`` and ``block_stride`` are extensions. A layer is so many tensors that follow
    each other: 2 for K and V, 1 where a tensor holds both. ``block_stride`` is the distance in bytes
    from the begin of a block (or slot) to that of the next one, for layers that are interleaved in one
    buffer; None means that blocks lie side by side. It is a multiple of the element size.

    Raises ``TypeError``, ``ValueError``, and LLMException (LLM_PARAM_INVALID) for a dimension index
    outside of ``shape``, 0 tensors per layer, and a stride that is no multiple or below a block.
    """

    def __init__(
        self,
        num_tensors: int,
        shape: Sequence[int],
        data_type: DataType,
        placement: Placement = Placement.DEVICE,
        batch_dim_index: int = 0,
        seq_len_dim_index: int = -1,
        kv_tensor_format: str | None = None,
        *,
        tensors_per_layer: int = 2,
        block_stride: int | None = None,
    ) -> None:
        checks.check_uint32("num_tensors", num_tensors)
        if shape is not None:
            checks.check_sequence_of("shape", shape, int)
        checks.check_isinstance("data_type", data_type, DataType)
        checks.check_isinstance("placement", placement, Placement)
        checks.check_isinstance("batch_dim_index", batch_dim_index, int)
        checks.check_int32("seq_len_dim_index", seq_len_dim_index)
        checks.check_isinstance("kv_tensor_format", kv_tensor_format, str)
        # None passes the checks of types above, and fails only where the values are used.
        checks.check_isinstance("shape", shape, (list, tuple), allow_none=False)
        checks.check_isinstance("batch_dim_index", batch_dim_index, int, allow_none=False)
        _check_dims(shape, batch_dim_index, seq_len_dim_index)
        _check_per_layer(tensors_per_layer)
        if block_stride is not None:
            checks.check_int64("block_stride", block_stride)
        self._num_tensors = num_tensors
        self._shape = shape
        self._data_type = data_type
        self._placement = placement
        self._batch_dim = batch_dim_index
        self._batch_size = shape[batch_dim_index]
        self._seq_len_dim_index = seq_len_dim_index
        self._kv_tensor_format = kv_tensor_format
        self._tensors_per_layer = tensors_per_layer
        self._block_stride = block_stride
        self._size: int | None = None
        if min(shape) > 0:  # other ones are refused where a cache is made
            check_block_stride(self)

    @property
    def num_tensors(self) -> int:
        """Number of tensors."""
        return self._num_tensors

    @property
    def shape(self) -> Sequence[int]:
        """Shape of each tensor: the object that was given."""
        return self._shape

    @property
    def data_type(self) -> DataType:
        """Type of the elements."""
        return self._data_type

    @property
    def placement(self) -> Placement:
        """HOST or DEVICE."""
        return self._placement

    @property
    def batch_dim(self) -> int:
        """``batch_dim_index`` as given."""
        return self._batch_dim

    @property
    def batch_size(self) -> int:
        """``shape[batch_dim_index]`` at construction."""
        return self._batch_size

    @property
    def seq_len_dim_index(self) -> int:
        """As given."""
        return self._seq_len_dim_index

    @property
    def kv_tensor_format(self) -> str | None:
        """As given."""
        return self._kv_tensor_format

    @property
    def tensors_per_layer(self) -> int:
        """As given: the tensors of one layer, in layer ranges and layer-wise transfers."""
        return self._tensors_per_layer

    @property
    def block_stride(self) -> int | None:
        """As given: bytes from one block to the next, or None where they lie side by side."""
        return self._block_stride

    @property
    def size(self) -> int:
        """Bytes of the elements of one tensor, without what lies between blocks.

        Raises LLMException (without a status code, as upstream) when a dimension is not positive or
        the size exceeds int64.
        """
        if self._size is None:
            if min(self._shape) <= 0:
                raise LLMException(
                    f"shape {list(self._shape)} has a dimension that is not positive"
                )
            size = math.prod(self._shape) * element_size(self._data_type)
            if size >= 2**63:
                raise LLMException(f"a tensor of shape {list(self._shape)} exceeds int64 bytes")
            self._size = size
        return self._size

    @classmethod
    def from_tensors(
        cls,
        tensors: Sequence[Any],
        placement: Placement = Placement.DEVICE,
        *,
        tensors_per_layer: int = 2,
    ) -> CacheDesc:
        """The description of a cache over tensors of one shape, type and stride (an extension).

        Tensors are those of NumPy, torch, and others with DLPack or an array interface; only their
        first dimension, which counts slots or blocks, may lie apart (``block_stride``).

        Raises ``TypeError``, LLMException (LLM_PARAM_INVALID) for tensors that make no cache.
        """
        checks.check_isinstance("tensors", tensors, (list, tuple), allow_none=False, use=TENSORS)
        if not tensors:
            raise param_invalid("tensors is empty: give one per tensor of the cache")
        found = [_memory_of(f"tensors[{place}]", value) for place, value in enumerate(tensors)]
        first = found[0]
        for tensor in found:
            if (tensor.shape, tensor.type_name) != (first.shape, first.type_name):
                raise param_invalid(
                    f"{tensor.name} has shape {list(tensor.shape)} of {tensor.type_name}, and "
                    f"{first.name} {list(first.shape)} of {first.type_name}: all must be alike"
                )
        return cls(
            len(found), list(first.shape), _data_type_of(first), placement,
            tensors_per_layer=tensors_per_layer, block_stride=stride_of_all(found),
        )  # fmt: skip

    def update_dim(self, dim_index: int, dim_value: int) -> None:
        """Change a dimension of a list shape. Raises ``TypeError`` for a tuple and for no integers."""
        checks.check_isinstance("dim_index", dim_index, int, allow_none=False)
        checks.check_isinstance("dim_value", dim_value, int, allow_none=False)
        if not isinstance(self._shape, list):
            raise TypeError(f"shape is a {type(self._shape).__name__}, only support list")
        self._shape[dim_index] = dim_value
        self._size = None

    def __repr__(self) -> str:
        # Upstream's text, in which a blank is missing, too; what it does not know only where it counts.
        return (
            f"CacheDesc(num_tensors={self._num_tensors}, shape={self._shape}, "
            f"data_type={self._data_type}, placement={self._placement}, "
            f"batch_dim_index={self._batch_dim}, seq_len_dim_index={self._seq_len_dim_index},"
            f"kv_tensor_format={self._kv_tensor_format}{self._extensions()})"
        )

    def _extensions(self) -> str:
        text = ""
        if self._tensors_per_layer != 2:
            text += f", tensors_per_layer={self._tensors_per_layer}"
        if self._block_stride is not None:
            text += f", block_stride={self._block_stride}"
        return text


def _check_per_layer(value: int) -> None:
    checks.check_uint32("tensors_per_layer", value)
    if value == 0:
        raise param_invalid("tensors_per_layer is 0: a layer has at least one tensor")


def check_block_stride(desc: CacheDesc) -> None:
    """Whether blocks of the current shape lie apart by ``block_stride``. Raises LLM_PARAM_INVALID."""
    stride = desc.block_stride
    if stride is None:
        return
    element = element_size(desc.data_type)
    block = math.prod(desc.shape[1:]) * element
    if stride < block:
        raise param_invalid(
            f"block_stride is {stride}: a block of shape {list(desc.shape[1:])} has {block} bytes, and "
            "the next one begins behind it; give bytes, not elements"
        )
    if stride % element:
        raise param_invalid(
            f"block_stride is {stride}: it must be a multiple of the {element} bytes of an element"
        )


def _check_dims(shape: Sequence[int], batch_dim: int, seq_len_dim: int) -> None:
    if not 0 <= batch_dim < len(shape):
        raise param_invalid(f"batch_dim_index is {batch_dim}, outside of the shape {list(shape)}")
    if seq_len_dim != -1 and not 0 <= seq_len_dim < len(shape):
        raise param_invalid(
            f"seq_len_dim_index is {seq_len_dim}, expected -1 or a dimension of the shape "
            f"{list(shape)}"
        )
    for index, dim in enumerate(shape):
        checks.check_int64(f"shape[{index}]", dim)


def _memory_of(name: str, value: object) -> TensorMemory:
    if not is_tensor(value):
        raise TypeError(
            f"{name} is a {type(value).__name__}, only support arrays and tensors with dimensions "
            "(NumPy, torch, DLPack)"
        )
    return memory_of(name, value)


def _data_type_of(tensor: TensorMemory) -> DataType:
    for data_type, name in ARRAY_TYPES.items():
        if name == tensor.type_name:
            return data_type
    raise param_invalid(
        f"{tensor.name} has elements of type {tensor.type_name}, which has no DataType: view it as one "
        "of its size, such as uint8"
    )


def with_block_stride(desc: CacheDesc, stride: int | None) -> CacheDesc:
    """A copy with another stride. Raises LLM_PARAM_INVALID for one that no blocks have."""
    same = copy.copy(desc)
    same._block_stride = stride
    check_block_stride(same)
    return same


def fixed(desc: CacheDesc) -> CacheDesc:
    """A copy with the current shape; it never changes. Raises ``TypeError`` where it has no placement."""
    checks.check_isinstance("placement", desc.placement, Placement, allow_none=False)
    same = copy.copy(desc)
    same._shape = tuple(desc.shape)
    same._size = None
    return same


@named_keywords
class MemInfo(CheckedAttributes):
    """A range of memory: type, address, size in bytes. Raises ``TypeError``."""

    def __init__(self, mem_type: Memtype, addr: int, size: int) -> None:
        checks.check_isinstance("mem_type", mem_type, Memtype)
        checks.check_isinstance("addr", addr, int, use=ADDRESSES)
        checks.check_isinstance("size", size, int)
        self._mem_type = mem_type
        self._addr = addr
        self._size = size

    @property
    def mem_type(self) -> Memtype:
        """Where it lies."""
        return self._mem_type

    @property
    def addr(self) -> int:
        """First byte."""
        return self._addr

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    def __repr__(self) -> str:
        return f"MemInfo(mem_type={self._mem_type}, addr={self._addr}, size={self._size})"


@named_keywords
class LLMClusterInfo(CheckedAttributes):
    """A cluster to link with by address: its id, and IP and port of either end."""

    def __init__(self) -> None:
        self._remote_cluster_id: int | None = None
        self._remote_role_type: LLMRole | int | None = None
        self._local_ip_info_list: list[tuple[int, int]] = []
        self._remote_ip_info_list: list[tuple[int, int]] = []
        self._link_error: str | None = None

    @property
    def link_error(self) -> str | None:
        """Why the last `link_clusters` with this object failed for it; None when it did not."""
        return self._link_error

    @property
    def remote_cluster_id(self) -> int | None:
        """Id of the cluster; setting raises ``TypeError``, ``ValueError`` unless it is a uint64."""
        return self._remote_cluster_id

    @remote_cluster_id.setter
    def remote_cluster_id(self, value: int) -> None:
        checks.check_uint64("remote_cluster_id", value)
        self._remote_cluster_id = value

    @property
    def remote_role_type(self) -> LLMRole | int | None:
        """Role of the cluster; has no effect."""
        return self._remote_role_type

    @remote_role_type.setter
    def remote_role_type(self, value: LLMRole | int | None) -> None:
        checks.check_isinstance("remote_role_type", value, (LLMRole, int))
        self._remote_role_type = value

    @property
    def local_ip_info_list(self) -> list[tuple[int, int]]:
        """Local addresses: IPv4 as an integer, first octet least significant, and port."""
        return self._local_ip_info_list

    @property
    def remote_ip_info_list(self) -> list[tuple[int, int]]:
        """Remote addresses, in the same form."""
        return self._remote_ip_info_list

    def append_local_ip_info(self, ip: str | int, port: int) -> None:
        """Add a local address.

        Raises ``TypeError``, ``ValueError`` for the port, ``RuntimeError`` for text that is no IPv4
        address.
        """
        self._local_ip_info_list.append(_ip_info(ip, port))

    def append_remote_ip_info(self, ip: str | int, port: int) -> None:
        """Add a remote address. Raises as :meth:`append_local_ip_info`."""
        self._remote_ip_info_list.append(_ip_info(ip, port))

    def __repr__(self) -> str:
        return (
            f"LLMClusterInfo(remote_cluster_id={self._remote_cluster_id}, "
            f"local={self._local_ip_info_list}, remote={self._remote_ip_info_list})"
        )


def _ip_info(ip: str | int, port: int) -> tuple[int, int]:
    checks.check_isinstance("ip", ip, (str, int))
    checks.check_uint16("port", port)
    return (ipv4_number(ip) if isinstance(ip, str) else ip), port


def ipv4_number(ip: str) -> int:
    """A dotted IPv4 address as a number, first octet least significant.

    Raises ``RuntimeError`` for any other text (LLM-DataDist API, LLMClusterInfo).
    """
    try:
        return int.from_bytes(parse_ipv4(ip).packed, "little")
    except ValueError as error:
        pass_on(error)
        raise RuntimeError(str(error)) from None


def ipv4_text(number: int) -> str:
    """The dotted form of an address made by :func:`ipv4_number`.

    Raises ``TypeError`` for a number that is no IPv4 address.
    """
    if not 0 <= number < 1 << 32:
        raise TypeError(f"ip is {number}, which is not an IPv4 address of 32 bits")
    return socket.inet_ntoa(number.to_bytes(4, "little"))
