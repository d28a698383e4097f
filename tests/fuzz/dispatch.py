"""What a live engine does with messages in any order, from members and from raw peers.

An input is a program (see :mod:`tests.fuzz.choices`) that up to three peers follow, over real sockets.
Once it has ended and they are gone, the engine must be as it was before, and serve an honest peer.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
import threading
import time
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from datadist import CacheKeyByIdAndIndex, LLMException, LLMStatusCode
from datadist.control.hostport import HostPort
from datadist.control.messages import HEADER
from datadist.control.runtime_dir import Address
from datadist.links.clusters import Call
from datadist.rank_table import parse_rank_table
from tests import nodes
from tests.fuzz.choices import Choices, changed
from tests.fuzz.templates import NOTICE, TEMPLATES
from tests.in_process_engine import BASE, GUARD, PAIR, SIZE, TABLE, Engine, entry_of, offer_of
from tests.raw_peer import RawPeer, link, memory

SECONDS = 50.0
STEPS = 40
"""Of one input."""
OTHER = {2: 0, 1: 1}
"""A domain that a peer forms."""
ACTORS = 3
MAX_MEMORIES = 3
BINDING = {"id": 1, "slot": 0, "space": "request", "key": 5, "model": 0}
STEADY = (1 << 33) + 7
"""Cluster of a member that stays."""
UNKNOWN = "0" * 32
"""The token of no domain."""
LEFT = (
    "it closed the connection",
    "ended: it said goodbye",
    "reset by peer",
    "needs it",
    "connected again",
)
"""Why sessions end of peers that were not disconnected."""


class Actor:
    """A peer: what it has heard that it can refer to."""

    def __init__(self, number: int) -> None:
        self.cluster = 2 + number
        self.raw_peer: RawPeer | None = None
        self.token = UNKNOWN
        self.asked: dict[str, Any] = {}
        """The last wish of the engine: an announcement, or a dial."""

    def listen(self) -> None:
        """Note what has come."""
        for message in self.raw_peer.heard() if self.raw_peer is not None else ():
            if message.kind in ("announce", "dial"):
                self.asked = message.model_dump()
            elif message.kind == "form":
                self.token = message.domain

    def close(self) -> None:
        """Hang up."""
        if self.raw_peer is not None:
            self.raw_peer.close()
        self.raw_peer = None


class Dispatch:
    """The target: call it with an input."""

    def __init__(self, place: Path) -> None:
        self.engine = Engine(place, sync_kv_timeout=20)
        core = self.engine.api._engine
        assert core is not None
        self._core = core
        self._incarnation = core._discovery.address.incarnation
        self._number = 0
        self._steady_id, self._steady_token = 0, UNKNOWN
        self._raised: list[str] = []
        self._hook = threading.excepthook
        threading.excepthook = lambda args: self._raised.append(repr(args.exc_value))
        self._descriptors: int | None = None
        self._actors = self._new_actors()
        self._at_rest = dict.fromkeys(self._held(), 0)
        self._serve_member()  # starts what is started at the first link
        self._until_at_rest()
        self._link_steady()
        self._at_rest = {name: len(there) for name, there in self._held().items()}
        self._descriptors = len(os.listdir("/proc/self/fd"))

    @staticmethod
    def _new_actors() -> list[Actor]:
        return [Actor(number) for number in range(ACTORS)]

    def close(self) -> None:
        """Finalize."""
        with ExitStack() as stack:
            stack.callback(setattr, threading, "excepthook", self._hook)
            stack.callback(self.engine.close)
            stack.callback(self._steady.close)
            for actor in self._actors:
                stack.callback(actor.close)

    def __call__(self, data: bytes) -> bool:
        """Whether no peer was disconnected. Raises where the engine has suffered."""
        self.engine.log.clear()
        self._actors = self._new_actors()
        choices = Choices(data)
        for _ in range(STEPS):
            if choices.over:
                break
            step = choices.byte()
            OPERATIONS[step % 16](self, self._actors[step // 16 % ACTORS], choices)
        self._settle()
        welcome = all(any(text in line for text in LEFT) for line in self.engine.ends())
        self._rest()
        self._serve_raw_peer()
        self._serve_steady()
        if zlib.crc32(data) % 8 == 0:
            self._serve_member()
        self._until_at_rest()
        self._check_log()
        return welcome

    # -- what peers do -------------------------------------------------------------------------

    def _at(self, actor: Actor) -> RawPeer:
        """Its connection; one that has none introduces itself first."""
        if actor.raw_peer is None:
            self.come(actor)
        assert actor.raw_peer is not None
        return actor.raw_peer

    def come(self, actor: Actor, choices: Choices | None = None, hello: bool = True) -> None:
        """Connect as another engine than before, most often of a cluster of its own."""
        actor.close()
        self._number += 1
        clusters = [actor.cluster, 2, 2, 3, 1, actor.cluster]
        cluster = choices.pick(clusters) if choices is not None else clusters[0]
        actor.token, actor.asked = UNKNOWN, {}
        actor.raw_peer = self.engine.raw_peer(self._number, hello, cluster)
        self.engine._strangers.remove(actor.raw_peer)

    def come_silently(self, actor: Actor, _choices: Choices) -> None:
        """Connect without a word."""
        self.come(actor, hello=False)

    def say(self, actor: Actor, choices: Choices) -> None:
        """A message that makes sense, at a time that may make none."""
        self._send(actor, self._message(actor, choices))

    def say_changed(self, actor: Actor, choices: Choices) -> None:
        """One that may make none."""
        names = [self._incarnation, self._steady_token, *(other.token for other in self._actors)]
        self._send(actor, changed(self._message(actor, choices), choices, names))

    def say_of_another(self, actor: Actor, choices: Choices) -> None:
        """A message about a domain of which the peer is no member."""
        message = self._message(actor, choices)
        if "domain" in message:
            message["domain"] = self._steady_token
        self._send(actor, message)

    def babble(self, actor: Actor, choices: Choices) -> None:
        """Bytes."""
        self._at(actor).send(choices.take(1 + choices.byte() % 64))

    def hang_up(self, actor: Actor, _choices: Choices) -> None:
        """Go."""
        actor.close()

    def settle(self, _actor: Actor, _choices: Choices) -> None:
        """Let everything be handled that was said before, and hear what is answered."""
        self._settle()

    def _message(self, actor: Actor, choices: Choices) -> dict[str, Any]:
        message = dict(choices.pick([*TEMPLATES, NOTICE]))
        raw_peer, kind = self._at(actor), message["kind"]
        if "domain" in message:
            message["domain"] = actor.token
        if kind == "hello":
            message["incarnation"] = raw_peer.incarnation
        elif kind == "offer":
            message |= {"data": offer_of(), "fds": 1, "regions": [1]}
        elif kind == "directory":
            message["upsert"] = [entry_of(bindings=[BINDING])]
        elif kind == "form":
            actor.token = message["domain"] = f"{self._number:032x}"
            message["members"] = self._members(actor)
        elif kind in ("refused", "mismatch"):
            message["link"] = actor.asked.get("link", 1)
        elif kind in ("fetch", "verify"):
            own = _packed(self.engine.cache.numpy()[0].ctypes.data)
            places = {"source": _packed(BASE), "target": own, "address": own, "length": _packed(64)}
            message |= {name: place for name, place in places.items() if name in message}
        return message

    def _members(self, actor: Actor) -> list[dict[str, Any]]:
        """Who a domain consists of that answers the engine's last wish; a pair has its own order."""
        raw_peer, link_id = self._at(actor), actor.asked.get("link", 1)
        members: list[dict[str, Any]] = [
            {"cluster_id": raw_peer.cluster, "incarnation": raw_peer.incarnation, "link": 1},
            {"cluster_id": 1, "incarnation": self._incarnation, "link": link_id},
        ]
        if actor.asked.get("kind") == "dial":
            members.reverse()
        return [{"rank": rank, **member} for rank, member in enumerate(members)]

    def _send(self, actor: Actor, message: dict[str, Any]) -> None:
        data, count = message.get("data"), message.get("fds")
        if message["kind"] == "notice":
            text = str(data).encode(errors="replace")
            self._at(actor).send(HEADER.pack(1 + len(text)) + b"\0" + text)
            return
        if message["kind"] == "offer" and not isinstance(data, str):
            message = {**message, "data": b64encode(json.dumps(data).encode()).decode()}
        fds = [memory(SIZE) for _ in range(count if count in range(MAX_MEMORIES) else 0)]  # type: ignore[arg-type]
        with suppress(UnicodeEncodeError):
            self._at(actor).say(message, fds)
        for fd in fds:
            os.close(fd)

    # -- what the engine's user does -------------------------------------------------------------

    def wait_for_pair(self, _actor: Actor, _choices: Choices) -> None:
        """Wait for a peer in a domain that this engine forms."""
        self._link("pair", PAIR)

    def wait_for_other(self, _actor: Actor, _choices: Choices) -> None:
        """Wait for a peer in a domain that the peer forms."""
        self._link("other", OTHER)

    def _link(self, name: str, ranks: dict[int, int]) -> None:
        if len(self._core._links.domains) < 5:
            self.engine.api.link(name, ranks, nodes.table_for(ranks))
            self._settle()

    def ask(self, actor: Actor, _choices: Choices) -> None:
        """Ask a peer for a link of the two, as `link_clusters` does."""
        raw_peer = self._at(actor)
        self._settle()
        session = self._core._discovery.sessions.get(raw_peer.incarnation)
        cluster = raw_peer.cluster if session is None else session.cluster_id  # what it said
        found = Address(cluster, raw_peer.incarnation)
        with mock.patch.object(self._core._discovery, "find", return_value=found):
            call = Call(HostPort("127.0.0.1", 1), time.monotonic() + 5.0)
            self._core._call(lambda: self._core._clusters.dial(call))
        self._settle()

    def unlink(self, _actor: Actor, _choices: Choices) -> None:
        """Leave every domain."""
        for comm_id in list(self._core._links.domains):
            if comm_id != self._steady_id:
                self.engine.api.unlink(comm_id)

    def pull(self, actor: Actor, choices: Choices) -> None:
        """Pull a slot that may be there."""
        self._settle()
        key = CacheKeyByIdAndIndex(self._at(actor).cluster, 1, choices.byte() % 3)
        with suppress(LLMException):
            self.engine.api.cache_manager.pull_cache(key, self.engine.cache)

    # -- what must hold --------------------------------------------------------------------------

    def _turn(self) -> None:
        """All that had arrived is handled: twice, since a turn may have begun before; and accepting."""
        for _ in range(3):
            self._core._reactor.call(lambda: None, SECONDS)

    def _settle(self) -> None:
        self._turn()
        deadline = time.monotonic() + 1.0
        while any(attempt.jobs for attempt in list(self._core._builder._unclosed)):
            if time.monotonic() > deadline:
                break
            time.sleep(0.0002)
        self._turn()
        self._core._reactor.call(self._check_state, SECONDS)
        for actor in self._actors:
            actor.listen()

    def _check_state(self) -> None:
        """While peers are there: links are with those whom the user named, sessions are known."""
        core = self._core
        for domain in core._builder._active.values():
            members = domain.attempt.members if domain.attempt is not None else {}
            clusters = {member.cluster_id: rank for rank, member in members.items()}
            assert clusters in ({}, dict(domain.ranks)), f"{domain} consists of {clusters}"
            for member in members.values():
                view = core.views.get(member.incarnation)
                assert view is None or view.session.cluster_id == member.cluster_id, f"{member}"
        for incarnation, view in core.views.items():
            assert core._discovery.sessions.get(incarnation) is view.session, (
                f"a stale {view.session}"
            )
            assert view.seq_acked <= view.seq_sent, "acknowledged before it was sent"

    def _rest(self) -> None:
        """Everybody goes, and everything is unlinked."""
        for actor in self._actors:
            actor.close()
        self._turn()
        clusters = list(self._core._clusters.pairs)
        if clusters:
            infos = [nodes.cluster_info(cluster, 1) for cluster in clusters]
            self.engine.api.unlink_clusters(infos, 1000, force=True)
        self.unlink(self._actors[0], Choices(b""))

    def _link_steady(self) -> None:
        """Link with a member that stays, whatever the others say."""
        ranks = {1: 0, STEADY: 1}
        table = nodes.table_for(ranks)
        self._steady, fd = self.engine.raw_peer((1 << 64) + 1, cluster=STEADY), memory(SIZE)
        self._steady_id = self.engine.api.link("steady", ranks, table)
        canonical = parse_rank_table(table).canonical
        token = link(self._steady, "steady", ranks, canonical, offer_of(), [fd])
        assert token is not None
        self._steady_token = token
        os.close(fd)
        self.engine.api.wait_link(self._steady_id)
        self._steady.say({"kind": "directory", "seq": 1, "reset": True, "upsert": [entry_of()]})
        self._serve_steady()

    def _serve_steady(self) -> None:
        """The member that stays is linked still, and its bytes arrive."""
        self._steady.say({"kind": "sync", "id": 7})
        assert self._steady.hear("synced") is not None, "a member was cut off"
        self._pull(STEADY)

    def _pull(self, cluster: int) -> None:
        for array in self.engine.cache.numpy():
            array[:] = GUARD
        key = CacheKeyByIdAndIndex(cluster, 1, 0)
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                self.engine.api.cache_manager.pull_cache(key, self.engine.cache)
                break
            except LLMException as error:
                # The time of one pull is short, for those who never answer.
                if (
                    error.status_code is not LLMStatusCode.LLM_TIMEOUT
                    or time.monotonic() > deadline
                ):
                    raise AssertionError(f"an honest member is lost: {error}") from None
        assert all((array == 0).all() for array in self.engine.cache.numpy()), "wrong bytes"

    def _held(self) -> dict[str, Any]:
        """What the engine holds of peers."""
        core, discovery, builder = self._core, self._core._discovery, self._core._builder
        return {
            "sessions": discovery.sessions, "handshakes": discovery._handshakes,
            "holds": discovery._holds,
            "idle": discovery._idle, "idle peers": discovery._peer_idle, "views": core.views,
            "domains": core._links.domains, "pairs": core._clusters.pairs,
            "attempts": builder._active, "taken": builder._taken, "dropped": builder._dropped,
            "unclosed": builder._unclosed, "revocations": core.owned.revocations._waiting,
        }  # fmt: skip

    def left(self) -> dict[str, Any]:
        """What the engine holds of peers that have gone."""
        held = self._held()
        return {n: repr(there)[:300] for n, there in held.items() if len(there) != self._at_rest[n]}

    def _until_at_rest(self) -> None:
        deadline = time.monotonic() + SECONDS
        while left := self._core._reactor.call(self.left, SECONDS):
            assert time.monotonic() < deadline, f"not let go of: {left}"
            time.sleep(0.0005)
        for array in self.engine.cache.numpy():
            assert np.isin(array, (0, GUARD)).all(), "bytes that no peer has"
            array[:] = GUARD
        known = self._descriptors
        while known is not None and len(os.listdir("/proc/self/fd")) > known:
            assert time.monotonic() < deadline, f"descriptors were not closed: {_open_files()}"
            time.sleep(0.0005)

    def _check_log(self) -> None:
        bad = [line for line in self.engine.log if "report it" in line or "defect" in line]
        assert not bad, "\n".join(bad)
        assert not self._raised, self._raised

    def _serve_raw_peer(self) -> None:
        """An honest peer is answered."""
        self._number += 1
        other = self.engine.raw_peer(self._number, cluster=9)
        try:
            assert other.hear("hello") is not None, "an honest peer was not answered"
            other.say({"kind": "sync", "id": 7})
            assert other.hear("synced") is not None, "an honest peer was not served"
        finally:
            other.close()
            self.engine._strangers.remove(other)

    def _serve_member(self) -> None:
        """An honest member is linked with, and its bytes arrive."""
        self._number += 1
        member, fd = self.engine.raw_peer(self._number), memory(SIZE)
        try:
            comm_id = self.engine.api.link("pair", PAIR, nodes.table_for(PAIR))
            assert link(member, "pair", PAIR, TABLE, offer_of(), [fd]), "no domain was formed"
            self.engine.api.wait_link(comm_id)
            member.say({"kind": "directory", "seq": 1, "reset": True, "upsert": [entry_of()]})
            member.say({"kind": "sync", "id": 7})
            assert member.hear("synced") is not None
            self._pull(2)
        finally:
            os.close(fd)
            member.close()
            self.engine._strangers.remove(member)
        self.engine.api.unlink(comm_id)


def _open_files() -> list[str]:
    """What the descriptors of this process lead to."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return sorted(found)


def _packed(number: int) -> str:
    return b64encode(struct.pack("<q", number)).decode()


Operation = Callable[[Dispatch, Actor, Choices], None]
OPERATIONS: list[Operation] = [
    Dispatch.say, Dispatch.say, Dispatch.say_of_another, Dispatch.say_changed, Dispatch.say_changed,
    Dispatch.say_changed, Dispatch.babble, Dispatch.come, Dispatch.come_silently, Dispatch.hang_up,
    Dispatch.settle, Dispatch.wait_for_pair, Dispatch.wait_for_other, Dispatch.ask, Dispatch.unlink,
    Dispatch.pull,
]  # fmt: skip
"""By the low four bits of a step; its peer is in the others."""


@contextmanager
def dispatch() -> Iterator[Callable[[bytes], bool]]:
    """The target, with an engine as long as it is needed."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="datadist-")))
        stack.enter_context(mock.patch.dict(os.environ))
        made = Dispatch(place)
        stack.callback(made.close)
        yield made
