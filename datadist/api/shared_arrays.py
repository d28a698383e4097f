"""Arrays in memory that peers can map, made before there is an engine."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from datadist.api.dtypes import numpy_dtype_of
from datadist.base.lazy_module import LazyModule
from datadist.base.shared_memory import SharedMemory
from datadist.base.shortage import explain
from datadist.status import LLMException, LLMStatusCode
from datadist.types import DataType

if TYPE_CHECKING:
    import numpy
    from numpy import typing as numpy_typing
else:
    numpy, numpy_typing = LazyModule("numpy"), LazyModule("numpy.typing")

__all__ = ["empty"]


class _Bytes:
    """Exposes memory to NumPy. Arrays reference it, and it references the memory."""

    def __init__(self, shared: SharedMemory, nbytes: int) -> None:
        self.shared = shared
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (nbytes,),
            "data": (shared.address, False),
        }


def empty(
    shape: int | Sequence[int], dtype: numpy_typing.DTypeLike | DataType = float
) -> numpy_typing.NDArray[Any]:
    """An array of zeros in memory that peers can map, for caches that are registered.

    It needs no engine. Where the transport's peers map memory, as over shm, a cache over this array, or
    over parts of it, moves as fast as one of the pool; with others it is memory as any other.
    ``torch.from_numpy`` shares it. Each call makes a file of memory, so make few large arrays. It is
    freed with the last array over it, after the caches over it are unregistered and the links that
    expose these are closed.

    Raises ``TypeError`` and ``ValueError`` as ``numpy.empty`` does, ``MemoryError`` where there is not
    enough memory, LLMException (LLM_FAILED) for what else the system refuses.
    """
    kind = numpy.dtype(numpy_dtype_of(dtype) if isinstance(dtype, DataType) else dtype)
    if kind.hasobject:
        raise TypeError(f"dtype is {kind}: elements that are objects of Python cannot be shared")
    sizes = (shape,) if isinstance(shape, int) else shape
    dims = tuple(operator.index(size) for size in sizes)
    if any(size < 0 for size in dims):
        raise ValueError(f"shape is {dims}: no dimension can be negative")
    nbytes = kind.itemsize
    for size in dims:
        nbytes *= size
    if nbytes == 0:
        return numpy.empty(dims, kind)
    return numpy.asarray(_Bytes(_allocate(nbytes), nbytes)).view(kind).reshape(dims)


def _allocate(nbytes: int) -> SharedMemory:
    try:
        return SharedMemory(nbytes)
    except OverflowError:
        raise MemoryError(f"cannot have {nbytes} bytes of shared memory") from None
    except (AttributeError, OSError) as error:
        why = explain(error) if isinstance(error, OSError) else "memfd_create needs Linux"
        raise LLMException(
            f"cannot have {nbytes} bytes of shared memory: {why}",
            status_code=LLMStatusCode.LLM_FAILED,
        ) from error
