"""Results of workloads: plain data, for JSON, tables and plots."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Series:
    """Seconds of repeated measurements of one thing."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """The smallest."""
        return min(self.seconds)

    @property
    def worst(self) -> float:
        """The largest."""
        return max(self.seconds)

    def add(self, seconds: float) -> None:
        """One more."""
        self.seconds.append(seconds)


def ratio(limit: Series, ours: Series) -> float:
    """Median of limit over ours for each pair of measurements, so that temporary effects cancel out."""
    pairs = zip(limit.seconds, ours.seconds, strict=True)
    return statistics.median(a / b for a, b in pairs)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p1, p10, p50, p90, p99 and the largest."""
    ordered = sorted(seconds)
    marks = {"p1": 0.01, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}
    found = {name: ordered[int(part * (len(ordered) - 1))] for name, part in marks.items()}
    return {**found, "max": ordered[-1]}


@dataclass
class Throughput:
    """A workload of large transfers."""

    workload: str
    title: str
    nbytes: int
    segments: int
    cold: Series
    """Seconds of the first transfer after a link was OK, of one link after another."""
    second: Series
    """The transfer after each of them."""
    warm: Series
    """Transfers over a link that is in use, one before each reference copy."""
    prepare: Series
    """Seconds of a transfer outside the transport."""
    transport: Series
    """Seconds inside."""
    limits: dict[str, Series]
    """Seconds of the reference copies of as many bytes."""
    beside: dict[str, Series]
    """Of ``warm``, the transfer right before each of them."""
    applicable: list[str]
    """The reference copies that can move this memory."""
    cpu_own: float
    """Processor seconds per GiB in the process that called."""
    cpu_peer: float
    """The same in the peer's process."""
    problems: list[str]

    def rate(self, seconds: float) -> float:
        """GB/s of these bytes in that time."""
        return self.nbytes / seconds / 1e9

    def cold_over_second(self) -> float:
        """Time of the first transfer after a link was OK as part of that of the next one."""
        return ratio(self.cold, self.second)

    def ratios(self) -> dict[str, float]:
        """Speed as part of each limit."""
        return {name: ratio(limit, self.beside[name]) for name, limit in self.limits.items()}

    @property
    def limit(self) -> str:
        """The fastest of the reference copies that can move this memory."""
        return min(self.applicable, key=lambda name: self.limits[name].median)

    def to_json(self) -> dict[str, Any]:
        """All of it, with derived figures."""
        return {
            **asdict(self),
            "kind": "throughput",
            "limit": self.limit,
            "of_limit": self.ratios()[self.limit],
            "gb_per_s": self.rate(self.warm.median),
            "cold_over_second": self.cold_over_second(),
            "ratios": self.ratios(),
        }


@dataclass
class Latency:
    """One small transfer after another."""

    workload: str
    seconds: list[float]
    transport: list[float]
    """Seconds inside the transport, measured in separate transfers."""
    copy: list[float]
    """A native copy of as many bytes inside this process; or what ``limit_name`` says."""
    problems: list[str]
    limit_name: str = "local native copy"

    def to_json(self) -> dict[str, Any]:
        """Percentiles, and every measurement."""
        return {
            **asdict(self),
            "kind": "latency",
            "percentiles": percentiles(self.seconds),
            "transport_percentiles": percentiles(self.transport),
        }


@dataclass
class LinkTime:
    """Linking anew, with a pool of ``pool`` bytes at each end."""

    workload: str
    pool: int
    ok: Series
    """Seconds from `link` to OK."""
    first_byte: Series
    """Seconds from `link` until the first transfer has ended."""
    later: Series
    """Seconds of the transfer after that."""
    init: float
    """Seconds of `init`, which is not part of the others."""

    def to_json(self) -> dict[str, Any]:
        """All of it, with medians."""
        return {
            **asdict(self),
            "kind": "link",
            "median_ok": self.ok.median,
            "median_first_byte": self.first_byte.median,
        }


@dataclass
class ScalePoint:
    """One point of a curve."""

    curve: str
    x: int
    seconds: Series
    nbytes: int = 0
    limit: Series | None = None
    prepare: Series | None = None
    limit_name: str = "native copy"

    def to_json(self) -> dict[str, Any]:
        """All of it, with the median."""
        return {**asdict(self), "kind": "scale", "median": self.seconds.median}


@dataclass
class ThreadSpeed:
    """Speed of a Python thread with and without concurrent transfers, in steps per second."""

    workload: str
    alone: list[float]
    beside: list[float]

    def to_json(self) -> dict[str, Any]:
        """All of it, with the part that is kept."""
        return {**asdict(self), "kind": "beside", "kept": self.kept}

    @property
    def kept(self) -> float:
        """Median over rounds of the speed beside transfers over that alone."""
        pairs = zip(self.beside, self.alone, strict=True)
        return statistics.median(a / b for a, b in pairs)


@dataclass
class Parallel:
    """Transfers with one peer at the same time."""

    workload: str
    nbytes: int
    """Of one large transfer."""
    sequential: Series
    """Seconds of two large transfers, one after another."""
    together: Series
    """Seconds until both have ended, begun at the same time."""
    alone: list[float]
    """Seconds of transfers of one block."""
    beside: list[float]
    """The same, of those that ended while a large transfer went on."""
    large: Series
    """Seconds of the large transfers beside them."""
    problems: list[str]

    @property
    def part(self) -> float:
        """Time of two at once as part of that of two one after another."""
        return ratio(self.together, self.sequential)

    def to_json(self) -> dict[str, Any]:
        """All of it, with derived figures."""
        beside = percentiles(self.beside) if self.beside else None
        return {
            **asdict(self),
            "kind": "parallel",
            "part": self.part,
            "alone_percentiles": percentiles(self.alone),
            "beside_percentiles": beside,
        }


@dataclass
class Grants:
    """Requests whose blocks are granted, pulled and taken back."""

    workload: str
    nbytes: int
    """Of one request."""
    live: int
    """Grants that lived at one time for the figures of each."""
    grant: Series = field(default_factory=Series)
    """Seconds of granting."""
    open: Series = field(default_factory=Series)
    """Seconds of pulling the same blocks of an open cache."""
    by_token: Series = field(default_factory=Series)
    """Seconds of pulling with the token of the grant."""
    by_key: Series = field(default_factory=Series)
    """Seconds of pulling with a question to the owner."""
    request: Series = field(default_factory=Series)
    """Seconds from the begin of a pull by token until the owner knows that the grant is consumed."""
    revoke: Series = field(default_factory=Series)
    grant_each: float = 0.0
    revoke_each: float = 0.0
    bytes_each: float = 0.0
    """Memory of the owner's process for each live grant."""
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """All of it, with medians."""
        names = "grant", "open", "by_token", "by_key", "request", "revoke"
        medians = {f"median_{name}": getattr(self, name).median for name in names}
        return {**asdict(self), "kind": "grants", **medians}


@dataclass
class BesideLarge:
    """Small pulls and messages, first alone and then beside large pulls of the same pair."""

    workload: str
    nbytes: int
    """Of one large pull."""
    messages_per_second: float = 0.0
    pulls: list[list[float]] = field(default_factory=list)
    """Seconds of pulls of one block."""
    out: list[list[float]] = field(default_factory=list)
    """Seconds that messages took to the process that does not copy."""
    inward: list[list[float]] = field(default_factory=list)
    """The same, to the process that copies."""
    large: list[float] = field(default_factory=list)
    """Seconds of the large pulls beside them."""

    def to_json(self) -> dict[str, Any]:
        """All of it, with percentiles."""
        kinds = {"pulls": self.pulls, "out": self.out, "inward": self.inward}
        marks = {name: [percentiles(each) for each in both] for name, both in kinds.items()}
        return {**asdict(self), "kind": "small", "percentiles": marks}


Result = (
    Throughput | Latency | LinkTime | ScalePoint | ThreadSpeed | Parallel | Grants | BesideLarge
)
