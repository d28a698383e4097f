"""The documented `LLMDataDist`: one engine per process, its links and its caches."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

from datadist.api.cluster_messages import ClusterMessages
from datadist.api.link_information import LinkInformation, check_metadata
from datadist.base import checks
from datadist.base.at_exit import expect_daemon_threads_to_fail
from datadist.base.callers import pass_on
from datadist.base.calls import Outcome, begin, entries, inside_call, run_apart
from datadist.base.keywords import NoKeywords, keywords_of, named_keywords, unknown_keyword
from datadist.base.lazy_module import LazyModule
from datadist.base.log_prefix import clear_log_prefix, set_log_prefix
from datadist.base.patched_modules import patched
from datadist.engine.interpreter import check_interpreter, check_proc_for_addresses
from datadist.status import LLMException, LLMStatusCode, param_invalid, system_errors
from datadist.types import LLMClusterInfo, LLMRole, RegisterMemStatus, ipv4_text

if TYPE_CHECKING:  # loaded by init, since their imports are slow
    from typing_extensions import Unpack

    from datadist.api import cache_manager as managers
    from datadist.engine.engine import Engine
    from datadist.engine.options import EngineOptions
    from datadist.links.cluster_calls import Target
else:
    managers = LazyModule("datadist.api.cache_manager")

__all__ = ["LLMDataDist"]

log = logging.getLogger("datadist")

MAX_MEMBERS = 4
MAX_NAME = 128
END_SECONDS = 15.0
"""Longest time that an engine takes to end."""

_changing = threading.RLock()
"""Held while an engine starts or is removed: a process has one engine at a time."""


@named_keywords
@entries
class LLMDataDist(ClusterMessages, LinkInformation):
    """The engine of this process: prompt, decoder or both (a label, which restricts nothing).

    ``cluster_id`` (uint64) must be unique among the engines that are linked together. One object per
    process can be initialised at a time. ``with`` finalizes at the end of the block.

    Raises ``TypeError``, ``ValueError`` for arguments of a wrong type or range.
    """

    llm_engine_instance: ClassVar[LLMDataDist | None] = None
    """The initialised object of this process."""
    _ending: ClassVar[Any] = None
    """The last engine that was finalized, which may still be on its way out; or None."""
    _starting: ClassVar[Outcome[None] | None] = None
    """The :class:`Outcome` of the last `init`, which goes on where it was interrupted; or None."""

    def __init__(self, role: LLMRole, cluster_id: int) -> None:
        checks.check_isinstance("role", role, LLMRole)
        checks.check_uint64("cluster_id", cluster_id)
        self._role = role
        self._cluster_id = cluster_id
        self._engine: Engine | None = None
        self._options: EngineOptions | None = None
        self._cache_manager: managers.CacheManager | None = None

    @property
    def cluster_id(self) -> int:
        """The cluster id of this engine."""
        return self._cluster_id

    @property
    def backend(self) -> str | None:
        """Name of the transport in use; None before `init`."""
        return self._engine.backend.name if self._engine else None

    # -- init and finalize -------------------------------------------------------------------

    def init(self, options: dict[str, str]) -> None:
        """Start the engine: choose and open the transport, reserve the pools.

        ``options`` come from :meth:`LLMConfig.generate_options` or are made by hand. Does nothing
        when this object is initialised already. A failure leaves nothing behind and may be retried;
        so does an exception that interrupts it, but for what the next `init` or `finalize` waits for.

        Raises ``TypeError``, ``ValueError``, ``ModuleNotFoundError`` where cache-manager mode is
        off, and :class:`LLMException`: LLM_PARAM_INVALID for option values and backends,
        LLM_OUT_OF_MEMORY for a pool, and where the process may not have more memory, LLM_FAILED for a
        second engine in the process, a transport that does not start, a Python without threads as
        engines need them (gevent, eventlet, no GIL), or where no thread or no descriptor is left; the
        text names the limit.
        """
        begin("init")
        check_interpreter("init")
        self._await_start()
        if self._engine is not None:
            if self._engine.forked or not self._engine.over:
                return
            self._begin_end()  # what an interrupted `finalize` has left
        first: list[str] = []
        """Whether the engine was ready before this call was interrupted: appending needs no lock."""

        def start() -> None:
            with _changing:
                if first or self._engine is not None:
                    return
                self._start(options)
                first.append("ready")
                if first[0] != "ready":
                    self._begin_end()

        outcome = Outcome(start)
        try:
            LLMDataDist._starting = outcome
            run_apart(outcome, "datadist-init")
            outcome.result()
            outcome.join()
        except BaseException:
            first.append("interrupted")
            if outcome.claim():
                outcome.done.set()
            if first[0] == "ready":
                self._begin_end()
            raise

    @staticmethod
    def _await_start() -> bool:
        """Whether no `init` goes on that was interrupted, or that another thread called."""
        starting = LLMDataDist._starting
        if starting is None:
            return True
        ended = starting.done.wait(END_SECONDS)
        starting.join()
        return ended

    def _start(self, options: dict[str, str]) -> None:
        other = LLMDataDist.llm_engine_instance
        if other is not None:
            raise LLMException(
                f"{other!r} is initialised in this process, and only one can be: go on with that "
                "engine, which is LLMDataDist.llm_engine_instance, or finalize it first "
                "(LLMDataDist.llm_engine_instance.finalize())",
                status_code=LLMStatusCode.LLM_FAILED,
            )
        self._await_end()
        failure = "the engine cannot start"
        with system_errors(failure):
            from datadist.engine.engine import Engine
            from datadist.engine.options import EngineOptions
        set_log_prefix(self._cluster_id)
        try:
            with system_errors(failure):
                parsed = EngineOptions.parse(options, self._role, os.environ)
                engine = Engine(self._cluster_id, parsed, os.environ)
        except BaseException:
            clear_log_prefix()
            raise
        self._cache_manager = managers.CacheManager(engine, self._refusal, parsed.remote_accessible)
        self._options, self._engine = parsed, engine
        LLMDataDist.llm_engine_instance = self
        log.info("%r is ready", self)

    @staticmethod
    def _await_end() -> None:
        """Wait for an engine that a signal handler finalized and that may not have ended yet."""
        ending = LLMDataDist._ending
        if ending is None:
            return
        if not ending.wait_until_ended(END_SECONDS):
            raise LLMException(
                "the engine that was finalized before has not ended yet: initialise once the call "
                "that finalize interrupted has returned",
                status_code=LLMStatusCode.LLM_FAILED,
            )
        LLMDataDist._ending = None

    def finalize(self) -> None:
        """Unlink everything, free pools, caches and keys; no-op when not initialised. Never raises.

        Also called at exit of the process. The object can be initialised again. A signal handler may
        call it: where it interrupted a call of this engine, it returns at once, and the rest follows
        on a thread when that call has ended. Where it is interrupted itself, it goes on, and can be
        called again to wait for its end.
        """
        ending = self._begin_end()
        if inside_call(sys._getframe(1)):
            return
        if ending is None:
            self._await_start()
            ending = LLMDataDist._ending
        if ending is not None and not ending.forked:
            ending.wait_until_ended()
            if LLMDataDist._ending is ending:
                LLMDataDist._ending = None

    def _begin_end(self) -> Engine | None:
        """Have the engine end. Each step may be repeated, where an interrupt came between two."""
        engine, manager = self._engine, self._cache_manager
        if engine is not None and not engine.forked:
            assert manager is not None
            from datadist.api.manager_mixin import unbind

            LLMDataDist._ending = engine
            engine.finalize()
            unbind(manager)
        if LLMDataDist.llm_engine_instance is self:
            LLMDataDist.llm_engine_instance = None
        self._engine = None
        return engine

    def _live(self, code: LLMStatusCode) -> Engine:
        """The engine. Raises LLMException with ``code`` where there is none."""
        engine = self._engine
        if engine is None or engine.over:
            raise self._refusal(code, engine is not None and engine.forked)
        return engine

    def _refusal(self, code: LLMStatusCode, forked: bool) -> LLMException:
        """The exception for a cache manager whose engine was finalized or forked."""
        if forked:
            return LLMException(self._forked(), status_code=code)
        return LLMException(
            f"the engine of cluster {self._cluster_id} was finalized: call init, and use the "
            "cache_manager that belongs to it",
            status_code=code,
        )

    def _initialised(self) -> Engine:
        engine = self._engine
        if engine is None or (engine.over and not engine.forked):
            raise RuntimeError(f"{self!r} is not initialized: call init first")
        if engine.forked:
            raise RuntimeError(self._forked())
        return engine

    def _forked(self) -> str:
        return (
            f"{self!r} was initialized before this process forked, and cannot be used here: start "
            "processes with spawn, or call finalize and init in the child"
        )

    # -- links -------------------------------------------------------------------------------

    def link(
        self,
        comm_name: str,
        cluster_rank_info: dict[int, int],
        rank_table: str,
        *,
        metadata: bytes | None = None,
        **unknown: Unpack[NoKeywords],
    ) -> int:
        """Begin to form a communication domain and return its comm id (>= 1) at once.

        Every member calls with the same name (fewer than 128 characters), a mapping of cluster id
        to rank with 2 to 4 entries in ascending order of rank, and an equivalent rank table (JSON
        text, version 1.0 or 1.2; trailing commas are accepted). The members meet in the background:
        poll :meth:`query_register_mem_status` or call :meth:`wait_link`. At most 512 domains are
        possible and 16 recommended. A pool must be configured or memory registered first. An exception
        that interrupts this call leaves no domain. The members can read ``metadata`` (up to 8192 bytes;
        None: those of the configuration) with :meth:`link_metadata` once it is OK.

        Raises ``RuntimeError`` before `init`, ``TypeError``, ``ValueError``, and
        :class:`LLMException`: LLM_PARAM_INVALID for wrong arguments and broken constraints,
        LLM_LINK_FAILED for a rank table that cannot be used (LLM-DataDist API, link).
        """
        begin("link")
        if unknown:
            raise unknown_keyword("link", keywords_of(LLMDataDist.link), unknown)
        engine = self._initialised()
        _check_name(comm_name)
        _check_mapping(cluster_rank_info)
        checks.check_json("rank_table", rank_table)
        check_metadata(metadata)
        _check_ranks(cluster_rank_info)
        checks.check_json("rank_table", rank_table, allow_none=False)
        _check_name_bytes(comm_name)
        self._refuse_hixl("link")
        check_interpreter("link")
        comm_ids: list[int] = []
        try:
            engine.link(comm_name, cluster_rank_info, rank_table, comm_ids, metadata)
            self.cache_manager.set_is_call_linked()
            return comm_ids[0]
        except BaseException:
            engine.not_delivered(comm_ids)
            raise

    def unlink(self, comm_id: int) -> None:
        """Leave a domain; local, the other members each do the same.

        Waits for transfers in progress. Links to the same clusters may be made again at once.

        Raises as :meth:`query_register_mem_status`, and LLMException (LLM_UNLINK_FAILED) when the
        transport fails to close; the id is gone then, too.
        """
        begin("unlink")
        self._check_comm_id(comm_id, "unlink").unlink(comm_id)

    def query_register_mem_status(self, comm_id: int) -> RegisterMemStatus:
        """PREPARING, then OK or FAILED, which stay; :meth:`link_error` says why it failed.

        Never blocks. Raises ``RuntimeError`` before `init`, ``TypeError``, ``ValueError``, and
        :class:`LLMException` (LLM_NOT_YET_LINK) for an unknown or unlinked id.
        """
        return self._check_comm_id(comm_id, "query_register_mem_status").domain(comm_id).status

    def wait_link(self, comm_id: int, timeout_in_millis: int | None = None) -> None:
        """Block until the domain is OK; None waits as long as linking may take.

        Raises as :meth:`query_register_mem_status`, and :class:`LLMException`: LLM_LINK_FAILED with
        the reason, LLM_TIMEOUT when it is still PREPARING after ``timeout_in_millis``.
        """
        begin("wait_link")
        engine = self._check_comm_id(comm_id, "wait_link")
        if timeout_in_millis is not None:
            checks.check_uint32("timeout_in_millis", timeout_in_millis)
        engine.wait_link(comm_id, None if timeout_in_millis is None else timeout_in_millis / 1000)

    def _check_comm_id(self, comm_id: int | None, method: str) -> Engine:
        engine = self._initialised()
        checks.check_isinstance("comm_id", comm_id, int)
        checks.check_uint64("comm_id", comm_id)
        self._refuse_hixl(method)
        return engine

    def _refuse_hixl(self, method: str) -> None:
        if self._options is not None and self._options.hixl:
            raise LLMException(
                f'{method} is not available with transfer_backend "hixl": name a transport '
                "(`datadist backends` lists them) or leave it unset",
                status_code=LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            )

    # -- links by address --------------------------------------------------------------------

    def link_clusters(
        self,
        clusters: Sequence[LLMClusterInfo],
        timeout: int = 3000,
        *,
        metadata: bytes | None = None,
    ) -> tuple[LLMStatusCode, list[LLMStatusCode]]:
        """Link with engines that listen (``listen_ip_info``), all at once, within ``timeout`` ms.

        No rank table, no call at the other end; the link works in both directions once this
        returns. Each cluster needs a local address (unless ``local_comm_res`` is not empty) and
        exactly one remote one. Up to 16 clusters a call are recommended.

        Returns the last failure, or LLM_SUCCESS, and one status per cluster in order:
        LLM_LINK_FAILED (nobody listens there), LLM_ALREADY_LINK, LLM_TIMEOUT, LLM_PARAM_INVALID.
        The reasons are logged, and ``link_error`` of each cluster info has its reason. ``metadata`` as
        in :meth:`link`. Raises ``RuntimeError`` before `init`, ``TypeError``,
        ``ValueError``, LLMException (LLM_PARAM_INVALID) for arguments.
        """
        begin("link_clusters")
        engine = self._initialised()
        _check_timeout(timeout)
        checks.check_sequence_of("clusters", clusters, LLMClusterInfo)
        assert self._options is not None
        for cluster in clusters:
            if not cluster.local_ip_info_list and not self._options.local_comm_res:
                raise param_invalid(
                    f"local_ip_info_list is empty in {cluster!r}: call append_local_ip_info, or set "
                    "local_comm_res"
                )
            checks.check_uint64("remote_cluster_id", cluster.remote_cluster_id)
        check_metadata(metadata)
        if not clusters:
            return LLMStatusCode.LLM_PARAM_INVALID, []
        check_interpreter("link_clusters")
        check_proc_for_addresses("link_clusters")
        linked = engine.clusters.link([_target(c) for c in clusters], timeout / 1000, metadata)
        for cluster, (_, reason) in zip(clusters, linked, strict=True):
            cluster._link_error = reason
            engine.links_known.note(cluster.remote_cluster_id, reason)
        results = [code for code, _ in linked]
        return _last_failure(results), results

    def unlink_clusters(
        self, clusters: Sequence[LLMClusterInfo], timeout: int = 3000, force: bool = False
    ) -> tuple[LLMStatusCode, list[LLMStatusCode]]:
        """End links by address; from either end. Clusters that are not linked are a success.

        Without ``force`` exactly one remote address is needed (not with backend "hixl"), and the
        other end's half is gone, too, when this returns. With ``force`` nothing is waited for.

        Returns as :meth:`link_clusters`: LLM_UNLINK_FAILED when the peer cannot be told,
        LLM_TIMEOUT when it did not confirm. Raises likewise.
        """
        begin("unlink_clusters")
        engine = self._initialised()
        _check_timeout(timeout)
        checks.check_sequence_of("clusters", clusters, LLMClusterInfo)
        checks.check_isinstance("force", force, bool, allow_none=False)
        for cluster in clusters:
            checks.check_uint64("remote_cluster_id", cluster.remote_cluster_id)
        if not clusters:
            return LLMStatusCode.LLM_PARAM_INVALID, []
        assert self._options is not None
        results = engine.clusters.unlink(
            [_target(c) for c in clusters], timeout / 1000, force, not self._options.hixl
        )
        return _last_failure(results), results

    def switch_role(self, role: LLMRole, switch_options: dict[str, str] | None = None) -> None:
        """Change the role, and with ``llm.listenIpInfo`` in the options what is listened on.

        Without it listening ends; the port that is listened on already is left as it is. Other
        options do not matter.

        Raises ``RuntimeError`` before `init`, ``TypeError``, ``ValueError``, ``KeyError`` for None,
        LLMException: LLM_PARAM_INVALID, LLM_EXIST_LINK while something is linked, LLM_FAILED where
        the address cannot be used, LLM_FEATURE_NOT_ENABLED for another address with "hixl".
        """
        begin("switch_role")
        engine = self._initialised()
        checks.check_isinstance("role", role, LLMRole)
        from datadist.engine.options import check_is_options, parse_listen_info

        if switch_options is not None:
            check_is_options("switch_options", switch_options)
        listen = parse_listen_info(switch_options or {})
        if role is None:
            raise KeyError("role is None: give a member of LLMRole")
        assert self._options is not None
        present = (self._options.listen_ip, self._options.listen_port)
        if self._options.hixl:
            if listen is not None and listen != present:
                raise LLMException(
                    'another listen_ip_info than at init is not possible with backend "hixl"',
                    status_code=LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
                )
        else:
            linked = engine.linked()
            if linked:
                raise LLMException(
                    f"the role cannot change while something is linked: {', '.join(linked)}",
                    status_code=LLMStatusCode.LLM_EXIST_LINK,
                )
            engine.listen(*(listen or (None, None)))
        self._role = role

    # -- what happened ----------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """What this engine moved, as plain numbers and text; a copy of this moment.

        ``links`` has an entry per peer of every link: ``comm_id`` (None for links by address),
        ``name``, ``cluster_id``, ``rank``, ``status``, ``error`` (why it failed or broke, or None),
        and ``pull`` and ``push``, each with ``operations`` and ``bytes`` that succeeded, ``errors``,
        and ``seconds`` (of both, waiting for other transfers on the link included). ``total`` has
        ``pull`` and ``push`` of all links since `init`, also of those that were unlinked. Counted is
        what this engine began; what peers pull from it or push to it, they count. Requests that are
        refused before a link is chosen count nowhere.

        ``pools`` has, by placement, ``page_bytes``, ``pages_used``, ``pages_free`` and
        ``allocations_returning`` (freed, and waiting until peers have let go); ``cluster_id`` and
        ``backend`` tell whose numbers these are. Counting costs about a microsecond per transfer.

        Raises ``RuntimeError`` before `init`.
        """
        return self._initialised().stats(wait=not inside_call(sys._getframe(1)))

    # -- first version only ------------------------------------------------------------------

    @property
    def kv_cache_manager(self) -> Any:
        """Belongs to the first version: LLMException (LLM_PARAM_INVALID) in cache-manager mode."""
        self._initialised()
        raise _first_version("kv_cache_manager", "cache_manager")

    def check_link_status(self, remote_cluster_id: int) -> None:
        """Belongs to the first version: raises as :attr:`kv_cache_manager`."""
        self._initialised()
        raise _first_version("check_link_status", "query_register_mem_status")

    # -- caches ------------------------------------------------------------------------------

    @property
    def cache_manager(self) -> managers.CacheManager:
        """The caches of this engine. Raises ``RuntimeError`` before `init`."""
        self._initialised()
        assert self._cache_manager is not None
        return self._cache_manager

    def __enter__(self) -> LLMDataDist:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.finalize()

    def __repr__(self) -> str:
        state = f"backend={self.backend!r}" if self._engine else "not initialized"
        role = self._role.name if self._role is not None else None
        return f"LLMDataDist({role}, cluster_id={self._cluster_id}, {state})"


def _check_timeout(timeout: int) -> None:
    checks.check_int32("timeout", timeout)
    if timeout <= 0:
        raise param_invalid(f"timeout is {timeout}, it must be positive (milliseconds)")


def _last_failure(results: Sequence[LLMStatusCode]) -> LLMStatusCode:
    failures = [code for code in results if code is not LLMStatusCode.LLM_SUCCESS]
    return failures[-1] if failures else LLMStatusCode.LLM_SUCCESS


def _target(cluster: LLMClusterInfo) -> Target:
    from datadist.links.cluster_calls import Target

    assert cluster.remote_cluster_id is not None
    return Target(
        cluster.remote_cluster_id,
        tuple((ipv4_text(ip), port) for ip, port in cluster.remote_ip_info_list),
    )


def _first_version(name: str, instead: str) -> LLMException:
    return param_invalid(f"{name} is not available with EnableCacheManager on: use {instead}")


def _check_name(name: str) -> None:
    checks.check_isinstance("comm_name", name, str, allow_none=False)
    if not name:
        raise param_invalid("comm_name is empty: give a name, the same one at all members")
    if len(name) >= MAX_NAME:
        raise param_invalid(
            f"comm_name has {len(name)} characters, it must have fewer than {MAX_NAME}"
        )


def _check_name_bytes(name: str) -> None:
    try:
        encoded = name.encode()
    except UnicodeEncodeError as error:
        pass_on(error)
        raise param_invalid(f"comm_name {name!r} is not text: {error.reason}") from None
    if len(encoded) >= MAX_NAME or 0 in encoded:
        raise param_invalid(
            f"comm_name {name!r} must have fewer than {MAX_NAME} bytes in UTF-8, none of them 0"
        )


def _check_mapping(mapping: dict[int, int]) -> None:
    checks.check_isinstance("cluster_rank_info", mapping, dict)
    checks.check_dict("cluster_rank_info", mapping, int, int)
    if len(mapping) > MAX_MEMBERS:
        raise param_invalid(
            f"cluster_rank_info has {len(mapping)} entries: a domain has at most {MAX_MEMBERS} members"
        )
    for cluster, rank in mapping.items():
        checks.check_uint64("a cluster id in cluster_rank_info", cluster)
        checks.check_uint32(f"the rank of cluster {cluster} in cluster_rank_info", rank)


def _check_ranks(mapping: dict[int, int]) -> None:
    if len(mapping) < 2:
        raise param_invalid(
            f"cluster_rank_info is {mapping}: a domain has at least 2 members, this engine included"
        )
    ranks = list(mapping.values())
    if ranks != sorted(ranks):
        raise param_invalid(
            f"cluster_rank_info is {mapping}: list the clusters in ascending order of rank"
        )


def _finalize_at_exit() -> None:
    instance = LLMDataDist.llm_engine_instance
    if instance is not None and not patched():  # else a wait might not end: the kernel tells peers
        expect_daemon_threads_to_fail()
        instance.finalize()


def _after_fork_in_child() -> None:
    global _changing
    _changing = threading.RLock()  # another thread may have held it
    LLMDataDist._ending = LLMDataDist._starting = None  # their threads are gone


atexit.register(_finalize_at_exit)
os.register_at_fork(after_in_child=_after_fork_in_child)
