"""Zero-copy views of tensors for NumPy, and for any library that supports DLPack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datadist.api.dtypes import numpy_dtype_of
from datadist.base.callers import pass_on
from datadist.base.keywords import named_keywords
from datadist.dlpack import BFLOAT, tensor_in
from datadist.types import DataType

__all__ = ["CacheTensor", "tensor_view"]


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
    dtype = np.dtype("uint16") if data_type is DataType.DT_BF16 else numpy_dtype_of(data_type)
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
    return view.view(numpy_dtype_of(data_type)) if data_type is DataType.DT_BF16 else view


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
        return tensor_view(self._address, self._shape, self._data_type, self._keeper, self._stride)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        array = self.numpy()
        if dtype is not None and array.dtype != dtype:
            if copy is False:
                raise ValueError(f"{array.dtype} cannot be viewed as {dtype} without a copy")
            return array.astype(dtype)
        return array.copy() if copy else array

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)  # kDLCPU

    def __dlpack__(
        self,
        *,
        stream: None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule over the shared memory, in the protocol's form that the caller asks for.

        Raises ``TypeError``, ``BufferError``, and ``RuntimeError`` for a stream, as NumPy does.
        """
        view: Any = _raw_view(
            self._address, self._shape, self._data_type, self._keeper, self._stride
        )
        given = {"stream": stream, "max_version": max_version, "dl_device": dl_device, "copy": copy}
        options = {name: value for name, value in given.items() if value is not None}
        try:
            capsule = view.__dlpack__(**options)
        except TypeError as error:
            pass_on(error)  # NumPy 1 knows only `stream`: the unversioned capsule fits all callers
            capsule = (view.copy() if copy else view).__dlpack__()
        if self._data_type is DataType.DT_BF16:
            _mark_bfloat16(capsule)
        return capsule

    def __repr__(self) -> str:
        return f"CacheTensor({self._address:#x}, {list(self._shape)}, {self._data_type.name})"


def _mark_bfloat16(capsule: object) -> None:
    """NumPy exports 16-bit words; say in the capsule that they are bfloat16."""
    tensor_in(capsule).dtype.code = BFLOAT
