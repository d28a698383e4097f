"""Handles of caches."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from datadist.base import checks
from datadist.base.hints import ADDRESSES
from datadist.base.keywords import named_keywords
from datadist.base.lazy_module import LazyModule
from datadist.status import LLMException, LLMStatusCode, param_invalid
from datadist.types import CacheDesc, Placement, fixed

if TYPE_CHECKING:
    from numpy import typing as numpy_typing

    from datadist.api import arrays
else:
    numpy_typing, arrays = LazyModule("numpy.typing"), LazyModule("datadist.api.arrays")

__all__ = ["Cache"]

_of_engines: weakref.WeakSet[Cache] = weakref.WeakSet()
"""Caches that are no CPU caches."""


@named_keywords
class Cache:
    """A cache of this engine: ``num_tensors`` tensors of one shape, K and V of a layer adjacent.

    Made by :class:`~datadist.api.cache_manager.CacheManager`, never by users, but for
    :meth:`create_cpu_cache`. Dropping the object frees nothing; ``with`` frees it at the end, unless
    `finalize` did.
    """

    def __init__(
        self,
        cache_id: int,
        cache_desc: CacheDesc,
        tensor_addrs: list[int],
        is_blocks_cache: bool,
        *,
        pooled: bool = False,
        keeper: object | None = None,
        addressable: bool = True,
        owner: object | None = None,
        release: Callable[[Cache], None] | None = None,
        made: CacheDesc | None = None,
        memory: list[object] | None = None,
    ) -> None:
        self._cache_id = cache_id
        self._cache_desc = cache_desc
        self._made = made or fixed(cache_desc)
        self._tensor_addrs = tensor_addrs
        self._is_blocks_cache = is_blocks_cache
        self._pooled = pooled
        self._keeper = keeper
        self._addressable = addressable
        self._owner = owner
        self._release = release
        self._memory = [] if memory is None else memory
        """Tensors that it lies in; empty once it was unregistered."""
        if owner is not None:
            _of_engines.add(self)

    @property
    def cache_id(self) -> int:
        """Id, from 1 in each initialised engine; -1 for a CPU cache."""
        return self._cache_id

    @property
    def cache_desc(self) -> CacheDesc:
        """The description that it was made with: the object that was given.

        Changing it, :meth:`CacheDesc.update_dim`, does not change this cache.
        """
        return self._cache_desc

    @property
    def tensor_addrs(self) -> list[int]:
        """Base address per tensor; empty once the cache was deallocated."""
        return self._tensor_addrs

    @property
    def is_blocks_cache(self) -> bool:
        """Whether it is addressed by block (PagedAttention) rather than by batch slot."""
        return self._is_blocks_cache

    @property
    def tensors(self) -> list[arrays.CacheTensor]:
        """The tensors for other libraries, without a copy: each speaks DLPack and NumPy.

        ``torch.from_dlpack(cache.tensors[0])`` shares the memory; bfloat16 arrives as bfloat16 (which
        ``numpy.from_dlpack`` does not know: use :meth:`numpy`). Blocks that lie apart
        (``block_stride``) are a stride of dimension 0. A view keeps pool memory mapped, but not
        reserved: once the cache is deallocated another cache may use it. Memory that was registered by
        its address must outlive its views; tensors that were registered are kept by them.

        Raises LLMException (LLM_PARAM_INVALID) after deallocation, and for memory that the CPU
        cannot address.
        """
        if not self._tensor_addrs:
            raise param_invalid(
                f"{self!r} was deallocated, or its process forked: it has no tensors any more"
            )
        if not self._addressable:
            raise param_invalid(f"{self!r} lies in memory of the device, which has no views here")
        desc, view = self._made, arrays.CacheTensor
        keeper = self._keeper if self._keeper is not None else tuple(self._memory)
        return [
            view(address, desc.shape, desc.data_type, keeper, desc.block_stride)
            for address in self._tensor_addrs
        ]

    def numpy(self) -> list[numpy_typing.NDArray[Any]]:
        """One array per tensor over the cache's memory, of the shape and type it was made with.

        bfloat16 is ``ml_dtypes.bfloat16`` where that package is installed, else ``uint16``.
        Raises as :attr:`tensors`.
        """
        return [tensor.numpy() for tensor in self.tensors]

    @classmethod
    def create_cpu_cache(cls, cache_desc: CacheDesc, addrs: list[int]) -> Cache:
        """A blocks cache over host memory of the caller, known to no engine, with id -1.

        Raises ``TypeError``, or LLMException (LLM_PARAM_INVALID) when the placement is not HOST or
        there is not one address per tensor.
        """
        checks.check_isinstance("cache_desc", cache_desc, CacheDesc)
        checks.check_list_of_int("addrs", addrs, ADDRESSES)
        if cache_desc.placement is not Placement.HOST:
            raise param_invalid(f"a CPU cache needs placement HOST, not {cache_desc.placement}")
        if cache_desc.num_tensors != len(addrs):
            raise param_invalid(
                f"{cache_desc.num_tensors} tensors need as many addresses, not {len(addrs)}"
            )
        return cls(-1, cache_desc, addrs, True)

    def __enter__(self) -> Cache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._release is not None:
            self._release(self)

    def __repr__(self) -> str:
        return (
            f"Cache(cache_id = {self._cache_id}, device_tensor_addrs = {len(self._tensor_addrs)}, "
            f"is_blocks_cache = {self._is_blocks_cache})"
        )


def desc_at_creation(cache: Cache) -> CacheDesc:
    """The description at the time of creation; ``cache_desc`` may have changed since."""
    return cache._made


def own_cache_id(cache: Cache, manager: object) -> int:
    """The id of a cache of this manager. Raises LLM_KV_CACHE_NOT_EXIST for one of another engine."""
    owner = cache._owner
    if owner is not manager and owner is not None:
        raise LLMException(
            f"{cache!r} was freed when its engine was finalized: make caches anew after init",
            status_code=LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
        )
    return cache._cache_id


def is_of_other_engine(cache: Cache, manager: object) -> bool:
    """Whether another engine's manager created it. Its id may name another cache in our engine."""
    return cache._owner is not None and cache._owner is not manager


def is_pooled(cache: Cache) -> bool:
    """Whether its memory belongs to a pool, which reuses it after the cache is freed."""
    return cache._pooled


def _after_fork_in_child() -> None:
    """A child, which cannot use the caches, keeps no memory for them; arrays over it do."""
    for cache in list(_of_engines):
        cache._keeper, cache._tensor_addrs = None, []


os.register_at_fork(after_in_child=_after_fork_in_child)
