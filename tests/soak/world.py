"""The world of a soak: processes, links, and what happens next, all from one seed."""

from __future__ import annotations

import contextlib
import hashlib
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import nodes
from tests.nodes import Node, RemoteError
from tests.soak import interrupts, work
from tests.soak.comparing import Compared, Difference, missing
from tests.soak.resources import Usage, leaks, usage

CLUSTERS = 8
STEADY = (1, 5)
"""These live as long as the soak: in them a leak adds up."""
REST_EVERY = 25
"""Steps after which everything is unlinked and measured."""
SETTLE_SECONDS = 0.3
TWO_SIDED = range(1, 5)
"""These clusters pull only; the others may push, too. Links stay within a group."""
EXPECTED = {"OK", "LLM_NOT_YET_LINK", "LLM_FAILED", "LLM_TIMEOUT"}
"""How a pull may end whose owner is killed or stopped meanwhile."""
WEIGHTS = {
    "start": 4, "link": 10, "pull": 20, "pull_blocks": 15, "push": 10, "hand_over": 8, "unlink": 5,
    "kill": 1, "kill_in_pull": 1, "kill_in_push": 1, "stop_in_pull": 2, "cut": 1, "finalize": 1,
    "interrupt_pull": 6, "interrupt_push": 3, "interrupt_allocate": 4, "interrupt_link": 3,
    "call_in_handler": 3,
}  # fmt: skip
FIRST: list[tuple[str, Any]] = [
    ("start", 1), ("start", 2), ("link", [1, 2]), ("pull", (1, 2)), ("pull_blocks", (2, 1)),
    ("hand_over", (1, 2)), ("stop_in_pull", (1, 2)),
    ("start", 5), ("start", 6), ("link", [5, 6]), ("push", (5, 6)),
    ("interrupt_pull", (2, 1)), ("interrupt_push", (6, 5)), ("interrupt_allocate", 1),
    ("call_in_handler", (1, 2)),
]  # fmt: skip
"""Every soak begins with a transfer of each kind, however short it is."""


@dataclass
class Sample:
    """Resources of all processes at one moment."""

    seconds: float
    each: list[Usage]


@dataclass
class Totals:
    """What a soak did and found."""

    steps: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    moments: list[tuple[float, str]] = field(default_factory=list)
    """When each fault began, and its kind."""
    compared: defaultdict[str, Compared] = field(default_factory=lambda: defaultdict(Compared))
    """By kind of transfer."""
    problems: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    latencies: list[tuple[float, str, float]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    rests: defaultdict[str, list[Usage]] = field(default_factory=lambda: defaultdict(list))
    """By process."""

    @property
    def wrong(self) -> int:
        """Bytes that were lost or wrong."""
        return sum(found.wrong for found in self.compared.values())

    @property
    def failed(self) -> bool:
        """Whether anything was found."""
        return bool(self.wrong or self.problems or self.leaks)


@dataclass
class Live:
    """A running process."""

    node: Node
    seed: int
    requests: int = 0


class World:
    """Call :meth:`step` as often as you like, then :meth:`end`."""

    def __init__(self, seed: int, runtime_dir: Path) -> None:
        self.seed = seed
        self._random = random.Random(seed)
        self._environ = {"DATADIST_RUNTIME_DIR": str(runtime_dir)}
        self._runtime_dir = runtime_dir
        self._live: dict[int, Live] = {}
        self._links: dict[str, tuple[int, ...]] = {}
        self._names = 0
        self._seeds = 0
        self._first = [step for step in FIRST if step[0] in WEIGHTS]
        self._digest = hashlib.sha256()
        self._began = time.monotonic()
        self.totals = Totals()
        self.over = False
        """Whether something happened after which nothing more can be done."""

    @property
    def digest(self) -> str:
        """Equal for equal sequences of steps."""
        return self._digest.hexdigest()[:12]

    def step(self) -> None:
        """Do the next thing that is possible."""
        name, chosen = self._first.pop(0) if self._first else self._choose()
        self._digest.update(f"{name} {chosen}\n".encode())
        self.totals.steps[name] += 1
        self._attempt(f"{name} {chosen}", lambda: getattr(self, f"_{name}")(chosen))
        if not self.over and self.totals.steps.total() % REST_EVERY == 0:
            self._attempt("rest", self._rest)
        self._sample()

    def _choose(self) -> tuple[str, Any]:
        possible = {name: choices for name in WEIGHTS if (choices := self._choices(name))}
        name = self._random.choices(list(possible), [WEIGHTS[name] for name in possible])[0]
        return name, self._random.choice(possible[name])

    def _attempt(self, what: str, act: Callable[[], None]) -> None:
        """Do something; what goes wrong is the end, since nothing that follows would tell more."""
        try:
            act()
        except (RemoteError, OSError, EOFError, AssertionError) as error:
            self.over = True  # OSError: a process that is gone (BrokenPipeError), or hangs
            gone = [f"cluster {c}" for c, live in self._live.items() if not live.node.is_alive]
            ended = f"; ended by itself: {', '.join(gone)}" if gone else ""
            self._problem(what, f"{type(error).__name__}: {error}{ended}")

    def _problem(self, what: str, why: str) -> None:
        step = self.totals.steps.total()
        self.totals.problems.append(f"seed {self.seed}, step {step}, {what}: {why}")

    def _choices(self, name: str) -> list[Any]:
        if name == "start":
            return [c for c in range(1, CLUSTERS + 1) if c not in self._live]
        if name in ("link", "interrupt_link"):
            groups = [list(TWO_SIDED), [c for c in range(1, CLUSTERS + 1) if c not in TWO_SIDED]]
            live = [[c for c in group if c in self._live] for group in groups]
            return [group for group in live if len(group) > 1] if len(self._links) < 12 else []
        if name in ("kill", "finalize"):
            return [c for c in self._live if c not in STEADY] if len(self._live) > 3 else []
        if name == "unlink":
            return list(self._links)
        if name == "interrupt_allocate":
            return list(self._live)
        pairs = sorted({(a, b) for m in self._links.values() for a in m for b in m if a != b})
        if name in ("push", "kill_in_push", "interrupt_push"):
            pairs = [pair for pair in pairs if pair[0] not in TWO_SIDED]
        if name in ("kill_in_pull", "kill_in_push"):
            pairs = [pair for pair in pairs if pair[1] not in STEADY]
        if name == "hand_over":  # pulls consume request keys in two-sided mode only
            return [pair for pair in pairs if pair[0] in TWO_SIDED]
        return pairs

    # -- steps -------------------------------------------------------------------------------

    def _start(self, cluster: int) -> None:
        self._seeds += 1
        seed = 100 + self._seeds
        live = self._live[cluster] = Live(Node(self._environ), seed)
        live.node.do(work.start, cluster, cluster not in TWO_SIDED, seed)

    def _link(self, group: list[int], interrupted: bool = False) -> None:
        size = self._random.randint(2, min(4, len(group)))
        members = sorted(self._random.sample(group, size))
        self._names += 1
        name = f"link {self._names}"
        mapping = {cluster: rank for rank, cluster in enumerate(members)}
        first = members[:1] if interrupted else []
        for cluster in first:
            self._live[cluster].node.do(interrupts.link, name, mapping, *self._moment(3e-3))
        for cluster in members[len(first) :]:
            self._live[cluster].node.begin(work.link, name, mapping)
        for cluster in first:
            self._live[cluster].node.begin(interrupts.wait, name)
        self._gather("link", members)
        self._links[name] = tuple(members)

    def _gather(self, what: str, members: list[int] | tuple[int, ...]) -> None:
        for cluster in members:
            self._late(what, self._live[cluster].node.result())

    def _pull(self, pair: tuple[int, int]) -> None:
        puller, owner = pair
        slot = self._random.randrange(work.SLOTS)
        self._moved("pull", puller, work.pull, owner, self._live[owner].seed, slot)

    def _pull_blocks(self, pair: tuple[int, int]) -> None:
        puller, owner = pair
        count = self._random.randint(1, work.BLOCKS)
        source, target = (self._random.sample(range(work.BLOCKS), count) for _ in range(2))
        seed = self._live[owner].seed
        self._moved("pull_blocks", puller, work.pull_blocks, owner, seed, source, target)

    def _push(self, pair: tuple[int, int]) -> None:
        pusher, target = pair
        slot = self._random.randrange(8)
        self._late("push", self._live[pusher].node.do(work.push, target, slot))
        found = self._live[target].node.do(work.check_inbox, self._live[pusher].seed, slot)
        self._compared("push", found)

    def _hand_over(self, pair: tuple[int, int]) -> None:
        puller, owner = pair
        giver = self._live[owner]
        giver.requests += 1
        before = giver.node.do(work.pages_used)
        giver.node.do(work.hand_over, owner, giver.requests, giver.seed)
        arguments = (owner, giver.requests, giver.seed)
        self._moved("hand_over", puller, work.take_over, *arguments)
        deadline = time.monotonic() + nodes.SECONDS
        while (after := giver.node.do(work.pages_used)) != before and time.monotonic() < deadline:
            time.sleep(0.01)
        if after != before:
            self.totals.leaks.append(f"cluster {owner}: {after - before} pages did not return")

    def _moved(self, what: str, cluster: int, function: Callable[..., Any], *args: Any) -> None:
        seconds, found = self._live[cluster].node.do(function, *args)
        self._late(what, seconds)
        self._compared(what, found)

    def _compared(self, what: str, found: Difference) -> None:
        self.totals.compared[what].add(found)

    def _unlink(self, name: str) -> None:
        members = self._links.pop(name)
        for cluster in members:
            self._live[cluster].node.begin(work.unlink, name)
        self._gather("unlink", members)

    # -- faults ------------------------------------------------------------------------------

    def _kill(self, cluster: int) -> None:
        self._fault("killed")
        node = self._live.pop(cluster).node
        node.kill()
        node.close()
        self._forget(cluster)

    def _forget(self, cluster: int) -> None:
        """The others notice, and unlink what the dead was a member of."""
        for name, members in list(self._links.items()):
            if cluster in members:
                del self._links[name]
                for other in members:
                    if other in self._live:
                        self._late("lost", self._live[other].node.do(work.lost, name))
                        self._live[other].node.do(work.unlink, name)

    def _kill_in_pull(self, pair: tuple[int, int]) -> None:
        puller, owner = pair
        self._begin_torn(pair)
        self._kill_other(owner, "killed during a pull", "kill_in_pull", puller)

    def _kill_in_push(self, pair: tuple[int, int]) -> None:
        pusher, target = pair
        slot, seed = self._random.randrange(8), self._live[pusher].seed
        self._live[pusher].node.begin(work.torn_push, target, slot, seed)
        time.sleep(self._random.random() * 0.004)
        self._kill_other(target, "killed during a push", "kill_in_push", pusher)

    def _kill_other(self, cluster: int, fault: str, what: str, mover: int) -> None:
        self._fault(fault)
        node = self._live.pop(cluster).node
        node.kill()
        node.close()
        self._end_torn(what, mover)
        self._forget(cluster)

    def _cut(self, pair: tuple[int, int]) -> None:
        """Cut the connection of two members: their links break, on both sides."""
        self._fault("connection cut")
        self._live[pair[0]].node.do(work.cut, pair[1])
        for name, members in list(self._links.items()):
            if set(pair) <= set(members):
                del self._links[name]
                for cluster in pair:
                    self._late("lost", self._live[cluster].node.do(work.lost, name))
                for cluster in members:
                    self._live[cluster].node.do(work.unlink, name)

    def _stop_in_pull(self, pair: tuple[int, int]) -> None:
        puller, owner = pair
        self._begin_torn(pair)
        self._fault("stopped during a pull")
        self._live[owner].node.pause()
        time.sleep(0.2)
        self._live[owner].node.resume()
        self._end_torn("stop_in_pull", puller)
        source = self._live[owner]
        self._compared("stop_in_pull", source.node.do(work.check_own, source.seed))

    def _begin_torn(self, pair: tuple[int, int]) -> None:
        puller, owner = pair
        slot = self._random.randrange(work.SLOTS)
        self._live[puller].node.begin(work.torn, owner, self._live[owner].seed, slot)
        time.sleep(self._random.random() * 0.004)

    def _end_torn(self, what: str, mover: int) -> None:
        status, found = self._live[mover].node.result()
        self._compared(what, found)
        if status not in EXPECTED:
            self._problem("a transfer whose other end was harmed", f"it ended with {status}")

    def _interrupt_pull(self, pair: tuple[int, int]) -> None:
        """A signal handler raises in a pull; the next pull is whole."""
        puller, owner = pair
        self._fault("interrupted in a pull")
        source, slot = self._live[owner].seed, self._random.randrange(work.SLOTS)
        torn, whole = self._live[puller].node.do(
            interrupts.pull, owner, source, slot, *self._moment(1e-3)
        )
        self.totals.compared["interrupt_pull"].wrong += torn.wrong
        self._compared("interrupt_pull", whole)

    def _interrupt_push(self, pair: tuple[int, int]) -> None:
        pusher, target = pair
        self._fault("interrupted in a push")
        slot, seed = self._random.randrange(8), self._live[pusher].seed
        self._live[pusher].node.do(interrupts.push, target, slot, *self._moment(1e-3))
        self._compared("interrupt_push", self._live[target].node.do(work.check_inbox, seed, slot))
        self._compared("interrupt_push", self._live[pusher].node.do(work.check_own, seed))

    def _interrupt_link(self, group: list[int]) -> None:
        """A signal handler raises in a member's call, which it repeats."""
        self._fault("interrupted in a link")
        self._link(group, interrupted=True)

    def _moment(self, longest: float) -> tuple[float, int]:
        """Seconds until a signal, and which exception its handler raises."""
        return self._random.random() * longest, self._random.randrange(len(interrupts.KINDS))

    def _interrupt_allocate(self, cluster: int) -> None:
        self._fault("interrupted in allocations", interrupts.ROUNDS)
        seed = self._random.randrange(1 << 31)
        kept = self._live[cluster].node.do(interrupts.allocate, seed)
        if kept:
            self.totals.leaks.append(f"cluster {cluster}: {kept} pages of interrupted allocations")

    def _call_in_handler(self, pair: tuple[int, int]) -> None:
        """A signal handler calls the engine in a pull."""
        puller, owner = pair
        self._fault("called in a signal handler")
        seed, slot = self._live[owner].seed, self._random.randrange(work.SLOTS)
        found, bad = self._live[puller].node.do(
            interrupts.handled, owner, seed, slot, self._random.random() * 1e-3
        )
        self._compared("call_in_handler", found)
        for line in bad:
            self._problem("a call in a signal handler", line)

    def _finalize(self, cluster: int) -> None:
        self._fault("finalized with live links")
        self._end_node(cluster)
        self._forget(cluster)

    # -- the end -----------------------------------------------------------------------------

    def _rest(self) -> None:
        """Unlink everything and measure what is left."""
        for name in list(self._links):
            self._unlink(name)
        time.sleep(SETTLE_SECONDS)
        for cluster, live in self._live.items():
            who = f"cluster {cluster} (pid {live.node.pid})"
            self.totals.rests[who].append(usage(live.node.pid))

    def end(self) -> None:
        """Unlink and finalize everything, and look for what was left behind."""
        if not self.over:
            self._attempt("end", self._end)
        if not self.over:
            for line in missing(WEIGHTS, self.totals.steps, self.totals.compared):
                self._problem("verifying", line)
        self.totals.leaks += leaks(self.totals.rests)

    def _end(self) -> None:
        self._rest()
        for cluster in list(self._live):
            self._end_node(cluster)
        crashed = (".sock", ".claim")  # names of processes that were killed: an init sweeps them
        left = [path.name for path in self._runtime_dir.iterdir() if path.suffix not in crashed]
        self.totals.leaks += [f"left in the runtime directory: {name}" for name in left]

    def _end_node(self, cluster: int) -> None:
        node = self._live.pop(cluster).node
        left = node.do(work.end)
        node.close()
        for line in left.pop("defects"):
            self._problem(f"cluster {cluster}", line)
        self.totals.leaks += [f"cluster {cluster}: {what} {n}" for what, n in left.items() if n]

    def close(self) -> None:
        """End every process, whatever happened."""
        with contextlib.ExitStack() as stack:
            for live in self._live.values():
                stack.callback(live.node.close)

    # -- measuring ---------------------------------------------------------------------------

    def _fault(self, kind: str, count: int = 1) -> None:
        self.totals.faults[kind] += count
        self.totals.moments.append((time.monotonic() - self._began, kind))

    def _late(self, what: str, seconds: float) -> None:
        self.totals.latencies.append((time.monotonic() - self._began, what, seconds))

    def _sample(self) -> None:
        each = []
        for live in self._live.values():
            with contextlib.suppress(OSError):  # it has ended by itself, which is found elsewhere
                each.append(usage(live.node.pid))
        self.totals.samples.append(Sample(time.monotonic() - self._began, each))
