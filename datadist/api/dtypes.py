"""Element types of this API, of NumPy and of torch: one by the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datadist.base import checks
from datadist.base.callers import pass_on
from datadist.base.lazy_module import LazyModule
from datadist.base.texts import short_repr
from datadist.status import param_invalid
from datadist.types import ARRAY_TYPES, DataType

if TYPE_CHECKING:
    import numpy
else:
    numpy = LazyModule("numpy")

__all__ = ["data_type_of", "numpy_dtype_of", "torch_dtype_of"]

_BY_NAME = {name: data_type for data_type, name in ARRAY_TYPES.items()}


def data_type_of(dtype: Any) -> DataType:
    """The DataType of a type of NumPy, torch or ml_dtypes, of its name, or of an array or tensor.

    Names are those of the table of types, such as "float16"; "half" and "float", which mean different
    types in different libraries, are none.

    Raises ``TypeError`` for what is no type, LLMException (LLM_PARAM_INVALID) for one that has no
    DataType, as those of 8-bit floats: view such a tensor as uint8.
    """
    if isinstance(dtype, DataType):
        return dtype
    name = _name_of(dtype)
    if name is None:
        raise TypeError(
            f"dtype is a {type(dtype).__name__} ({short_repr(dtype)}), only support element types of "
            "NumPy and torch, their names, arrays and tensors"
        )
    found = _BY_NAME.get(name)
    if found is None and isinstance(dtype, str):
        raise param_invalid(f"dtype is {short_repr(dtype)}, only support {', '.join(_BY_NAME)}")
    if found is None:
        raise param_invalid(
            f"the element type {name} has no DataType: view it as one of its size, such as uint8"
        )
    return found


def _name_of(dtype: Any) -> str | None:
    if isinstance(dtype, str):
        return dtype
    if isinstance(dtype, type):  # a class of numbers, such as numpy.float16
        known = dtype in numpy.sctypeDict.values()
        return numpy.dtype(dtype).name if known else dtype.__name__
    inner = getattr(dtype, "dtype", None)
    if inner is not None and inner is not dtype:
        return _name_of(inner)
    name = getattr(dtype, "name", None)
    if isinstance(name, str):  # of NumPy
        return name if getattr(dtype, "isnative", True) else str(dtype)
    module, _, name = str(dtype).rpartition(".")
    return name if module == "torch" and type(dtype).__name__ == "dtype" else None


def numpy_dtype_of(data_type: DataType) -> numpy.dtype[Any]:
    """NumPy's type of arrays over memory of this type.

    bfloat16 is ``ml_dtypes.bfloat16`` where that package is installed, else ``uint16``. Raises
    ``TypeError`` for DT_STRING, and for what is no DataType.
    """
    name = _known_name(data_type)
    if data_type is not DataType.DT_BF16:
        return numpy.dtype(name)
    try:
        from ml_dtypes import bfloat16
    except ModuleNotFoundError as error:
        pass_on(error)
        return numpy.dtype("uint16")
    dtype: numpy.dtype[Any] = numpy.dtype(bfloat16)
    return dtype


def torch_dtype_of(data_type: DataType) -> Any:
    """torch's type of tensors over memory of this type; imports torch.

    Raises ``TypeError`` for DT_STRING, and for what is no DataType, ``ModuleNotFoundError`` without
    torch.
    """
    name = _known_name(data_type)
    import torch

    return getattr(torch, name)


def _known_name(data_type: DataType) -> str:
    checks.check_isinstance("data_type", data_type, DataType, allow_none=False)
    if data_type not in ARRAY_TYPES:
        raise TypeError(f"{data_type.name} has no array type: use the addresses (tensor_addrs)")
    return ARRAY_TYPES[data_type]
