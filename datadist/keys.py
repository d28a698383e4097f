"""Keys that name caches (LLM-DataDist API, keys)."""

from __future__ import annotations

from typing import Any, overload

from datadist.base import checks
from datadist.base.keywords import did_you_mean, named_keywords
from datadist.base.names import CheckedAssignment
from datadist.status import param_invalid

__all__ = ["INVALID_ID", "BlocksCacheKey", "CacheKey", "CacheKeyByIdAndIndex"]

INVALID_ID = 2**64 - 1
"""The id that names nothing."""
_set = object.__setattr__
"""Bypasses the check of attribute names, which would take a third of the time to create a key."""


def _arguments(
    kind: str, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments by name; positional ones win over keywords, cluster_id over prompt_cluster_id."""
    if len(args) + len(kwargs) > len(names):
        raise param_invalid(
            f"{kind} takes at most {len(names)} arguments ({', '.join(names)}), "
            f"got {len(args) + len(kwargs)}"
        )
    values = dict(kwargs)
    if "prompt_cluster_id" in values:
        values.setdefault("cluster_id", values["prompt_cluster_id"])
        del values["prompt_cluster_id"]
    values.update(zip(names, args, strict=False))
    return values


def _require(
    kind: str, names: tuple[str, ...], required: tuple[str, ...], values: dict[str, Any]
) -> None:
    for name in required:
        if name not in values:
            unknown = next((each for each in values if each not in names), None)
            hint = "" if unknown is None else f": Unsupported argument {unknown!r} is none"
            raise param_invalid(f"{name} is required in a {kind}{hint}")


def _refuse_unknown(kind: str, names: tuple[str, ...], values: dict[str, Any]) -> None:
    unknown = [name for name in values if name not in names]
    if unknown:
        known = (*names, "prompt_cluster_id")
        raise param_invalid(
            f"Unsupported argument {unknown[0]!r} of {kind}{did_you_mean(unknown[0], known)}: it "
            f"takes {', '.join(known)}"
        )


class CacheKey(CheckedAssignment):
    """Names a slot of a contiguous cache by request, or by prefix if ``prefix_id`` is valid.

    Arguments: ``cluster_id`` (or ``prompt_cluster_id``), ``req_id``, ``model_id`` (0) and
    ``prefix_id`` (INVALID_ID), each a uint64. The cluster is the owner in a pull; it
    is ignored when the key is attached to a cache.

    Raises LLMException (LLM_PARAM_INVALID) for missing or unknown arguments, ``TypeError``,
    ``ValueError``.
    """

    _cluster_id: int
    _req_id: int
    _model_id: int
    _prefix_id: int
    _NAMES = ("cluster_id", "req_id", "model_id", "prefix_id")

    @overload
    def __init__(
        self, cluster_id: int, req_id: int, model_id: int = 0, prefix_id: int = INVALID_ID
    ) -> None: ...
    @overload
    def __init__(
        self,
        *,
        prompt_cluster_id: int,
        req_id: int,
        model_id: int = 0,
        prefix_id: int = INVALID_ID,
    ) -> None: ...
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        values = _arguments("CacheKey", self._NAMES, args, kwargs)
        _require("CacheKey", self._NAMES, ("cluster_id", "req_id"), values)
        _refuse_unknown("CacheKey", self._NAMES, values)
        _set(self, "_cluster_id", values["cluster_id"])
        _set(self, "_req_id", values["req_id"])
        _set(self, "_model_id", values.get("model_id", 0))
        _set(self, "_prefix_id", values.get("prefix_id", INVALID_ID))
        checks.check_uint64("cluster_id", self._cluster_id)
        checks.check_uint64("req_id", self._req_id)
        checks.check_uint64("model_id", self._model_id)
        checks.check_uint64("prefix_id", self._prefix_id)

    @property
    def cluster_id(self) -> int:
        """Cluster of the owner."""
        return self._cluster_id

    @property
    def prompt_cluster_id(self) -> int:
        """The same as :attr:`cluster_id`."""
        return self._cluster_id

    @property
    def req_id(self) -> int:
        """Request."""
        return self._req_id

    @property
    def model_id(self) -> int:
        """Model, part of the identity."""
        return self._model_id

    @property
    def prefix_id(self) -> int:
        """Prefix."""
        return self._prefix_id

    def __repr__(self) -> str:
        return (
            f"CacheKey(cluster_id={self._cluster_id}, req_id={self._req_id}, "
            f"prefix_id={self._prefix_id}, model_id={self._model_id})"
        )


class BlocksCacheKey(CheckedAssignment):
    """Names a blocks cache: ``cluster_id`` (or ``prompt_cluster_id``) and ``model_id`` (0).

    Raises LLMException (LLM_PARAM_INVALID) for missing or unknown arguments, ``TypeError``.
    """

    _cluster_id: int
    _model_id: int
    _by_alias: bool
    _NAMES = ("cluster_id", "model_id")

    @overload
    def __init__(self, cluster_id: int, model_id: int = 0) -> None: ...
    @overload
    def __init__(self, *, prompt_cluster_id: int, model_id: int = 0) -> None: ...
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        values = _arguments("BlocksCacheKey", self._NAMES, args, kwargs)
        _require("BlocksCacheKey", self._NAMES, ("cluster_id",), values)
        _refuse_unknown("BlocksCacheKey", self._NAMES, values)
        _set(self, "_cluster_id", values["cluster_id"])
        _set(self, "_model_id", values.get("model_id", 0))
        _set(self, "_by_alias", not args and "cluster_id" not in kwargs)
        checks.check_isinstance("cluster_id", self._cluster_id, int)
        checks.check_isinstance("model_id", self._model_id, int)

    @property
    def cluster_id(self) -> int:
        """Cluster of the owner."""
        return self._cluster_id

    @property
    def prompt_cluster_id(self) -> int:
        """The same as :attr:`cluster_id`."""
        return self._cluster_id

    @property
    def model_id(self) -> int:
        """Selects one of the owner's blocks caches."""
        return self._model_id

    def __repr__(self) -> str:
        name = "prompt_cluster_id" if self._by_alias else "cluster_id"
        return f"BlocksCacheKey({name}={self._cluster_id}, model_id={self._model_id})"


@named_keywords
class CacheKeyByIdAndIndex(CheckedAssignment):
    """Names a slot by the owner's cache id: ``cluster_id``, ``cache_id``, ``batch_index`` (0).

    Raises ``TypeError``, ``ValueError``.
    """

    _cluster_id: int
    _cache_id: int
    _batch_index: int

    def __init__(self, cluster_id: int, cache_id: int, batch_index: int = 0) -> None:
        checks.check_uint64("cluster_id", cluster_id)
        checks.check_int64("cache_id", cache_id)
        checks.check_uint32("batch_index", batch_index)
        _set(self, "_cluster_id", cluster_id)
        _set(self, "_cache_id", cache_id)
        _set(self, "_batch_index", batch_index)

    @property
    def cluster_id(self) -> int:
        """Cluster of the owner."""
        return self._cluster_id

    @property
    def cache_id(self) -> int:
        """Id of the cache on its owner."""
        return self._cache_id

    @property
    def batch_index(self) -> int:
        """Slot of the cache."""
        return self._batch_index

    def __repr__(self) -> str:
        return (
            f"CacheKeyByIdAndIndex(cluster_id={self._cluster_id}, cache_id={self._cache_id}, "
            f"batch_index={self._batch_index})"
        )
