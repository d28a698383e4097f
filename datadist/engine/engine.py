"""One initialised engine: creates its parts and ends them in order."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

from datadist.base import cgroups
from datadist.base.addresses import parse_address
from datadist.base.calls import CallThread, Ended, Outcome
from datadist.base.flag import Flag
from datadist.base.log_prefix import clear_log_prefix
from datadist.base.shortage import explain
from datadist.base.texts import in_seconds
from datadist.base.workers import Workers
from datadist.caches.element_types import ElementTypes
from datadist.caches.memory import Memory
from datadist.caches.owned import OwnDirectory
from datadist.caches.peers import PeerView
from datadist.control.account import MAX_TABLES
from datadist.control.discovery import Discovery, EndpointError
from datadist.control.hostport import HostPort
from datadist.control.job import described
from datadist.control.messages import Announce
from datadist.control.own_directory import RuntimeDirError
from datadist.control.port_holders import with_holders
from datadist.control.reactor import Reactor, Unanswered
from datadist.control.runtime_dir import chosen_path
from datadist.control.session import Session
from datadist.control.tcp import NetworkSettings
from datadist.engine.dispatcher import Dispatcher
from datadist.engine.interpreter import check_proc, check_proc_for_addresses
from datadist.engine.options import EngineOptions
from datadist.engine.reports import Reports
from datadist.engine.starting import (
    check_descriptors,
    check_file_size,
    check_system_calls,
    start_transport,
)
from datadist.engine.stats import link_stats, pool_stats
from datadist.grants.messages import GrantMessages
from datadist.grants.owner import OwnGrants
from datadist.grants.words import Words
from datadist.links.building import CLOSE_SECONDS, Builder
from datadist.links.cluster_calls import ClusterCalls, Removed
from datadist.links.clusters import Clusters
from datadist.links.domain import Attempt, Domain, TableDomain
from datadist.links.duplicates import REMEDY, Duplicates
from datadist.links.events import LinkEventKind
from datadist.links.known_links import KnownLinks
from datadist.links.links import Links
from datadist.links.lost_peers import LostPeers
from datadist.links.missing_members import MissingMembers
from datadist.links.peer_connections import PeerConnections
from datadist.links.rendezvous import Rendezvous
from datadist.links.steps import Steps
from datadist.rank_table import RankTable, RankTableError, parse_own_table
from datadist.status import LLMException, LLMStatusCode, param_invalid
from datadist.transfers import int_lists
from datadist.transfers.background import Background
from datadist.transfers.copies import Copies
from datadist.transfers.fetch import Fetches
from datadist.transfers.granted_pull import GrantedPulls
from datadist.transfers.layerwise import LayerJobs
from datadist.transfers.notices import Notices
from datadist.transfers.pull import Pulls
from datadist.transfers.push import Pushes
from datadist.transfers.resolve import Route
from datadist.transfers.route_cache import RouteCache
from datadist.transfers.transfer import Transfers
from datadist.transfers.verify import Verification
from datadist.transport import Access, Placement
from datadist.transports.defects import text_of
from datadist.types import RegisterMemStatus

log = logging.getLogger("datadist.engine")
T = TypeVar("T")

MAX_DOMAINS = 512
RECOMMENDED_DOMAINS = 16
FLUSH_SECONDS = 1.0
"""Longest wait of `finalize` for peers that are inside a write, and for links that are being closed."""
FLUSH_LOOK_SECONDS = 0.005
CALLS_SECONDS = 10.0
"""Longest wait for calls that link or unlink, whose transfers were aborted; they need 5 s at most."""
CONTROL_SECONDS = 30.0
"""Longest wait for our own reactor, which never blocks; reaching it is a defect."""

_live: weakref.WeakSet[Engine] = weakref.WeakSet()


def comm_ids() -> Iterator[int]:
    """Ids of domains: from 1, without the numbers of status codes.

    Programs compare what ``link`` returns with status codes, which are integers too.
    """
    taken = {int(code) for code in LLMStatusCode}
    return (number for number in itertools.count(1) if number not in taken)


class Engine:
    """Everything between `init` and `finalize`.

    Raises LLMException: LLM_FAILED where the backend, the device or the runtime directory can not be
    used, and the codes of the memory pools; and what the system refuses, as it is.
    """

    def __init__(self, cluster_id: int, options: EngineOptions, environ: Mapping[str, str]) -> None:
        self.cluster_id = cluster_id
        self.options = options
        self.forked = False
        self.over = False
        """Whether it is finalized, or of another process: nobody may begin anything."""
        self._undelivered: dict[int, list[int]] = {}
        """Comm ids that interrupted calls of `link` got, or will get, and have not returned."""
        self._losses = itertools.count()
        self._comm_ids = comm_ids()
        self._warned = False
        with ExitStack() as stack:
            check_descriptors()
            check_proc()
            check_system_calls()
            check_file_size()
            self.backend, self.transport = start_transport(options, environ, stack)
            int_lists.use(self.transport.convert_list)
            self.memory = Memory(self.transport)
            stack.callback(self.memory.close)
            self._add_pools()
            self.owned = OwnDirectory(self.memory)
            self.words = Words(self.memory, self.transport)
            self._start_control(environ, stack)
            stack.callback(self.owned.clear)
            self._finalizing = Outcome(self._end)
            self._ender = CallThread("datadist-finalize")
            self._closing = stack.pop_all()
        _live.add(self)

    def _add_pools(self) -> None:
        pools = {
            Placement.DEVICE: self.options.device_pool,
            Placement.HOST: self.options.host_pool,
        }
        for placement, config in pools.items():
            if config is not None:
                self.memory.add_pool(placement, config)

    def _start_control(self, environ: Mapping[str, str], stack: ExitStack) -> None:
        self._far = not self.transport.capabilities.same_host_only
        self._start_discovery(environ, stack)
        self._start_linking(stack)
        self._start_transfers(stack)
        lost_peers = LostPeers(
            self._reactor, self._builder, self.owned, self.options.remote_accessible
        )
        self._after_sessions.append(lost_peers.close)
        Dispatcher(
            self._discovery,
            self.views,
            self._links,
            self._clusters,
            self._builder,
            self.fetches,
            self.owned,
            self.verification,
            lost_peers,
            self._duplicates,
            self._grant_messages,
            self.notices,
        )
        reports = Reports(self._reactor.helpers, self._reactor.post, self.report)
        self._discovery.on_ask_report = reports.ask
        self._call(self._discovery.start)
        self.listen(self.options.listen_ip, self.options.listen_port)

    def _start_discovery(self, environ: Mapping[str, str], stack: ExitStack) -> None:
        self._connections = PeerConnections(self.transport, self._post)
        stack.callback(self._connections.close)  # after the workers, which close links
        self._reactor = Reactor("datadist-control")
        stack.callback(self._reactor.stop)
        self.owned.hand_over_to(self._reactor.post)
        self._workers = Workers(max(3, min(4, cgroups.cpus())), "datadist-worker")
        stack.callback(self._workers.stop)  # before the reactor, since they post to it
        self._services: list[Fetches | Verification | Notices | Background | LayerJobs] = []
        self._after_sessions: list[Callable[[], None]] = []
        """Run at the end, on the reactor, once all sessions are closed."""
        stack.callback(self._stop_services)
        network = self._network_settings() if self._far else None
        try:
            self._discovery = Discovery(
                self._reactor, self.cluster_id, chosen_path(environ), network, self.options.job
            )
        except RuntimeDirError as error:
            raise LLMException(str(error), status_code=LLMStatusCode.LLM_FAILED) from error
        stack.callback(self._close_discovery)
        self.views: dict[str, PeerView] = {}

    def _post(self, call: Callable[[], None]) -> None:
        """Have the control thread, which starts later than what this is given to, run a call."""
        self._reactor.post(call)

    def _stop_services(self) -> None:
        for service in self._services:
            service.close()

    def _close_discovery(self) -> None:
        """By the control thread, which tells everybody; by ours, which does not, where that hangs.

        All threads are told to end. Meanwhile peers hear that we leave, and those that were inside a
        write of our memory say that they are out.
        """

        def close() -> None:
            try:
                self._discovery.close()
                for call in self._after_sessions:
                    call()
            finally:
                self._workers.tell()  # they report to the reactor, which ends after them

        for service in self._services:
            service.tell()
        try:
            self._reactor.call_when(self._flushed(), FLUSH_SECONDS, close, CONTROL_SECONDS)
        except TimeoutError:
            self._reactor.stop()
            self._discovery.abandon()
            raise

    def _start_linking(self, stack: ExitStack) -> None:
        self._caller = CallThread("datadist-calls")
        stack.callback(self._caller.stop)
        steps = Steps(
            self._reactor,
            self._discovery,
            self.views,
            self._workers,
            self.transport,
            self.memory,
            self.owned,
            Access.READ_WRITE if self.options.remote_accessible else Access.READ,
            self._connections,
        )
        self._builder = Builder(
            steps, self._reactor, self._discovery, self._workers, self.memory, self.owned
        )
        rendezvous = Rendezvous(
            self._reactor,
            self._discovery,
            self.options.rendezvous,
            self._far,
            self.transport.capabilities.self_bootstrapping,
        )
        waiting = MissingMembers(self._reactor, self._discovery, self.views, rendezvous)
        self._duplicates = Duplicates(self._discovery, self.views, self._all_domains)
        self._links = Links(
            self._reactor,
            self._discovery,
            self.views,
            self._builder,
            rendezvous,
            waiting,
            self._duplicates,
        )
        self._clusters = Clusters(
            self._reactor,
            self._discovery,
            self.views,
            self._builder,
            self.backend.name,
            self.options.remote_accessible,
            self._far,
            self._duplicates,
            self.options.link_total_time,
            self.options.link_metadata,
        )
        stack.callback(self._builder.events.close)
        self.links_known = KnownLinks(
            self.domain, self._all_domains, self._hear, self.memory.quarantine, self._builder.events
        )
        self.clusters = ClusterCalls(
            self._call,
            self._act,
            self._caller.catch_up,
            self._clusters,
            self._builder,
            self.owned.revocations,
        )

    def _start_transfers(self, stack: ExitStack) -> None:
        self.verification = Verification(
            self.owned, self.transport.capabilities.host_addressable, self.options.sync_timeout
        )
        self._services.append(self.verification)
        self.transfers = Transfers(
            self.cluster_id,
            self.options.sync_timeout,
            self._all_domains,
            self.views,
            self._drain,
            self.verification.compare if self.options.checksum else None,
            self.memory.quarantine,
        )
        self.transfers.on_broken = self._on_broken
        self.route_cache = RouteCache(self.transfers, self.owned)
        types = ElementTypes(self.cluster_id, self.options.check_types)
        self.pulls = Pulls(
            self.transfers, self.owned, self.route_cache, types, self.options.remote_accessible
        )
        self.pushes = Pushes(self.transfers, self.owned, self.route_cache, types)
        self.fetches = Fetches(self.transfers, self.owned, types)
        self._services.append(self.fetches)
        self.notices = Notices(self.transfers, self._reactor, self.cluster_id, lambda: self.over)
        self._builder.on_unlinked = self._on_unlinked
        self.background = Background(self.options.background_threads, self._was_finalized)
        self.layer_jobs = LayerJobs(self._was_finalized)
        self._services += self.notices, self.background, self.layer_jobs
        self.copies = Copies(self.transport, self.owned, types)
        self._start_grants(types)

    def _on_unlinked(self) -> None:
        self.notices.on_unlinked()
        self.route_cache.forget_ended()

    def _on_broken(self, route: Route, reason: str) -> None:
        cluster = route.view.session.cluster_id
        self._builder.events.note(LinkEventKind.BROKEN, route.domain, reason, cluster)
        self._reactor.post(self.notices.on_unlinked)

    def _start_grants(self, types: ElementTypes) -> None:
        incarnation = self._discovery.address.incarnation
        self.grants = OwnGrants(self.owned, self.words, self._reactor, self.cluster_id, incarnation)
        self._grant_messages = GrantMessages(self.grants, self._reactor.post)
        self.granted_pulls = GrantedPulls(
            self.transfers, self.owned, self._grant_messages, self.words, types,
            self.memory.quarantine, self.options.remote_accessible,
        )  # fmt: skip

    def _all_domains(self) -> list[Domain]:
        return [*list(self._links.domains.values()), *list(self._clusters.pairs.values())]

    def _network_settings(self) -> NetworkSettings | None:
        key = self.options.auth_key
        return None if key is None else NetworkSettings(key, self.options.peer_timeout)

    def _call(self, function: Callable[[], T]) -> T:
        """Run a function on the reactor. Raises LLM_FAILED when that does not answer."""
        try:
            return self._reactor.call(function, CONTROL_SECONDS)
        except Unanswered as error:
            raise LLMException(str(error), status_code=LLMStatusCode.LLM_FAILED) from error

    def _act(self, function: Callable[[], T]) -> T:
        """Run what links or unlinks as a whole, one call at a time.

        Raises what it raises, and LLM_ENGINE_FINALIZED.
        """
        try:
            return self._caller.call(function)
        except Ended:
            raise self._was_finalized() from None

    def _was_finalized(self) -> LLMException:
        return LLMException(
            f"the engine of cluster {self.cluster_id} was finalized meanwhile",
            status_code=LLMStatusCode.LLM_ENGINE_FINALIZED,
        )

    def listen(self, ip: str | None, port: int | None) -> None:
        """Listen for `link_clusters` of others at ``ip:port`` only; without a port, listen nowhere.

        Port 0 is a free one, see :meth:`listens_at`.
        Raises LLM_FAILED where the address cannot be used.
        """
        listening = bool(ip) and port is not None
        if listening:
            check_proc_for_addresses("the engine cannot listen")
        try:
            self._call(lambda: self._discovery.listen_at(ip, port))
        except EndpointError as error:
            text = with_holders(str(error), error.in_use)
            raise LLMException(text, status_code=LLMStatusCode.LLM_FAILED) from error
        near = not (ip and listening) or parse_address(ip).is_loopback
        if self._far and self.options.auth_key is None and not near:
            log.warning(
                "DATADIST_AUTH_KEY is not set, so %s:%s is not opened to other hosts, and only "
                "engines of this host can link with this one: set it to the same secret everywhere",
                *(self.listens_at() or (ip, port)),
            )

    def listens_at(self) -> HostPort | None:
        """Where others find this engine with `link_clusters`, or None."""
        return self._discovery.listens_at()

    def linked(self) -> list[str]:
        """Every domain and pair that is held, but for pairs whose peer is gone."""
        self._caller.catch_up()
        pairs = [pair for pair in self._clusters.pairs.values() if pair.usable or pair.waiting]
        return [repr(domain) for domain in [*list(self._links.domains.values()), *pairs]]

    def _drain(self, session: Session, timeout: float) -> bool:
        """Handle what a peer has sent; False when the control thread is too busy."""
        try:
            session.catch_up(timeout)
        except Unanswered as error:
            log.debug("looking keys up as they are known: %s", error)
            return False
        return True

    def _hear(self, cluster: int) -> None:
        """Handle what the engines of a cluster have sent by now."""
        for session in list(self._discovery.sessions.values()):
            if session.cluster_id == cluster and not session.settled():
                self._drain(session, CONTROL_SECONDS)

    # -- links -------------------------------------------------------------------------------

    def link(
        self, name: str, ranks: Mapping[int, int], table_text: str, comm_ids: list[int],
        metadata: bytes | None = None,
    ) -> None:  # fmt: skip
        """Begin to form a domain and append its comm id to ``comm_ids`` (LLM-DataDist API, link).

        A caller that is interrupted hands ``comm_ids`` to :meth:`not_delivered`.

        Raises LLM_PARAM_INVALID, also where another live engine of the job has our cluster id, or
        LLM_LINK_FAILED for a rank table that cannot be used.
        """
        self._end_undelivered()
        given = self.options.link_metadata if metadata is None else metadata
        self._act(lambda: comm_ids.append(self._link(name, ranks, table_text, given)))

    def _link(self, name: str, ranks: Mapping[int, int], table_text: str, metadata: bytes) -> int:
        self._check_link(ranks)
        table = self._read_table(ranks, table_text)
        self._check_tables(table)
        self._claim(ranks)
        comm_id = next(self._comm_ids)
        domain = TableDomain(
            owner=self._links,
            comm_id=comm_id,
            name=name,
            ranks=dict(ranks),
            own_cluster=self.cluster_id,
            table=table,
            announce=Announce(
                link=comm_id,
                name=name,
                ranks=sorted(ranks.items()),
                table=table.canonical,
                backend=self.backend.name,
                one_sided=self.options.remote_accessible,
            ),
            job=self.options.job,
            by_library=self._joined_by_library(table, ranks.values()),
            deadline=time.monotonic() + self.options.link_total_time,
            metadata=metadata,
        )
        self._call(lambda: self._links.add(domain))
        return comm_id

    def not_delivered(self, comm_ids: list[int]) -> None:
        """Nobody got what :meth:`link` puts there: it ends, with the next call at the latest."""
        self._undelivered[next(self._losses)] = comm_ids
        self._end_undelivered()

    def _end_undelivered(self) -> None:
        """After the calls that made them, which are before this one in the queue; does not wait."""
        lost = dict(self._undelivered)
        if lost:
            self._caller.submit(Outcome(lambda: self._leave_undelivered(lost)))

    def _leave_undelivered(self, lost: dict[int, list[int]]) -> None:
        for number, comm_ids in lost.items():
            for comm_id in comm_ids:
                domain = self._links.domains.get(comm_id)
                if domain is not None:
                    log.info("%s ends: the call of link was interrupted", domain)
                    self._leave(domain, grace_seconds=0.0)
            self._undelivered.pop(number, None)

    def _claim(self, ranks: Mapping[int, int]) -> None:
        """Make our cluster id ours within the job, at the first link.

        Our names are looked at where somebody has to find us by them yet.
        """
        met = {session.cluster_id for session in list(self._discovery.sessions.values())}
        try:
            if (
                not met.issuperset(ranks.keys() - {self.cluster_id})
                and not self._discovery.has_names()
            ):
                self._call(self._discovery.keep_names)
            holder = self._discovery.claims.take()
        except LLMException:
            raise
        except RuntimeError:
            raise self._was_finalized() from None
        except (OSError, RuntimeDirError) as error:
            raise LLMException(
                f"cannot claim cluster id {self.cluster_id} in {self._discovery.directory.place}: "
                f"{_claim_problem(error)}",
                status_code=LLMStatusCode.LLM_FAILED,
            ) from error
        if holder is not None:
            self._call(self._discovery.tell_refused)
            raise param_invalid(
                f"cluster id {self.cluster_id} belongs to another live engine in "
                f"{described(self.options.job)} of {self._discovery.directory.path}: {holder}; {REMEDY}"
            )

    def _check_tables(self, table: RankTable) -> None:
        held = sum(len(domain.announce.table) for domain in list(self._links.domains.values()))
        more = len(table.canonical)
        if held + more > MAX_TABLES:
            raise param_invalid(
                f"the rank tables of the links that are held have {held} characters, and with {more} "
                f"more they would have more than the {MAX_TABLES} that peers take: unlink some"
            )

    def _joined_by_library(self, table: RankTable, ranks: Iterable[int]) -> bool:
        """Whether the transport brings the members together: it can, and they have several servers."""
        several = len({table.device(rank).server for rank in ranks}) > 1
        capabilities = self.transport.capabilities
        return several and capabilities.self_bootstrapping and not capabilities.same_host_only

    def _check_link(self, ranks: Mapping[int, int]) -> None:
        if self.cluster_id not in ranks:
            raise param_invalid(
                f"cluster_rank_info {dict(ranks)} does not contain this engine's cluster id "
                f"{self.cluster_id}"
            )
        held = len(self._links.domains)
        if held >= MAX_DOMAINS:
            raise param_invalid(
                f"{held} communication domains are linked and at most {MAX_DOMAINS} are possible: "
                "unlink some (FAILED ones count until they are unlinked)"
            )
        if self.memory.empty():
            raise param_invalid(
                "there is no memory that a link could use: configure a pool (mem_pool_cfg, for "
                'example {"memory_size": 1073741824}) or register a cache before link'
            )
        if held >= RECOMMENDED_DOMAINS and not self._warned:
            self._warned = True
            log.warning(
                "more than %d communication domains are linked: each costs memory and slows "
                "linking (at most %d are possible)",
                RECOMMENDED_DOMAINS,
                MAX_DOMAINS,
            )

    def _read_table(self, ranks: Mapping[int, int], text: str) -> RankTable:
        try:
            table = parse_own_table(text)
            problems = table.check_ranks(list(ranks.values()))
            if not problems:
                self.transport.check_table(table, ranks[self.cluster_id])
        except RankTableError as error:
            problems = list(error.problems)
        except Exception as error:
            problems = [text_of(error, self.transport)]
        if problems:
            raise LLMException(
                "the rank table cannot be used: " + "; ".join(problems),
                status_code=LLMStatusCode.LLM_LINK_FAILED,
            )
        return table

    def unlink(self, comm_id: int) -> None:
        """Leave a domain; transfers over it may end first, for as long as they may take.

        Raises LLM_NOT_YET_LINK for an unknown id.
        """
        self._end_undelivered()
        domain = self._act(lambda: self._unlink(comm_id))
        self._builder.wait_for_dropped(CLOSE_SECONDS, domain)  # a failed one may still be closing

    def _unlink(self, comm_id: int) -> TableDomain:
        domain = self.domain(comm_id)
        self._leave(domain, grace_seconds=self.options.sync_timeout)
        return domain

    def _leave(self, domain: TableDomain, grace_seconds: float) -> None:
        self._close(domain, self._call(lambda: self._links.remove(domain)), grace_seconds)

    def _close(self, domain: TableDomain, attempt: Attempt | None, grace_seconds: float) -> None:
        if attempt is not None:
            try:
                self._builder.close(attempt, grace_seconds)
            except Exception as error:
                why = text_of(error, self.transport)
                raise LLMException(
                    f"{domain} is unlinked, but closing it failed: {why}",
                    status_code=LLMStatusCode.LLM_UNLINK_FAILED,
                ) from error

    def domain(self, comm_id: int) -> TableDomain:
        """The domain of a comm id. Raises LLM_NOT_YET_LINK."""
        domain = self._links.domains.get(comm_id)
        if domain is None:
            raise LLMException(
                f"comm id {comm_id} is not linked: link never returned it, or it was unlinked",
                status_code=LLMStatusCode.LLM_NOT_YET_LINK,
            )
        return domain

    def wait_link(self, comm_id: int, timeout: float | None) -> None:
        """Block until a domain is OK.

        Raises LLM_LINK_FAILED with the reason, LLM_TIMEOUT after ``timeout`` seconds,
        LLM_NOT_YET_LINK for an unknown id or when it is unlinked meanwhile.
        """
        domain = self.domain(comm_id)
        limit = domain.deadline - time.monotonic() + CONTROL_SECONDS
        if not domain.settled.wait(limit if timeout is None else timeout):
            raise LLMException(
                f"{domain} is still PREPARING{_after(timeout)}: {self._missing(domain)}",
                status_code=LLMStatusCode.LLM_TIMEOUT,
            )
        if domain.closed:
            self.domain(comm_id)
        if domain.status is RegisterMemStatus.FAILED:
            raise LLMException(
                f"{domain} FAILED: {domain.reason}", status_code=LLMStatusCode.LLM_LINK_FAILED
            )

    def stats(self, wait: bool = True) -> dict[str, Any]:
        """Counters of every link, of the engine, and the use of its pools.

        Without ``wait``, inside of another call of the same thread, as it is before other threads have
        freed what they are about to free.
        """
        domains = self._all_domains()
        self.owned.settle(wait)
        self.transfers.ledger.add_up()
        with self.transfers.ledger.lock:
            links, total = link_stats(domains, self.backend.name), self.transfers.counters.as_dict()
        return {
            "cluster_id": self.cluster_id,
            "backend": self.backend.name,
            "links": links,
            "total": total,
            "pools": pool_stats(self.memory),
        }

    def report(self) -> dict[str, Any]:
        """:meth:`stats`, and what else `datadist top` shows; from any thread but the control thread."""
        place = self.listens_at()
        return {
            **self.stats(wait=False),
            "job": self.options.job,
            "incarnation": self._discovery.address.incarnation,
            "listens_at": None if place is None else str(place),
            "caches": len(self.owned),
            "grants": len(self.grants),
            "kept": self.memory.quarantine.texts(),
        }

    def _missing(self, domain: TableDomain) -> str:
        return self._call(lambda: self._links.missing_members.missing(domain))

    # -- the end -----------------------------------------------------------------------------

    @property
    def ended(self) -> Flag:
        """Set once :meth:`finalize` is over."""
        return self._finalizing.done

    def finalize(self) -> None:
        """Begin to unlink everything and free everything; bounded to seconds, logs what goes wrong.

        Does not wait, see :meth:`wait_until_ended`: handlers of signals call it, and what they have
        interrupted goes on first. Calling it again changes nothing.
        """
        self.over = True
        self._ender.submit(self._finalizing)

    def wait_until_ended(self, timeout: float | None = None) -> bool:
        """Whether :meth:`finalize` is over, within ``timeout`` seconds."""
        over = self.ended.wait(timeout)
        if over:
            self._ender.join()
        return over

    def _end(self) -> None:
        _live.discard(self)
        try:
            with self._closing:
                self.grants.close()  # while peers still reach the words
                self.background.tell()
                self._discovery.claims.close()  # an engine that follows need not wait for our end
                self._wait_for_calls()
                self._leave_all()
                self._builder.wait_for_dropped(FLUSH_SECONDS)
                for text in self.memory.quarantine.texts():
                    log.error("finalize: %s: do not free it before this process ends", text)
        except Exception:
            log.exception("finalize did not end cleanly; please report it")
        finally:
            clear_log_prefix()
            self._ender.close()

    def _wait_for_calls(self) -> None:
        """Let a call that links or unlinks end; the transfers that it waits for are aborted."""
        self._caller.close()

        def ended() -> bool:
            self._builder.abort_transfers()
            return self._caller.ended.is_set()

        self._reactor.post(lambda: self._reactor.when(ended, lambda: None, CALLS_SECONDS))
        if not self._caller.ended.wait(CALLS_SECONDS):
            log.error(
                "finalize: a call of link or unlink has not ended in %s", in_seconds(CALLS_SECONDS)
            )

    def _leave_all(self) -> None:
        """All links at once: each step between threads costs a turn of every thread that computes."""
        left, pairs = self._call(self._remove_all)
        for domain, attempt in left:
            try:
                self._close(domain, attempt, grace_seconds=0.0)
            except LLMException as error:
                log.warning("finalize: %s", error)
        self.clusters.close_all(pairs)

    def _remove_all(self) -> tuple[list[tuple[TableDomain, Attempt | None]], Removed]:
        domains = list(self._links.domains.values())
        left = [(domain, self._links.remove(domain)) for domain in domains]
        return left, self.clusters.remove_all()

    def _flushed(self) -> Callable[[], bool]:
        """Whether peers have what we said by now, and those that were inside a write have left it.

        Who reads finds what we said before its read counts, so nobody waits for the answers of readers.
        """
        marks = {view: view.session.sending() for view in list(self.views.values())}

        def flushed() -> bool:
            if not any(map(self._is_owed, marks, marks.values())):
                return True
            self._reactor.later(
                FLUSH_LOOK_SECONDS, lambda: None
            )  # nothing tells of the kernel's part
            return False

        return flushed

    def _is_owed(self, view: PeerView, mark: int) -> bool:
        writes = view.incarnation in self._builder.writers and view.seq_acked < view.seq_sent
        return not view.gone and (writes or view.session.hears(mark))

    def abandon(self) -> None:
        """In a forked child: the threads are gone; close descriptors, touch nothing shared."""
        self.forked = self.over = True
        self.route_cache.clear()
        self.owned.forget_tensors()
        for events in (self.grants.ended, self.notices.inbox, self.links_known.events):
            events.close()
        self._reactor.abandon()
        self._discovery.abandon()


def _claim_problem(error: OSError | RuntimeDirError) -> str:
    if not isinstance(error, OSError):
        return str(error)
    if error.errno == errno.ENOENT:
        return "the directory was removed meanwhile: link again"
    left = "no descriptor is left: " if error.errno in (errno.EMFILE, errno.ENFILE) else ""
    return left + explain(error)


def _after(timeout: float | None) -> str:
    return "" if timeout is None else f" after {timeout * 1000:.0f} ms"


def _after_fork_in_child() -> None:
    for engine in list(_live):
        engine.abandon()


os.register_at_fork(after_in_child=_after_fork_in_child)
