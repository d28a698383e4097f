"""The cache handle of the first version of the API, kept because programs import its name."""

from __future__ import annotations

from collections.abc import Sequence

from datadist.base import checks
from datadist.base.hints import ADDRESSES
from datadist.base.keywords import named_keywords
from datadist.status import param_invalid
from datadist.types import CacheDesc, Placement

__all__ = ["KvCache"]


@named_keywords
class KvCache:
    """Addresses per device and tensor. Only :meth:`create_cpu_cache` creates one."""

    def __init__(
        self,
        cache_id: int,
        cache_desc: CacheDesc,
        per_device_tensor_addrs: list[list[int]],
        is_blocks_cache: bool = False,
    ) -> None:
        self._cache_id = cache_id
        self._cache_desc = cache_desc
        self._addrs = per_device_tensor_addrs
        self._is_blocks_cache = is_blocks_cache

    @property
    def cache_id(self) -> int:
        """Id; -1 for a CPU cache."""
        return self._cache_id

    @property
    def cache_desc(self) -> CacheDesc:
        """The description that it was made with."""
        return self._cache_desc

    @property
    def per_device_tensor_addrs(self) -> list[list[int]]:
        """Base address per tensor, for each device."""
        return self._addrs

    @property
    def is_blocks_cache(self) -> bool:
        """Whether it is addressed by block."""
        return self._is_blocks_cache

    @classmethod
    def create_cpu_cache(
        cls, cache_desc: CacheDesc, addrs: Sequence[int] | Sequence[Sequence[int]]
    ) -> KvCache:
        """A handle over host memory: ``addrs`` per tensor, or a list of them per device.

        Raises ``TypeError``, LLMException (LLM_PARAM_INVALID) when the placement is not HOST or
        there is not one address per tensor.
        """
        checks.check_isinstance("cache_desc", cache_desc, CacheDesc)
        checks.check_isinstance("addrs", addrs, list, allow_none=False, use=ADDRESSES)
        nested = bool(addrs) and isinstance(addrs[0], list)
        devices = list(addrs) if nested else [addrs]
        for device in devices:
            checks.check_list_of_int("addrs", device, ADDRESSES)
        if cache_desc.placement is not Placement.HOST:
            raise param_invalid(f"a CPU cache needs placement HOST, not {cache_desc.placement}")
        lists = [list(device) for device in devices if isinstance(device, list)]
        for device_addrs in lists:
            if len(device_addrs) != cache_desc.num_tensors:
                raise param_invalid(
                    f"{cache_desc.num_tensors} tensors need as many addresses, not "
                    f"{len(device_addrs)}"
                )
        return cls(-1, cache_desc, lists, True)

    def __repr__(self) -> str:
        return f"KvCache(cache_id = {self._cache_id}, num_devices = {len(self._addrs)})"
