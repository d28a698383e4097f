"""Zero-copy views of tensors for NumPy, and for any library that supports DLPack."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datadist.base.callers import pass_on
from datadist.base.keywords import named_keywords
from datadist.types import DataType

__all__ = ["CacheTensor", "tensor_view"]

_NUMPY_TYPES = {
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
    DataType.DT_BF16: "uint16",
}

_DL_BFLOAT = 4
"""Type code of bfloat16 in DLPack."""


class _Memory:
    """Exposes raw memory to NumPy. Arrays reference it, and it references the owner of the mapping."""

    def __init__(self, address: int, nbytes: int, keeper: object | None) -> None:
        self.keeper = keeper
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (nbytes,),
            "data": (address, False),
        }


def _raw_view(
    address: int, shape: Sequence[int], data_type: DataType, keeper: object | None,
    stride: int | None = None,
) -> NDArray[Any]:  # fmt: skip
    if data_type not in _NUMPY_TYPES:
        raise TypeError(f"{data_type.name} has no array type: use the addresses (tensor_addrs)")
    dtype = np.dtype(_NUMPY_TYPES[data_type])
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if stride is None:
        raw = np.asarray(_Memory(address, nbytes, keeper))
        return raw.view(dtype).reshape(shape)
    raw = np.asarray(_Memory(address, (shape[0] - 1) * stride + nbytes // shape[0], keeper))
    inner = np.empty([1, *shape[1:]], dtype).strides[1:]
    return np.ndarray(shape, dtype, raw.data, strides=(stride, *inner))


def tensor_view(
    address: int, shape: Sequence[int], data_type: DataType, keeper: object | None = None,
    stride: int | None = None,
) -> NDArray[Any]:  # fmt: skip
    """An array over memory at ``address``; it references ``keeper`` as long as any view of it
    lives. ``stride`` is bytes from one block to the next, where they do not lie side by side.

    bfloat16 is ``ml_dtypes.bfloat16`` where that package is installed, else ``uint16``. Raises
    ``TypeError`` for DT_STRING.
    """
    view = _raw_view(address, shape, data_type, keeper, stride)
    if data_type is DataType.DT_BF16:
        try:
            from ml_dtypes import bfloat16
        except ModuleNotFoundError as error:
            pass_on(error)
            return view
        return view.view(bfloat16)
    return view


@named_keywords
class CacheTensor:
    """One tensor of a cache: :meth:`numpy`, and DLPack for torch and others."""

    def __init__(
        self, address: int, shape: Sequence[int], data_type: DataType, keeper: object | None,
        stride: int | None = None,
    ) -> None:  # fmt: skip
        self._address = address
        self._shape = tuple(shape)
        self._data_type = data_type
        self._keeper = keeper
        self._stride = stride

    @property
    def address(self) -> int:
        """Address of the first element."""
        return self._address

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return self._shape

    @property
    def data_type(self) -> DataType:
        """Type of the elements."""
        return self._data_type

    def numpy(self) -> NDArray[Any]:
        """An array that shares the memory; see :func:`tensor_view`."""
        return tensor_view(
            self._address, self._shape, self._data_type, self._keeper, self._stride
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        array = self.numpy()
        if dtype is not None and array.dtype != dtype:
            if copy is False:
                raise ValueError(f"{array.dtype} cannot be viewed as {dtype} without a copy")
            return array.astype(dtype)
        return array.copy() if copy else array

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)  # kDLCPU

    def __dlpack__(self, **options: Any) -> Any:
        """A capsule over the shared memory, in the protocol's form that the caller asks for."""
        view = _raw_view(self._address, self._shape, self._data_type, self._keeper, self._stride)
        options = {name: value for name, value in options.items() if value is not None}
        try:
            capsule = view.__dlpack__(**options)
        except TypeError as error:
            pass_on(error)  # NumPy 1 knows only `stream`: the unversioned capsule fits all callers
            capsule = view.__dlpack__()
        if self._data_type is DataType.DT_BF16:
            _mark_bfloat16(capsule)
        return capsule

    def __repr__(self) -> str:
        return f"CacheTensor({self._address:#x}, {list(self._shape)}, {self._data_type.name})"


class _DLDataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _DLTensor(ctypes.Structure):
    """The head of DLTensor (dlpack.h)."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLDataType),
    )


class _DLManagedTensorVersioned(ctypes.Structure):
    """The head of DLManagedTensorVersioned (dlpack.h); the unversioned one begins with the tensor."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    )


_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype = ctypes.c_void_p
_get_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.restype = ctypes.c_int
_is_valid.argtypes = (ctypes.py_object, ctypes.c_char_p)


def _mark_bfloat16(capsule: object) -> None:
    """NumPy exports 16-bit words; say in the capsule that they are bfloat16."""
    versioned = b"dltensor_versioned"
    if _is_valid(capsule, versioned):
        pointer = _get_pointer(capsule, versioned)
        tensor = _DLManagedTensorVersioned.from_address(pointer).tensor
    else:
        tensor = _DLTensor.from_address(_get_pointer(capsule, b"dltensor"))
    tensor.dtype.code = _DL_BFLOAT
