"""Arguments and result of asynchronous layer-wise transfers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from datadist.api.transfer_task import TransferTask
from datadist.base import checks
from datadist.base.calls import begin, entries
from datadist.base.hints import ADDRESSES
from datadist.base.keywords import named_keywords
from datadist.base.names import CheckedAttributes
from datadist.keys import BlocksCacheKey, CacheKeyByIdAndIndex
from datadist.status import LLMStatusCode, param_invalid
from datadist.transfers.layerwise import LayerJob

__all__ = ["CacheTask", "LayerSynchronizer", "TransferConfig", "TransferWithCacheKeyConfig"]


class LayerSynchronizer(ABC):
    """Base class for callers: reports when a layer is final."""

    @abstractmethod
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int) -> bool:
        """Block until layer ``layer_index`` of the source is final; a false value ends the task.

        Called on a thread of the task, before each layer that some destination gets, in ascending
        order. ``timeout_in_millis`` is the time that each layer has, ``sync_kv_timeout``, which
        begins with this call: for waits that are to have an end, such as ``event.wait``. Waiting
        longer is no failure; the transfer to each destination, which begins when this returns true,
        has that time of its own. What it raises ends the task with LLM_FAILED.
        """


@named_keywords
class TransferConfig(CheckedAttributes):
    """A destination in two-sided mode: absolute addresses at ``dst_cluster_id``.

    ``dst_addrs`` holds two addresses per layer, already offset by the remote batch slot; layers
    follow ``src_layer_range`` (a range of step 1; None means all).

    Raises ``TypeError``, ``ValueError``, LLMException (LLM_PARAM_INVALID) for a bad range.
    """

    def __init__(
        self,
        dst_cluster_id: int,
        dst_addrs: Sequence[int],
        src_layer_range: range | None = None,
        src_batch_index: int = 0,
    ) -> None:
        self.dst_cluster_id = dst_cluster_id
        self.dst_addrs = dst_addrs
        self.src_layer_range = src_layer_range
        self.src_batch_index = src_batch_index

    @property
    def dst_cluster_id(self) -> int:
        """The cluster that gets the layers; setting raises ``TypeError``, ``ValueError``."""
        return self._dst_cluster_id

    @dst_cluster_id.setter
    def dst_cluster_id(self, value: int) -> None:
        checks.check_uint64("dst_cluster_id", value)
        self._dst_cluster_id = value

    @property
    def dst_addrs(self) -> Sequence[int]:
        """Addresses at the destination; setting raises ``TypeError``, ``ValueError``."""
        return self._dst_addrs

    @dst_addrs.setter
    def dst_addrs(self, value: Sequence[int]) -> None:
        check_uint64s("dst_addrs", value, ADDRESSES)
        self._dst_addrs = value

    @property
    def src_layer_range(self) -> range | None:
        """Layers of the source; setting raises as the constructor."""
        return self._src_layer_range

    @src_layer_range.setter
    def src_layer_range(self, value: range | None) -> None:
        if value is not None:
            check_layer_range("src_layer_range", value)
        self._src_layer_range = value

    @property
    def src_batch_index(self) -> int:
        """Slot of the source; setting raises ``TypeError``, ``ValueError``."""
        return self._src_batch_index

    @src_batch_index.setter
    def src_batch_index(self, value: int) -> None:
        checks.check_uint32("src_batch_index", value)
        self._src_batch_index = value

    def __repr__(self) -> str:
        return (
            f"TransferConfig(dst_cluster_id={self._dst_cluster_id}, "
            f"dst_addrs={self._dst_addrs}, src_layer_range={self._src_layer_range}, "
            f"src_batch_index={self._src_batch_index})"
        )


@named_keywords
class TransferWithCacheKeyConfig(CheckedAttributes):
    """A destination in one-sided mode: the cache that a key names.

    Both layer ranges are needed (step 1, equal lengths); layer ``src_layer_range[i]`` goes to layer
    ``dst_layer_range[i]``. With a :class:`BlocksCacheKey` the batch index must be 0.

    Raises ``TypeError``, ``ValueError``, LLMException (LLM_PARAM_INVALID).
    """

    def __init__(
        self,
        cache_key: BlocksCacheKey | CacheKeyByIdAndIndex,
        src_layer_range: range | None = None,
        dst_layer_range: range | None = None,
        src_batch_index: int = 0,
    ) -> None:
        self._src_batch_index = 0
        self.cache_key = cache_key
        self._dst_cluster_id = cache_key.cluster_id
        for name, value in (
            ("src_layer_range", src_layer_range),
            ("dst_layer_range", dst_layer_range),
        ):
            if value is None:
                raise TypeError(f"{name} is None: give a range of layers")
        self.src_layer_range = src_layer_range
        self.dst_layer_range = dst_layer_range
        if len(self._src_layer_range) != len(self._dst_layer_range):
            raise param_invalid(
                f"src_layer_range {src_layer_range} and dst_layer_range {dst_layer_range} differ in "
                "length"
            )
        self.src_batch_index = src_batch_index

    @property
    def dst_cluster_id(self) -> int:
        """The cluster of the key given at construction."""
        return self._dst_cluster_id

    @property
    def cache_key(self) -> BlocksCacheKey | CacheKeyByIdAndIndex:
        """The destination; setting raises as the constructor."""
        return self._cache_key

    @cache_key.setter
    def cache_key(self, value: BlocksCacheKey | CacheKeyByIdAndIndex) -> None:
        kinds = (BlocksCacheKey, CacheKeyByIdAndIndex)
        checks.check_isinstance("cache_key", value, kinds, allow_none=False)
        _check_slot(value, self._src_batch_index)
        self._cache_key = value

    @property
    def src_layer_range(self) -> range:
        """Layers of the source; setting raises as the constructor."""
        return self._src_layer_range

    @src_layer_range.setter
    def src_layer_range(self, value: range | None) -> None:
        self._src_layer_range = check_layer_range("src_layer_range", value)

    @property
    def dst_layer_range(self) -> range:
        """Layers of the destination; setting raises as the constructor."""
        return self._dst_layer_range

    @dst_layer_range.setter
    def dst_layer_range(self, value: range | None) -> None:
        self._dst_layer_range = check_layer_range("dst_layer_range", value)

    @property
    def src_batch_index(self) -> int:
        """Slot of the source; setting raises as the constructor."""
        return self._src_batch_index

    @src_batch_index.setter
    def src_batch_index(self, value: int) -> None:
        checks.check_uint32("src_batch_index", value)
        _check_slot(self._cache_key, value)
        self._src_batch_index = value

    def __repr__(self) -> str:
        return (
            f"TransferWithCacheKeyConfig(cache_key={self._cache_key!r}, src_layer_range="
            f"{self._src_layer_range}, dst_layer_range={self._dst_layer_range}, "
            f"src_batch_index={self._src_batch_index})"
        )


@named_keywords
@entries
class CacheTask(TransferTask):
    """A transfer that runs; from :meth:`CacheManager.transfer_cache_async`.

    As a :class:`TransferTask` it fails with the first failure of a destination, and a cancelled one ends
    before its next layer, which is its next piece.
    """

    _job: LayerJob

    def __init__(self, job: LayerJob) -> None:
        super().__init__(job)

    def synchronize(self, timeout_in_millis: int | None = None) -> LLMStatusCode:
        """Wait for the end: the first failure, else LLM_SUCCESS; LLM_TIMEOUT while it still runs.

        LLM_ENGINE_FINALIZED where the engine was finalized before a layer was moved, and in a forked
        child, where nothing moves any more. May be called again.

        Raises ``TypeError``, ``ValueError`` for the timeout only.
        """
        begin("synchronize")
        if not self._wait(timeout_in_millis):
            return LLMStatusCode.LLM_TIMEOUT
        failures = (r for r in self._job.results if r not in (None, LLMStatusCode.LLM_SUCCESS))
        return next(failures, None) or LLMStatusCode.LLM_SUCCESS

    def get_results(self, timeout_in_millis: int | None = None) -> list[LLMStatusCode | None]:
        """A status per destination, in order; None for one whose last layer was not reached.

        All LLM_TIMEOUT while it still runs. Raises as :meth:`synchronize`.
        """
        begin("get_results")
        if not self._wait(timeout_in_millis):
            return [LLMStatusCode.LLM_TIMEOUT] * len(self._job.results)
        return self._job.results

    def _wait(self, timeout_in_millis: int | None) -> bool:
        if timeout_in_millis is None:
            return self._job.wait(None)
        checks.check_uint32("timeout_in_millis", timeout_in_millis)
        return self._job.wait(timeout_in_millis / 1000)

    def __repr__(self) -> str:
        state = "ended" if self._job.wait(0) else "running"
        names = [code.name if code is not None else None for code in self._job.results]
        return f"CacheTask({state}, {names})"


def _check_slot(key: BlocksCacheKey | CacheKeyByIdAndIndex, slot: int) -> None:
    if isinstance(key, BlocksCacheKey) and slot != 0:
        raise param_invalid(f"src_batch_index is {slot}, it must be 0 with a BlocksCacheKey")


def check_uint64s(name: str, values: object, use: str = "") -> None:
    """A list or tuple of uint64. Raises ``TypeError``, ``ValueError``."""
    checks.check_sequence_of(name, values, int, use)
    assert isinstance(values, (list, tuple))
    if values and (min(values) < 0 or max(values) >= 1 << 64):
        for index, value in enumerate(values):
            checks.check_uint64(f"{name}[{index}]", value)


def check_layer_range(name: str, value: range | None) -> range:
    """A range of layers that is not empty (LLM-DataDist API, transfer helper classes).

    Raises ``TypeError``, LLMException (LLM_PARAM_INVALID).
    """
    checks.check_isinstance(name, value, range, allow_none=False)
    assert value is not None
    if value.step != 1:
        raise param_invalid(f"{name} is {value}: its step must be 1")
    if not 0 <= value.start < value.stop:
        raise param_invalid(f"{name} is {value}: it must start at 0 or above and not be empty")
    return value
