"""The cache manager's part that grants blocks to readers, and finishes with grants of others."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from datadist.api.arguments import check_kind, check_one_id, cluster_of, name_of
from datadist.api.cache import Cache, own_cache_id
from datadist.api.descriptors import descriptor_of
from datadist.api.grant import Grant, check_lease
from datadist.api.manager_mixin import ManagerMixin
from datadist.base import checks
from datadist.base.callers import pass_on
from datadist.base.calls import begin, entries
from datadist.base.keywords import named_keywords
from datadist.caches.owned import describe
from datadist.engine.engine import Engine
from datadist.grants.granted import MAX_BLOCKS, Granted
from datadist.grants.own_grant import OwnGrant
from datadist.status import LLMException, LLMStatusCode, param_invalid
from datadist.transfers.block_lists import Blocks, check_blocks
from datadist.transfers.transfer import as_param_invalid, check_accessible
from datadist.types import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex

__all__ = ["Granting", "token_of"]

LEASE_MILLIS = 30_000


@named_keywords
@entries
class Granting(ManagerMixin):
    """Grants, on the side of the owner and on that of readers."""

    def grant_blocks(
        self,
        cache: Cache,
        key: CacheKey,
        blocks: Blocks,
        *,
        readers: int = 1,
        lease_millis: int = LEASE_MILLIS,
    ) -> Grant:
        """Open ``blocks`` of a blocks cache under a request or prefix key, until the grant ends.

        It ends when ``readers`` engines have finished with it, by `revoke`, after ``lease_millis``
        unless it is renewed, when its readers are lost, or with the cache. Then the blocks may be
        reused at once: a pull that is still under way fails. Until then they must not change. Readers
        pull with ``pull_blocks(CacheKey(...), ...)``. Granting a key again revokes its earlier grant. The
        cluster id of the key does not count.

        Raises ``TypeError``, ``ValueError``, and LLMException: LLM_PARAM_INVALID for a key that names a
        cache, no or too many blocks, blocks out of range, and a cache that peers do not reach;
        LLM_KV_CACHE_NOT_EXIST for a cache that was freed; LLM_FAILED where the device does not take
        the grant; LLM_ENGINE_FINALIZED. An earlier grant of the key lives on then.
        """
        begin("grant_blocks")
        checks.check_isinstance("cache", cache, Cache, allow_none=False)
        checks.check_isinstance("key", key, CacheKey, allow_none=False)
        checks.check_blocks("blocks", blocks)
        checks.check_uint32("readers", readers)
        check_kind("cache", cache, True, "only blocks can be granted")
        check_one_id(key)
        if not readers:
            raise param_invalid("readers is 0: a grant has at least one reader")
        check_lease(lease_millis)
        if not 0 < len(blocks) <= MAX_BLOCKS:
            raise param_invalid(
                f"blocks has {len(blocks)} entries: a grant has 1 to {MAX_BLOCKS} blocks"
            )
        engine = self._engine()
        record = OwnGrant(
            name_of(key), own_cache_id(cache, self), self._granted_blocks(engine, cache, blocks),
            readers, lease_millis / 1000,
        )  # fmt: skip
        grant = record.handle = Grant(self, key, cache, record)
        engine.grants.add(record)
        return grant

    def _granted_blocks(self, engine: Engine, cache: Cache, blocks: Blocks) -> NDArray[np.int64]:
        own = engine.owned.get(own_cache_id(cache, self))
        if own is None:
            raise LLMException(
                f"{cache!r} does not exist in this engine: it was freed, or is over memory that no "
                "engine knows",
                status_code=LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
            )
        if self._one_sided:
            check_accessible(own)
        with as_param_invalid():
            checked = check_blocks("blocks", blocks, own.layout.count)
        return np.array(checked, np.int64)

    def release_grant(self, key: CacheKey, *, token: bytes | None = None) -> None:
        """Finish with a grant of another engine without reading it; once per engine and grant.

        The owner is told soon, and not waited for. Without a token the grant is meant that the owner
        has for this key by then. One that has ended is left alone.

        Raises ``TypeError``, and LLMException: LLM_PARAM_INVALID for a key without exactly one id, a
        damaged token, and this engine's own cluster; LLM_NOT_YET_LINK; LLM_ENGINE_FINALIZED.
        """
        begin("release_grant")
        checks.check_isinstance("key", key, CacheKey, allow_none=False)
        checks.check_isinstance("token", token, bytes)
        check_one_id(key)
        granted = token_of(key, token)
        self._engine().granted_pulls.release(cluster_of(key), name_of(key), granted)

    def ended_grants(self) -> list[Grant]:
        """The grants of this engine that have ended since the last call, in that order.

        A program that does not call this loses nothing but the list: at most 65536 wait. Where an
        exception of a signal handler ends the call, the next one returns them. Raises LLMException
        (LLM_ENGINE_FINALIZED).
        """
        begin("ended_grants")
        return self._engine().grants.take_ended()

    def ended_grants_fileno(self) -> int:
        """A descriptor that is readable while `ended_grants` may have some, for `select` and the like.

        Now and then it is readable for nothing. It belongs to the engine: do not read or close it.
        Raises LLMException: LLM_ENGINE_FINALIZED, LLM_FAILED where no descriptor is left.
        """
        begin("ended_grants_fileno")
        return descriptor_of(self._engine().grants.ended, "ended grants")

    def _may_be_granted(
        self,
        key: CacheKey | CacheKeyByIdAndIndex | BlocksCacheKey,
        token: bytes | None,
        release: bool,
    ) -> bool:
        """Whether a pull of the key may be one of a grant. Raises ``TypeError``, LLM_PARAM_INVALID."""
        checks.check_isinstance("token", token, bytes)
        checks.check_isinstance("release", release, bool, allow_none=False)
        if not isinstance(key, CacheKey):
            if token is not None or release:
                what = "token" if token is not None else "release"
                raise param_invalid(
                    f"{what} was given with a {type(key).__name__}: only a CacheKey names a grant"
                )
            return False
        engine = self._bound
        granted = (
            token is not None
            or release
            or (
                engine is not None
                and not engine.over
                and engine.granted_pulls.may_pull(key.cluster_id)
            )
        )
        if granted:
            check_one_id(key)
        return granted


def token_of(key: CacheKey, token: bytes | None) -> Granted | None:
    """What a token says, if one was given. Raises LLM_PARAM_INVALID for one of another grant."""
    if token is None:
        return None
    try:
        granted = Granted.decode(token)
    except ValueError as error:
        pass_on(error)
        raise param_invalid(f"token: {error}; give the bytes of Grant.token as they are") from None
    name, cluster = name_of(key), key.cluster_id
    if (granted.cluster, granted.name) != (cluster, name):
        raise param_invalid(
            f"token is of a grant of cluster {granted.cluster}, {describe(granted.name)}, and the key "
            f"names cluster {cluster}, {describe(name)}: give the token that belongs to the key"
        )
    return granted
