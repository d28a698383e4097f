"""The targets of the fuzzer, without it: good inputs are accepted, changed ones end as documented.

Live targets are not blind: with a defect put in, few changed inputs are enough.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datadist.caches.peers import Announcements, PeerView
from datadist.caches.requests import Requests
from datadist.control.channel import Handshake, HandshakeError, Seal, _mac
from datadist.control.messages import Message, Ready
from datadist.control.network_discovery import NetworkDiscovery
from datadist.control.session import Session
from datadist.engine.dispatcher import Dispatcher
from datadist.links.building import Builder
from datadist.links.domain import Attempt, Domain
from tests.fuzz.seeds import REFUSED, SEEDS
from tests.fuzz.targets import LIVE, NAMES, TARGETS, opened
from tests.fuzz.templates import KINDS


def test_every_target_has_seeds() -> None:
    assert set(SEEDS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_good_inputs_are_accepted(name: str) -> None:
    with opened(name) as target:
        for seed in SEEDS[name]:
            assert target(seed), seed


@pytest.mark.parametrize("name", REFUSED)
def test_bad_inputs_are_refused(name: str) -> None:
    with opened(name) as target:
        for seed in REFUSED[name]:
            assert not target(seed), seed


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=200)
@given(data=st.data())
def test_changed_inputs_do_no_harm(name: str, data: st.DataObject) -> None:
    seed = bytearray(data.draw(st.sampled_from(SEEDS[name])))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(seed)))
        removed = data.draw(st.integers(0, 6))
        seed[at : at + removed] = data.draw(st.binary(max_size=6))
    TARGETS[name](bytes(seed))


# -- what runs -------------------------------------------------------------------------------


def _inputs(name: str, seed: int, count: int) -> list[bytes]:
    """Seeds, some of whose bytes are changed, inserted or taken out."""
    dice, made = random.Random(seed), []
    for _ in range(count):
        data = bytearray(dice.choice(SEEDS[name] + REFUSED[name]))
        for _ in range(dice.randint(1, 4)):
            at = dice.randint(0, len(data))
            data[at : at + dice.randint(0, 3)] = dice.randbytes(dice.randint(0, 3))
        made.append(bytes(data))
    return made


@pytest.mark.parametrize("name", LIVE)
def test_changed_inputs_leave_what_runs_as_it_was(name: str) -> None:
    with opened(name) as target:
        for data in _inputs(name, 1, 150):
            target(data)


def test_inputs_reach_every_handler_and_every_end(monkeypatch: pytest.MonkeyPatch) -> None:
    handled: set[str] = set()
    real = Dispatcher._on_message

    def noting(self: Dispatcher, session: Session, message: Message, fds: list[int]) -> None:
        handled.add(message.kind)
        real(self, session, message, fds)

    monkeypatch.setattr(Dispatcher, "_on_message", noting)
    said: set[str] = set()
    with opened("dispatch") as target:
        for seed in SEEDS["dispatch"]:
            target(seed)
            said.update(target.engine.log)  # type: ignore[attr-defined]
    assert set(KINDS) - {"hello", "welcome", "idle", "goodbye"} <= handled
    for text in (
        "linked rank 0 with cluster 2", "linked rank 1 with cluster 2", "linked with cluster 2",
        "cluster 2 has unlinked", "cluster 2 is gone", "waiting again: why", "cluster 2 reported: why",
        "the peer gave up", "FAILED: why",
    ):  # fmt: skip
        assert any(text in line for line in said), text


# -- defects that are put in -----------------------------------------------------------------


def _unknown_domain(self: Builder, view: PeerView, message: Ready) -> None:
    attempt = self._active[message.domain].attempt
    assert attempt is not None


def _unknown_request(self: Requests[Any], view: PeerView, number: int, answer: Any) -> None:
    self._open[number].over.set()


def _unknown_wish(self: Announcements, link: int) -> None:
    raise KeyError(link)


def _kept_session(self: Builder, view: PeerView, reason: str, orderly: bool) -> None:
    """Forgets the attempts of who is gone."""


def _silence(self: Dispatcher, view: PeerView, message: Message) -> bool:
    """Handles nothing."""
    return True


_checked_proof = Handshake._on_proof


def _any_proof(self: Handshake, secret: bytes, received: bytes) -> bytes:
    theirs = b"listener's proof" if self.dialled else b"dialler's proof"
    return _checked_proof(self, secret, _mac(secret, theirs))


def _any_mac(self: Seal, frame: bytes, tag: bytes) -> bool:
    self.next(frame)
    return True


def _same_count(self: Seal, frame: bytes, tag: bytes) -> bool:
    """Takes a frame again and again."""
    import hmac

    count = self._count
    found = any(
        hmac.compare_digest(Seal.next(_at(self, number), frame), tag) for number in range(count + 1)
    )
    self._count = count + 1
    return found


def _at(seal: Seal, number: int) -> Seal:
    made = Seal(seal._key)
    made._count = number
    return made


def _no_greeting(self: Handshake) -> None:
    raise HandshakeError("on purpose")


def _out_of_turn(self: NetworkDiscovery, session: Session, reason: str, met: Any = None) -> None:
    raise KeyError(session)


def _any_members(self: Builder, domain: Domain, token: str, members: dict[int, Any]) -> None:
    """Takes those whom a peer names; here it names itself as another cluster."""
    members = {rank: each.model_copy(update={"cluster_id": 7}) for rank, each in members.items()}
    attempt = domain.attempt = Attempt(token, domain.rank, sorted(members), members)
    self._unclosed.add(attempt)
    self._connect_members(domain, attempt)


def _anybody(self: Builder, view: PeerView, token: str, reason: str, final: bool) -> None:
    """Ends a domain for whoever asks."""
    domain = self._active.get(token)
    if domain is not None:
        self._dissolve(domain, reason)


class Defect(NamedTuple):
    """What is put in, and what names it: the message of the invariant that it breaks."""

    target: str
    owner: type
    attribute: str
    instead: Callable[..., Any]
    message: str


UNEXPECTED = r"please report it \(defect: KeyError: "
TAKEN = r"'\] were taken, "
FRAME = r"frame \d: taken=True genuine=False"
GOT_IN = r"end.inside=True untouched=False|a stranger without the key got in"
DEFECTS = {
    "a handler that does not know a domain": Defect(
        "dispatch", Builder, "on_ready", _unknown_domain, UNEXPECTED + "'0{32}'"
    ),
    "a handler that does not know a request": Defect(
        "dispatch", Requests, "answer", _unknown_request, UNEXPECTED + r"\d"
    ),
    "a handler that does not know a wish": Defect(
        "dispatch", Announcements, "withdraw", _unknown_wish, UNEXPECTED + r"\d"
    ),
    "a peer that stays when it has gone": Defect(
        "dispatch", Builder, "on_lost", _kept_session,
        "descriptors were not closed: .*memfd:raw_peer",
    ),
    "members that nobody wants": Defect(
        "dispatch", Builder, "begin", _any_members, r"consists of \{7: \d\}"
    ),
    "a stranger who ends a link of others": Defect(
        "dispatch", Builder, "_on_end", _anybody, r"an honest member is lost: .*it was unlinked just now"
    ),
    "an engine that is deaf": Defect(
        "dispatch", Dispatcher, "_on_directory", _silence, "an honest peer was not served"
    ),
    "any proof will do, at a listener": Defect(
        "network", Handshake, "_on_proof", _any_proof, "got in, untouched: False"
    ),
    "any MAC will do, at a listener": Defect("network", Seal, "check", _any_mac, TAKEN),
    "a frame is taken again, at a listener": Defect("network", Seal, "check", _same_count, TAKEN),
    "nobody gets in, at a listener": Defect(
        "network", Handshake, "_check_greeting", _no_greeting, "an honest peer was refused: .*on purpose"
    ),
    "hanging up fails": Defect(
        "network", NetworkDiscovery, "_hang_up", _out_of_turn, UNEXPECTED + "Session"
    ),
    "any proof will do": Defect("handshake", Handshake, "_on_proof", _any_proof, GOT_IN),
    "any MAC will do": Defect("handshake", Seal, "check", _any_mac, FRAME),
    "a frame is taken again": Defect("handshake", Seal, "check", _same_count, FRAME),
    "nobody gets in": Defect(
        "handshake", Handshake, "_check_greeting", _no_greeting, "the right key did not get in"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_that_is_put_in_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    defect = DEFECTS[name]
    for module in ("fuzz.dispatch", "fuzz.network", "raw_peer"):
        monkeypatch.setattr(f"tests.{module}.SECONDS", 2.0)
    inputs = [*SEEDS[defect.target], *REFUSED[defect.target], *_inputs(defect.target, 2, 300)]
    with opened(defect.target) as target:
        monkeypatch.setattr(defect.owner, defect.attribute, defect.instead)
        try:
            assert _is_found(target, inputs, defect.message)
        finally:
            monkeypatch.undo()


def _is_found(target: Callable[[bytes], bool], inputs: list[bytes], message: str) -> bool:
    """Whether an input breaks this invariant; others may break on a busy machine, without a defect."""
    for data in inputs:
        try:
            target(data)
        except (AssertionError, TimeoutError) as error:
            if re.search(message, str(error)):
                return True
    return False


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError("the control thread did not answer in 2.0 s"),
        AssertionError("not let go of: {'sessions': '{}'}"),
        AssertionError("descriptors were not closed: ['/dev/null']"),
        AssertionError("an honest peer was not answered: []"),
    ],
)
def test_a_limit_that_passes_finds_no_defect(error: Exception) -> None:
    def target(data: bytes) -> bool:
        raise error

    for defect in DEFECTS.values():
        assert not _is_found(target, [b"an input"], defect.message)
