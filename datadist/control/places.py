"""Connections that have yet to show who they are: how many there may be, and which has to go."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class _Crowd(Generic[T]):
    """Connections by host; each change and each question costs the same, however many there are."""

    def __init__(self) -> None:
        self.hosts: dict[T, str] = {}
        self._of: defaultdict[str, OrderedDict[T, None]] = defaultdict(OrderedDict)
        self._having: defaultdict[int, OrderedDict[str, None]] = defaultdict(OrderedDict)
        """Hosts by their number of connections; first who has had so many for longest."""
        self._most = 0

    def add(self, connection: T, host: str) -> None:
        self.hosts[connection] = host
        self._of[host][connection] = None
        self._count(host, len(self._of[host]) - 1)

    def discard(self, connection: T) -> bool:
        host = self.hosts.pop(connection, None)
        if host is None:
            return False
        before = len(self._of[host])
        del self._of[host][connection]
        self._count(host, before)
        return True

    def _count(self, host: str, before: int) -> None:
        self._having[before].pop(host, None)
        now = len(self._of[host])
        if now:
            self._having[now][host] = None
        else:
            del self._of[host]
        self._most = max(self._most, now)
        while self._most and not self._having[self._most]:
            del self._having[self._most]
            self._most -= 1

    def of(self, host: str) -> int:
        return len(self._of[host]) if host in self._of else 0

    def first(self) -> list[T]:
        """The oldest connection of the host that has most, and the oldest of all."""
        found = self.oldest()
        return [] if found is None else [found, next(iter(self.hosts))]

    def oldest(self, host: str | None = None) -> T | None:
        """The oldest connection of a host, or of the one that has most; None where there is none."""
        if host is None:
            host = next(iter(self._having[self._most]), "")
        return next(iter(self._of[host]), None) if host in self._of else None


class Places(Generic[T]):
    """At most ``per_host`` connections of one host and ``total`` in all.

    Of a host that has its number, one of its own has to go. Of a full house goes who has shown nothing,
    before who has; among those one of the host that has most of them, which is where equal hosts have had
    so many for longest; of that host the oldest. So who holds many places gives one up before who holds
    one, and an engine, which speaks at once, outlasts who is silent. Who is ``spared`` stays where others
    can go: the oldest of those who have shown nothing, or of those who have.
    """

    def __init__(
        self,
        per_host: int,
        total: int,
        spared: Callable[[T], bool] = lambda _connection: False,
    ) -> None:
        self._per_host = per_host
        self._total = total
        self._spared = spared
        self._silent, self._shown = _Crowd[T](), _Crowd[T]()

    def __iter__(self) -> Iterator[T]:
        return iter([*self._silent.hosts, *self._shown.hosts])

    def __len__(self) -> int:
        return len(self._silent.hosts) + len(self._shown.hosts)

    def host(self, connection: T) -> str:
        """The host that a connection came from."""
        found = self._silent if connection in self._silent.hosts else self._shown
        return found.hosts[connection]

    def add(self, connection: T, host: str) -> None:
        """Give a connection that has shown nothing a place; see :meth:`crowded` for who goes before."""
        self._silent.add(connection, host)

    def show(self, connection: T) -> None:
        """A connection has said all that is first to be said."""
        host = self._silent.hosts.get(connection)
        if host is not None:
            self._silent.discard(connection)
            self._shown.add(connection, host)

    def discard(self, connection: T) -> None:
        """Take a connection's place away, if it has one."""
        if not self._silent.discard(connection):
            self._shown.discard(connection)

    def crowded(self, host: str) -> T | None:
        """Who has to go before one more of ``host`` comes; None where there is room."""
        if self._silent.of(host) + self._shown.of(host) >= self._per_host:
            own = self._silent.oldest(host)
            return self._shown.oldest(host) if own is None else own
        return self.next()

    def next(self) -> T | None:
        """Who has to go before one more of a host without any comes; None where there is room."""
        if len(self) < self._total:
            return None
        found = [each for crowd in (self._silent, self._shown) for each in crowd.first()]
        return next((each for each in found if not self._spared(each)), found[0])
