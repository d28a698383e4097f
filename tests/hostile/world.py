"""Three honest members at work, in turns beside a hostile one and beside one that only computes.

The hostile process takes a processor whatever the engines do, so what it does to them shows against one
that takes a processor too. The rounds alternate, since nobody else on the machine stays as he is.
"""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datadist import BlocksCacheKey, Cache, CacheDesc, CacheKey, DataType
from tests import hosts, netcopy, nodes
from tests.hostile import attack
from tests.hostile.member import Target
from tests.nodes import Here, Node, RemoteError
from tests.tcp_server import KEY

CLUSTERS = (1, 2, 3)
MAPPING = {1: 0, 2: 1, 3: 2}
PATIENCE = 90.0
"""Seconds after which a call is said to hang; `link` may take 30 by itself."""
KNOWN_PULLS, NEW_PULLS = 20, 5
DESC = CacheDesc(2, [8, 256], DataType.DT_INT32)


@dataclass
class Seen:
    """What a run of one behaviour showed."""

    times: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Seconds of each operation."""
    failures: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    """Why sessions ended at honest members, numbers taken out, and why links failed."""
    joined: int = 0
    steps: int = 0


class World:
    """Honest members on ``wire`` ("shm" or "tcp") in directories below ``place``."""

    def __init__(self, place: Path, wire: str, ports: list[int]) -> None:
        self._stack = ExitStack()
        self._place, self._wire = place, wire
        self._far = wire == "tcp"
        if self._far:
            netcopy.publish(place)
        self._table_port, *listen = ports
        self.nodes = {c: self._start(c, p) for c, p in zip(CLUSTERS, listen, strict=True)}
        self.targets = [
            Target(c, str(self._directory(c)), p if self._far else 0)
            for c, p in zip(CLUSTERS, listen, strict=True)
        ]
        self.hostile = self._node(4)
        self.quiet, self.seen = Seen(), Seen()
        self._now = self.quiet
        """What is written to: of the rounds beside the one that computes, or beside the hostile one."""
        self._stuck = False
        """Whether a call of an honest member did not return: then nothing more can be asked of it."""

    def _directory(self, cluster: int) -> Path:
        return self._place / (f"run{cluster}" if self._far else "run")

    def _node(self, cluster: int) -> Node:
        directory = self._directory(cluster)
        directory.mkdir(mode=0o700, exist_ok=True)
        environ = {"DATADIST_RUNTIME_DIR": str(directory), "DATADIST_AUTH_KEY": KEY.decode()}
        node = Node(environ)
        self._stack.callback(node.close)
        return node

    def _start(self, cluster: int, port: int) -> Node:
        node = self._node(cluster)
        if self._far:
            node.do(netcopy.install, str(self._place))
        return node

    def _settings(self, port: int) -> dict[str, Any]:
        if not self._far:
            return {}
        return {"transfer_backend": "netcopy", "listen_ip_info": f"127.0.0.1:{port}"}

    def run(self, names: list[str], rounds: int, until: str = "") -> tuple[Seen, Seen]:
        """Work for so many rounds of either kind, each from `init` to `finalize`: what they showed.

        Beside the hostile member none is finalized before it has ended a session with that reason.
        """
        for number in range(2 * rounds):
            if not self._stuck:
                self._now = self.seen if number % 2 else self.quiet
                self._whole_round(number, names, until)
        return self.quiet, self.seen

    def _whole_round(self, number: int, names: list[str], until: str) -> None:
        for target in self.targets:
            self.nodes[target.cluster].do(_init, target.cluster, self._settings(target.port))
        hostile = self._now is self.seen
        self.hostile.do(attack.begin, self.targets, names if hostile else [])
        self._round(number)
        if not self._stuck:
            if hostile and until:
                self._together("disconnected", _shown_out, until)
            self._together("finalize", _finalize)
        joined, steps = self.hostile.do(attack.end)
        self._now.joined += sum(joined.values())
        self._now.steps += sum(steps.values())
        for node in () if self._stuck else self.nodes.values():
            self._now.reasons += node.do(_reasons)

    def _round(self, number: int) -> None:
        ids = self._together("link", _link, f"trio {number}", self._table())
        if ids is None:
            return
        for puller, owner in ((2, 1), (3, 2), (1, 3)):
            self._pulls(number, puller, owner)
        self._together("unlink", _unlink, ids)

    def _table(self) -> str:
        if self._far:
            return hosts.table(["127.0.0.1"] * 3, host_port=str(self._table_port))
        return nodes.table_for(MAPPING)

    def _together(self, what: str, function: Any, *args: Any) -> dict[int, Any] | None:
        """All three do something at once, each with its own of a dict; None where one failed."""
        for cluster, node in self.nodes.items():
            own = [a[cluster] if isinstance(a, dict) else a for a in args]
            node.begin(function, *own)
        found: dict[int, Any] = {}
        for cluster, node in self.nodes.items():
            try:
                seconds, found[cluster] = node.result(PATIENCE)
                self._now.times[what].append(seconds)
            except (RemoteError, TimeoutError) as error:
                self._failed(f"{what} at cluster {cluster}", error)
        return found if len(found) == len(self.nodes) else None

    def _pulls(self, number: int, puller: int, owner: int) -> None:
        try:
            self.nodes[owner].do(_publish, owner, number, NEW_PULLS)
            for what, seconds in self.nodes[puller].do(_pull, owner, number, timeout=PATIENCE):
                self._now.times[what].append(seconds)
        except (RemoteError, TimeoutError) as error:
            self._failed(f"pull of cluster {owner} at cluster {puller}", error)

    def _failed(self, what: str, error: Exception) -> None:
        self._now.failures.append(f"{what}: {error}")
        self._stuck = self._stuck or isinstance(error, TimeoutError)

    def close(self) -> None:
        """End all processes."""
        self._stack.close()


# -- functions that run in nodes ---------------------------------------------------------------


def _init(here: Here, cluster: int, settings: dict[str, Any]) -> None:
    nodes.init(here, cluster, sync_kv_timeout=30_000, **settings)
    manager = here.live.cache_manager
    here.caches["into"] = manager.allocate_cache(DESC)
    here.caches["blocks"] = manager.allocate_blocks_cache(DESC)
    known = here.caches["known"] = manager.allocate_blocks_cache(DESC, BlocksCacheKey(cluster, 0))
    for array in known.numpy():
        array[:] = -cluster


def _link(here: Here, name: str, table: str) -> tuple[float, int]:
    began = time.monotonic()
    comm_id = nodes.link(here, name, MAPPING, table)
    try:
        here.live.wait_link(comm_id)
    except Exception as error:
        why = here.live.link_error(comm_id)
        here.live.unlink(comm_id)
        raise RuntimeError(f"{error}; link_error: {why}") from error
    return time.monotonic() - began, comm_id


def _unlink(here: Here, comm_id: int) -> tuple[float, None]:
    began = time.monotonic()
    here.live.unlink(comm_id)
    return time.monotonic() - began, None


def _finalize(here: Here) -> tuple[float, None]:
    began = time.monotonic()
    here.caches.clear()
    here.any.clear()
    here.live.finalize()
    return time.monotonic() - began, None


def _key(number: int, each: int) -> int:
    return 1 + number * NEW_PULLS + each


def _publish(here: Here, cluster: int, number: int, count: int) -> None:
    """New caches with new keys; those of the round before go."""
    manager = here.live.cache_manager
    for cache in here.any.pop("new", ()):
        manager.deallocate_cache(cache)
    here.any["new"] = []
    for each in range(count):
        cache = manager.allocate_cache(DESC, [CacheKey(cluster, _key(number, each))])
        for array in cache.numpy():
            array[:] = _key(number, each)
        here.any["new"].append(cache)


def _pull(here: Here, owner: int, number: int) -> list[tuple[str, float]]:
    """Pull new keys, which the owner has to be asked for, and one that is known; checks the bytes."""
    manager, found = here.live.cache_manager, []
    for each in range(NEW_PULLS):
        key, into = _key(number, each), here.caches["into"]
        began = time.monotonic()
        manager.pull_cache(CacheKey(owner, key), into)
        found.append(("pull, new key", time.monotonic() - began))
        _check(into, key)
    for _ in range(KNOWN_PULLS):
        began = time.monotonic()
        manager.pull_blocks(BlocksCacheKey(owner, 0), here.caches["blocks"], [0, 2], [1, 3])
        found.append(("pull, known key", time.monotonic() - began))
    for array in here.caches["blocks"].numpy():
        assert (array[[1, 3]] == -owner).all(), "wrong bytes"
    return found


def _check(cache: Cache, value: int) -> None:
    """The slot that a key names, which is the first."""
    for array in cache.numpy():
        assert (array[0] == value).all(), "wrong bytes"


def _shown_out(here: Here, reason: str) -> tuple[float, None]:
    began = time.monotonic()
    while not any("session with" in line and reason in line for line in here.log):
        if time.monotonic() - began > PATIENCE / 2:
            raise RuntimeError(f"no session ended with: {reason}")
        time.sleep(0.01)
    return time.monotonic() - began, None


def _reasons(here: Here) -> Counter[str]:
    """Those since the last question."""
    ends = (re.search(r"session with .*?(?:ended)?: (.*)", line) for line in here.log)
    reasons = Counter(re.sub(r"\d+", "N", found.group(1))[:90] for found in ends if found)
    here.log.clear()
    return reasons
