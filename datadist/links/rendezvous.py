"""Finds the members of a domain on other hosts: listens as rank 0, dials as another rank.

Rank 0 listens at an address that every rank knows, the others dial it until the domain is formed
or its time is over. In a domain of more than two, each of those others listens as well, at the
address by which it reaches rank 0, and rank 0 passes that on. Listeners and dials belong to domains
that are being formed: when the last of them is done, nothing listens any more.

Where the transport's library brings the members together, every one listens at all addresses of its
host, and they tell each other by :mod:`datadist.links.member_record`. Everything here runs on the
reactor's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from datadist.base.addresses import is_address, looks_numeric, parse_address
from datadist.caches.peers import PeerView
from datadist.control.discovery import Discovery
from datadist.control.hostport import BASE_PORT, HostPort
from datadist.control.interfaces import addresses
from datadist.control.listener import Listener, NetworkError
from datadist.control.messages import Announce, Member
from datadist.control.network_discovery import NetworkDiscovery
from datadist.control.port_holders import with_holders
from datadist.control.reactor import Reactor
from datadist.control.runtime_dir import Address as EngineAddress
from datadist.control.tcp import REFUSED, TcpSession, look_up
from datadist.control.tcp import Address as SocketAddress
from datadist.links.domain import TableDomain

log = logging.getLogger("datadist.link")

FIRST_RETRY_SECONDS = 0.1
RETRY_SECONDS = 1.0
GRACE_SECONDS = 1.0
"""Time in which ranks on one host usually have met, before a missing key is worth a warning."""

NO_KEY = (
    "DATADIST_AUTH_KEY is not set, so nothing was opened or dialled beyond this host: set it to the "
    "same secret on all ranks"
)
NO_ADDRESS = (
    "the rank table has no address of rank 0 (host_ip, or a server_id that is an address): set "
    "DATADIST_RENDEZVOUS to the same host:port on all ranks"
)


@dataclass(eq=False)
class _DialLoop:
    """Dialling one address until the engine there has a session with us."""

    endpoint: HostPort
    cluster: int
    domains: set[TableDomain] = field(default_factory=set)
    delay: float = FIRST_RETRY_SECONDS
    problem: str | None = None


@dataclass(eq=False)
class _Search:
    """The listeners and dials of one domain."""

    listening: dict[HostPort, Listener] = field(default_factory=dict)
    dial_loops: list[_DialLoop] = field(default_factory=list)
    problem: str | None = None


class Rendezvous:
    """The searches of one engine; does nothing for a transport that stays on its host."""

    def __init__(
        self,
        reactor: Reactor,
        discovery: Discovery,
        chosen: HostPort | None,
        wanted: bool,
        library: bool,
    ) -> None:
        self._reactor = reactor
        self._discovery = discovery
        self._chosen = chosen
        self._wanted = wanted
        self._library = library
        """Whether members on other hosts are brought together by the transport's library."""
        self._searches: dict[TableDomain, _Search] = {}
        self._pursuits: dict[tuple[HostPort, int], _DialLoop] = {}
        self._warned = False

    def begin(self, domain: TableDomain) -> None:
        """Look for the members of a new domain on other hosts."""
        if not self._wanted or (self._library and not domain.by_library):
            return
        search = self._searches[domain] = _Search()
        if self._discovery.remote is None:
            search.problem = NO_KEY
            self._reactor.later(GRACE_SECONDS, lambda: self._warn_no_key(domain))
            return
        self._discovery.remote.expect(domain, _hosts(domain))
        if domain.by_library:
            self._open_everywhere(search, self._discovery.remote)
            return
        place = _place(domain, self._chosen)
        if isinstance(place, str):
            search.problem = place
        elif domain.rank == _first(domain):
            self._open(domain, self._discovery.remote, place)
        else:
            clusters = {rank: cluster for cluster, rank in domain.ranks.items()}
            self._dial_repeatedly(domain, place, clusters[_first(domain)])

    def end(self, domain: TableDomain) -> None:
        """Close what only this domain needed."""
        search = self._searches.pop(domain, None)
        if search is None:
            return
        self._give_up(domain, search.dial_loops)
        if self._discovery.remote is None:
            return
        self._discovery.remote.forget(domain)
        for endpoint in search.listening:
            self._discovery.remote.unlisten(endpoint)

    def explain(self, domain: TableDomain) -> str | None:
        """Why members on other hosts are missing, for messages."""
        search = self._searches.get(domain)
        if search is None:
            return None
        found = [] if search.problem is None else [search.problem]
        for listener in search.listening.values():
            found += listener.refusals.explain()
        found += [
            f"cluster {p.cluster} at {p.endpoint}: {p.problem}"
            for p in search.dial_loops
            if p.problem is not None
        ]
        return "; ".join(found) or None

    def announcement(self, domain: TableDomain, view: PeerView) -> Announce:
        """What to tell a peer: to a far rank 0 of a larger domain, also where we listen."""
        remote, session = self._discovery.remote, view.session
        search = self._searches.get(domain)
        if (
            remote is None
            or search is None
            or domain.by_library
            or len(domain.ranks) < 3
            or not isinstance(session, TcpSession)
            or domain.ranks.get(session.cluster_id) != _first(domain)
        ):
            return domain.announce
        here = HostPort(session.local_address, 0)
        if here not in search.listening:
            try:
                search.listening[here] = remote.listen(here)
            except NetworkError as error:
                search.problem = str(error)
                log.warning("%s: %s", domain, error)
                return domain.announce
        place = str(search.listening[here].endpoint)
        return domain.announce.model_copy(update={"endpoints": [place]})

    def meet(self, domain: TableDomain, members: Mapping[int, Member]) -> None:
        """Dial the members that a formed domain names and that we do not know yet.

        Raises ``ValueError`` where a library brought them together and there is no way to one.
        """
        search = self._searches.get(domain)
        if search is None:
            return
        if domain.by_library:
            self._check_reachable(members)
        if self._discovery.remote is None:
            return
        first = None if domain.by_library else self._first_cluster(domain)
        stale = [p for p in search.dial_loops if p.cluster != first]
        self._give_up(domain, stale)
        search.dial_loops = [p for p in search.dial_loops if p not in stale]
        for member in members.values():
            if self._is_on_same_host(member):
                continue
            for text in member.endpoints:
                try:
                    self._dial_repeatedly(domain, HostPort.parse(text), member.cluster_id)
                except ValueError as error:
                    log.warning(
                        "%s: the address of cluster %d: %s", domain, member.cluster_id, error
                    )

    def _is_on_same_host(self, member: Member) -> bool:
        """Whether the network is not needed to talk to a member."""
        engine = EngineAddress(member.cluster_id, member.incarnation)
        return (
            engine == self._discovery.address
            or engine.incarnation in self._discovery.sessions
            or self._discovery.is_listed(engine)
        )

    def _check_reachable(self, members: Mapping[int, Member]) -> None:
        for member in members.values():
            if self._is_on_same_host(member) or (
                member.endpoints and self._discovery.remote is not None
            ):
                continue
            who = f"cluster {member.cluster_id} (rank {member.rank}) is not on this host"
            if self._discovery.remote is None:
                raise ValueError(f"{who}, and {NO_KEY}")
            raise ValueError(f"{who} and listens nowhere: set DATADIST_AUTH_KEY there as well")

    @staticmethod
    def _first_cluster(domain: TableDomain) -> int:
        return next(c for c, rank in domain.ranks.items() if rank == _first(domain))

    # -- listening ---------------------------------------------------------------------------

    def endpoints(self, domain: TableDomain) -> list[str]:
        """Where members that the library brings together find us, those of the table first."""
        search = self._searches.get(domain)
        if search is None or domain.table is None:
            return []
        device = domain.table.device(domain.rank)
        listed = (device.host_ip, device.server_id)
        families = {":" in place.host: x.endpoint.port for place, x in search.listening.items()}
        found = [HostPort(a, families[":" in a]) for a in addresses() if (":" in a) in families]
        return [str(p) for p in sorted(found, key=lambda p: p.host not in listed)]

    def _open_everywhere(self, search: _Search, remote: NetworkDiscovery) -> None:
        """Listen at all addresses of this host: the rank table need not say which one counts."""
        for host in ("0.0.0.0", "::"):
            place = HostPort(host, 0)
            try:
                search.listening[place] = remote.listen(place)
            except NetworkError as error:  # a host may lack IPv6, or IPv4
                log.info("%s", error)

    def _open(self, domain: TableDomain, remote: NetworkDiscovery, place: HostPort) -> None:
        """Listen, trying again while that fails: a predecessor may still be ending."""

        def found(addresses: list[SocketAddress]) -> None:
            search = self._searches.get(domain)
            if search is None:
                return
            address = HostPort(str(addresses[0][1][0]), place.port)
            try:
                search.listening[address] = remote.listen(address)
            except NetworkError as error:
                refused(search, error)
                return
            search.problem = _loopback_name(place, address)
            if search.problem is not None:
                log.warning("%s: %s", domain, search.problem)

        def refused(search: _Search, error: NetworkError) -> None:
            text = str(error)
            if search.problem is not None and search.problem.startswith(text):
                failed(search.problem)
                return
            search.problem = text
            self._reactor.helpers.submit(lambda: explain(text, error.in_use), owner=domain)

        def explain(text: str, in_use: HostPort | None) -> None:
            reason = with_holders(text, in_use)  # once, since it takes long
            self._reactor.post(lambda: failed(reason, news=True))

        def failed(reason: str, news: bool = False) -> None:
            search = self._searches.get(domain)
            if search is None:
                return
            if news or search.problem != reason:
                search.problem = reason
                log.warning("%s: %s", domain, reason)
            self._reactor.later(RETRY_SECONDS, again)

        def again() -> None:
            if domain in self._searches:
                look_up(self._reactor, place, found, failed)

        again()

    # -- dialling ----------------------------------------------------------------------------

    def _dial_repeatedly(self, domain: TableDomain, endpoint: HostPort, cluster: int) -> None:
        key = (endpoint, cluster)
        pursuit = self._pursuits.get(key)
        if pursuit is None:
            pursuit = self._pursuits[key] = _DialLoop(endpoint, cluster)
            self._reactor.post(lambda: self._dial(pursuit))
        pursuit.domains.add(domain)
        self._searches[domain].dial_loops.append(pursuit)

    def _give_up(self, domain: TableDomain, dial_loops: list[_DialLoop]) -> None:
        for pursuit in dial_loops:
            pursuit.domains.discard(domain)
            if not pursuit.domains:
                self._pursuits.pop((pursuit.endpoint, pursuit.cluster), None)

    def _dial(self, pursuit: _DialLoop) -> None:
        remote = self._discovery.remote
        if not pursuit.domains or remote is None:
            return
        if any(s.cluster_id == pursuit.cluster for s in self._discovery.sessions.values()):
            pursuit.delay, pursuit.problem = FIRST_RETRY_SECONDS, None
            self._reactor.later(RETRY_SECONDS, lambda: self._dial(pursuit))
            return
        remote.contact(pursuit.endpoint, pursuit.cluster, lambda met: self._dialled(pursuit, met))

    def _dialled(self, pursuit: _DialLoop, met: EngineAddress | str) -> None:
        problem = met if isinstance(met, str) else None
        if problem not in (None, pursuit.problem) and pursuit.domains:
            level = logging.DEBUG if problem == REFUSED else logging.WARNING
            log.log(level, "cluster %d at %s: %s", pursuit.cluster, pursuit.endpoint, problem)
        pursuit.problem = problem
        self._reactor.later(pursuit.delay, lambda: self._dial(pursuit))
        pursuit.delay = min(pursuit.delay * 1.5, RETRY_SECONDS)

    def _warn_no_key(self, domain: TableDomain) -> None:
        if domain.waiting and not self._warned:
            self._warned = True
            log.warning("%s: %s", domain, NO_KEY)


def _first(domain: TableDomain) -> int:
    return min(domain.ranks.values())


def _hosts(domain: TableDomain) -> set[str | None]:
    """What the rank table says of where members are; not all of it need be addresses."""
    devices = domain.table.devices if domain.table is not None else ()
    return {text for d in devices for text in (d.host_ip, d.server_id, d.device_ip)}


def _place(domain: TableDomain, chosen: HostPort | None) -> HostPort | str:
    """Where rank 0 listens, or why that is not known."""
    if chosen is not None:
        return chosen
    if domain.table is None:
        return NO_ADDRESS
    device = domain.table.device(_first(domain))
    if device.host_ip and looks_numeric(device.host_ip) and not is_address(device.host_ip):
        return (
            f"host_ip of rank 0 is {device.host_ip!r} in the rank table, which is no IP address: "
            "correct it, or set DATADIST_RENDEZVOUS"
        )
    host = next((h for h in (device.host_ip, device.server_id) if h and is_address(h)), None)
    if host is None:
        return NO_ADDRESS
    port = device.host_port or BASE_PORT + device.device_id
    if port > 65535:
        return (
            f"rank 0 has device_id {device.device_id}, for which there is no port: give it a "
            "host_port in the rank table, or set DATADIST_RENDEZVOUS"
        )
    return HostPort(host, port)


def _loopback_name(place: HostPort, address: HostPort) -> str | None:
    """What is wrong with a name that other hosts see as another address."""
    named = not is_address(place.host) and place.host != "localhost"
    if named and parse_address(address.host).is_loopback:
        return (
            f"{place.host} is the loopback address {address.host} on this host (see /etc/hosts), "
            "which other hosts cannot reach: set DATADIST_RENDEZVOUS to an address"
        )
    return None
