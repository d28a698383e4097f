"""Element types of the API, NumPy and torch (dtypes.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from datadist import (
    DataType,
    LLMException,
    LLMStatusCode,
    data_type_of,
    numpy_dtype_of,
    torch_dtype_of,
)
from datadist.types import ARRAY_TYPES, element_size


@pytest.mark.parametrize("data_type", ARRAY_TYPES)
def test_types_there_and_back(data_type: DataType) -> None:
    dtype = numpy_dtype_of(data_type)
    assert dtype.itemsize == element_size(data_type)
    assert data_type_of(ARRAY_TYPES[data_type]) is data_type
    assert data_type_of(data_type) is data_type
    if data_type is not DataType.DT_BF16:
        for given in (dtype, dtype.type, np.zeros(2, dtype)):
            assert data_type_of(given) is data_type


@pytest.mark.parametrize("data_type", ARRAY_TYPES)
def test_types_of_torch(data_type: DataType) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    dtype = torch_dtype_of(data_type)
    assert dtype.itemsize == element_size(data_type)
    assert data_type_of(dtype) is data_type
    assert data_type_of(torch.zeros(2, dtype=dtype)) is data_type


def test_types_without_a_counterpart() -> None:
    with pytest.raises(TypeError, match="DT_STRING has no array type"):
        numpy_dtype_of(DataType.DT_STRING)
    with pytest.raises(LLMException, match="complex64 has no DataType"):
        data_type_of(np.complex64)
    wrong: list[Any] = [None, 3, object()]
    for value in wrong:
        with pytest.raises(TypeError, match="dtype is a"):
            data_type_of(value)


@pytest.mark.parametrize("dtype", [">f4", ">i2", ">u8"])
def test_types_of_the_other_byte_order_have_no_counterpart(dtype: str) -> None:
    for given in (np.dtype(dtype), np.zeros(2, dtype)):
        with pytest.raises(LLMException, match=f"the element type {dtype} has no DataType"):
            data_type_of(given)


def test_all_classes_of_numpy() -> None:
    for kind in {np.longlong, np.ulonglong, np.intc, np.half, np.double, np.bool_}:
        expected = data_type_of(np.dtype(kind))
        assert data_type_of(kind) is expected


@pytest.mark.parametrize("name", ["half", "float", ">f4", "torch.float16", "", "x" * 1000])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(LLMException, match="only support float32, float16, int8") as caught:
        data_type_of(name)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert len(str(caught.value)) < 400
