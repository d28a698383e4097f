"""Element types, and what NumPy calls them (LLM-DataDist API, exports)."""

from typing import Any

from datadist import DataType

__all__ = ["DataType"]

_NUMPY = {
    DataType.DT_FLOAT: "float32",
    DataType.DT_FLOAT16: "float16",
    DataType.DT_BF16: "float16",
    DataType.DT_INT8: "int8",
    DataType.DT_INT16: "int16",
    DataType.DT_INT32: "int32",
    DataType.DT_INT64: "int64",
    DataType.DT_UINT8: "uint8",
    DataType.DT_UINT16: "uint16",
    DataType.DT_UINT32: "uint32",
    DataType.DT_UINT64: "uint64",
    DataType.DT_DOUBLE: "float64",
    DataType.DT_BOOL: "bool",
}


def __getattr__(name: str) -> Any:
    if name not in ("dtype_to_np_dtype", "valid_np_dtypes", "np_dtype_to_dtype"):
        raise AttributeError(f"Module 'llm_datadist.data_type' has no attribute '{name}'")
    import numpy as np

    forward = {kind: np.dtype(text).type for kind, text in _NUMPY.items()}
    if name == "dtype_to_np_dtype":
        return forward
    back = {kind: ours for ours, kind in forward.items() if ours is not DataType.DT_BF16}
    return back if name == "np_dtype_to_dtype" else list(back)
