"""What engines did between two looks at their reports."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from datadist.diagnosis.asking import Asked

_Link: TypeAlias = "Mapping[str, Any]"
_Key: TypeAlias = "tuple[int | None, str, int]"
"""Comm id, name and peer."""
_End: TypeAlias = "tuple[str, int]"
UNITS = ((1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K"))
"""Binary ones."""


@dataclass(frozen=True)
class Rates:
    """Per second, between two looks. ``mean`` is seconds per transfer that the engine began."""

    bytes_in: float = 0.0
    bytes_out: float = 0.0
    operations: float = 0.0
    mean: float | None = None


@dataclass(frozen=True)
class LinkActivity:
    """One peer of one link, as the engine sees it."""

    name: str
    cluster_id: int
    backend: str
    state: str
    error: str
    rates: Rates
    errors: int
    """Transfers that failed since the link was made."""


@dataclass(frozen=True)
class Activity:
    """One engine."""

    job: str
    cluster_id: int
    pid: int
    program: str
    backend: str
    rates: Rates
    pool: str
    """How much of its pools is in use, and their size, for people."""
    grants: int
    links: list[LinkActivity]
    failures: list[str]
    report: Mapping[str, Any] | None = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Look:
    """The reports of one moment, with their links by what both ends know of them."""

    def __init__(self, asked: Sequence[Asked]) -> None:
        self.asked = asked
        self._by_engine = {each.incarnation: each for each in asked if each.report is not None}
        self._links: dict[tuple[str, _Key], _Link] = {}
        self._ends: dict[tuple[str, int], dict[_End, list[tuple[Asked, _Link]]]] = {}
        """By job and cluster that links lead to, then by name and cluster that they come from."""
        for each in self._by_engine.values():
            for link in _links_of(each):
                self._links[each.incarnation, _key(link)] = link
                there = self._ends.setdefault((each.job, link["cluster_id"]), {})
                there.setdefault((link["name"], each.cluster_id), []).append((each, link))

    def of(self, incarnation: str) -> Asked | None:
        """The engine's report, where it gave one."""
        return self._by_engine.get(incarnation)

    def same(self, engine: Asked, link: _Link) -> _Link:
        """A link as it is here; empty where it is not there."""
        return self._links.get((engine.incarnation, _key(link)), {})

    def towards(self, engine: Asked, link: _Link | None) -> Iterator[tuple[Asked, _Link]]:
        """The other ends of a link, or of all that lead to an engine."""
        ends = self._ends.get((engine.job, engine.cluster_id), {})
        if link is not None:
            found = [ends.get((link["name"], link["cluster_id"]), [])]
        else:
            found = list(ends.values())
        for other, theirs in itertools.chain.from_iterable(found):
            if other.incarnation != engine.incarnation:
                yield other, theirs


def activities(before: Look, now: Look) -> list[Activity]:
    """What each engine of ``now`` did since ``before``; an engine that was not there did nothing yet."""
    moved = _Moved(before, now)
    return [_activity(each, moved) for each in now.asked]


class _Moved:
    """Differences of counters, by engine, link and peer."""

    def __init__(self, before: Look, now: Look) -> None:
        self.before, self.now = before, now

    def rates(self, engine: Asked, link: Mapping[str, Any] | None = None) -> Rates:
        """Of a link, or of an engine with all of its peers."""
        earlier = self.before.of(engine.incarnation)
        if earlier is None or engine.report is None:
            return Rates()
        seconds = max(1e-6, engine.at - earlier.at)
        own = link if link is not None else engine.report["total"]
        old = (
            self.before.same(engine, link) if link is not None else (earlier.report or {})["total"]
        )
        pulls, pushes = _change(own, old, "pull"), _change(own, old, "push")
        foreign_in, foreign_out = self._foreign(engine, link)
        operations = pulls["operations"] + pushes["operations"]
        took = pulls["seconds"] + pushes["seconds"]
        return Rates(
            (pulls["bytes"] + foreign_in) / seconds,
            (pushes["bytes"] + foreign_out) / seconds,
            operations / seconds,
            took / operations if operations else None,
        )

    def _foreign(self, engine: Asked, link: Mapping[str, Any] | None) -> tuple[float, float]:
        """Bytes that peers of this host pushed to the engine, and pulled from it."""
        pushed = pulled = 0.0
        for other, theirs in self.now.towards(engine, link):
            if self.before.of(other.incarnation) is None:
                continue
            old = self.before.same(other, theirs)
            pushed += _change(theirs, old, "push")["bytes"]
            pulled += _change(theirs, old, "pull")["bytes"]
        return pushed, pulled


def _links_of(engine: Asked) -> Sequence[Mapping[str, Any]]:
    links: Sequence[Mapping[str, Any]] = (engine.report or {}).get("links", ())
    return links


def _key(link: _Link) -> _Key:
    return link["comm_id"], link["name"], link["cluster_id"]


def _change(now: Mapping[str, Any], old: Mapping[str, Any], direction: str) -> dict[str, float]:
    """What was added; all of it where the counters began anew."""
    was = old.get(direction, {})
    change = {name: value - was.get(name, 0) for name, value in now[direction].items()}
    return dict(now[direction]) if min(change.values()) < 0 else change


def _activity(engine: Asked, moved: _Moved) -> Activity:
    report = engine.report or {}
    links = [_link(engine, each, moved) for each in _links_of(engine)]
    return Activity(
        engine.job, engine.cluster_id, engine.pid, report.get("program") or engine.program,
        report.get("backend", "-"), moved.rates(engine), _pool(report), report.get("grants", 0),
        links, list(_failures(engine, links)), engine.report,
    )  # fmt: skip


def _link(engine: Asked, link: Mapping[str, Any], moved: _Moved) -> LinkActivity:
    broken = link["status"] == "OK" and link["error"]
    return LinkActivity(
        link["name"], link["cluster_id"], link["backend"] or "-",
        "BROKEN" if broken else link["status"], link["error"] or "", moved.rates(engine, link),
        link["pull"]["errors"] + link["push"]["errors"],
    )  # fmt: skip


def _failures(engine: Asked, links: Sequence[LinkActivity]) -> Iterator[str]:
    who = f"cluster {engine.cluster_id}"
    if engine.problem:
        yield f"{who} (pid {engine.pid or 'unknown'}): {engine.problem}"
    for link in links:
        if link.error:
            yield f"{who}, link {link.name} to {link.cluster_id}: {link.state}: {link.error}"
    for text in (engine.report or {}).get("kept", ()):
        yield f"{who}: {text}"
    if left := (engine.report or {}).get("links_left_out"):
        yield f"{who}: {left} more links are not listed"


def _pool(report: Mapping[str, Any]) -> str:
    pools = report.get("pools", {}).values()
    used = sum(pool["pages_used"] * pool["page_bytes"] for pool in pools)
    free = sum(pool["pages_free"] * pool["page_bytes"] for pool in pools)
    for size, unit in UNITS:
        if used + free >= size:
            return f"{used / (used + free):.0%} {(used + free) / size:.0f}{unit}"
    return "-"
