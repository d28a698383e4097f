"""The table of data types in the guide, against the enumeration and its conversions."""

from __future__ import annotations

import re

import numpy as np
import pytest

from datadist import DataType, data_type_of, numpy_dtype_of, torch_dtype_of
from datadist.types import element_size
from tests.docs.blocks import ROOT

pytestmark = pytest.mark.fast

PAGE = (ROOT / "docs" / "guide.md").read_text()
ROW = re.compile(r"^\| `(DT_\w+)` \| (\d+) \| (`[\w.]+`|-) \| (`[\w.]+`|-) \|$", re.MULTILINE)
ROWS = ROW.findall(PAGE)


def test_every_type_has_one_row() -> None:
    assert [name for name, *_ in ROWS] == [each.name for each in DataType]


@pytest.mark.parametrize(("name", "size", "numpy_name"), [row[:3] for row in ROWS])
def test_bytes_and_the_type_of_numpy(name: str, size: str, numpy_name: str) -> None:
    data_type = DataType[name]
    assert element_size(data_type) == int(size)
    if numpy_name == "-":
        with pytest.raises(TypeError):
            numpy_dtype_of(data_type)
        return
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    dtype = numpy_dtype_of(data_type)
    assert dtype == np.dtype(numpy_name.strip("`").removeprefix("ml_dtypes."))
    assert dtype.itemsize == int(size)
    assert data_type_of(dtype) is data_type


def test_the_types_of_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for name, _, _, torch_name in ROWS:
        if torch_name != "-":
            assert torch_dtype_of(DataType[name]) is getattr(torch, torch_name.strip("`"))
