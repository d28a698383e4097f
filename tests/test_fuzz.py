"""The targets of the fuzzer, without it: good inputs are accepted, changed ones end as documented.

Live targets are not blind: with a defect put in, few changed inputs are enough.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datadist.caches.peers import Announcements, PeerView
from datadist.caches.requests import Requests
from datadist.control.channel import Handshake, HandshakeError, Seal, Seals
from datadist.control.messages import Message
from datadist.control.remote import Remote
from datadist.control.session import Session
from datadist.engine.inbox import Inbox
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
@settings(deadline=None, max_examples=200)
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
    real = Inbox._on_message

    def noting(self: Inbox, session: Session, message: Message, fds: list[int]) -> None:
        handled.add(message.kind)
        real(self, session, message, fds)

    monkeypatch.setattr(Inbox, "_on_message", noting)
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


def _unknown_domain(self: Builder, view: PeerView, token: str) -> None:
    attempt = self._active[token].attempt
    assert attempt is not None


def _unknown_request(self: Requests[Any], view: PeerView, number: int, answer: Any) -> None:
    self._open[number].over.set()


def _unknown_wish(self: Announcements, link: int) -> None:
    raise KeyError(link)


def _kept_session(self: Builder, view: PeerView, reason: str, orderly: bool) -> None:
    """Forgets the attempts of who is gone."""


def _silence(self: Inbox, view: PeerView, message: Message) -> bool:
    """Handles nothing."""
    return True


def _any_proof(self: Handshake, secret: bytes, received: bytes) -> bytes:
    seal = Seal(secret)
    self.seals = Seals(seal, seal)
    return bytes(32)


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


def _out_of_turn(self: Remote, session: Session, reason: str, met: Any = None) -> None:
    raise KeyError(session)


Defect = tuple[str, type, str, Callable[..., Any]]


def _any_members(self: Builder, domain: Domain, token: str, members: dict[int, Any]) -> None:
    """Takes those whom a peer names; here it names itself as another cluster."""
    members = {rank: each.model_copy(update={"cluster_id": 7}) for rank, each in members.items()}
    attempt = domain.attempt = Attempt(token, domain.rank, sorted(members), members)
    self._unclosed.add(attempt)
    self._meet(domain, attempt)


def _anybody(self: Builder, view: PeerView, token: str, reason: str, final: bool) -> None:
    """Ends a domain for whoever asks."""
    domain = self._active.get(token)
    if domain is not None:
        self._dissolve(domain, reason)


DEFECTS: dict[str, Defect] = {
    "a handler that does not know a domain": ("dispatch", Builder, "on_ready", _unknown_domain),
    "a handler that does not know a request": ("dispatch", Requests, "answer", _unknown_request),
    "a handler that does not know a wish": ("dispatch", Announcements, "give_up", _unknown_wish),
    "a peer that stays when it has gone": ("dispatch", Builder, "on_lost", _kept_session),
    "members that nobody wants": ("dispatch", Builder, "begin", _any_members),
    "a stranger who ends a link of others": ("dispatch", Builder, "_on_end", _anybody),
    "an engine that is deaf": ("dispatch", Inbox, "_on_directory", _silence),
    "any proof will do, at a listener": ("network", Handshake, "_on_proof", _any_proof),
    "any MAC will do, at a listener": ("network", Seal, "check", _any_mac),
    "a frame is taken again, at a listener": ("network", Seal, "check", _same_count),
    "nobody gets in, at a listener": ("network", Handshake, "_check_greeting", _no_greeting),
    "hanging up fails": ("network", Remote, "_part", _out_of_turn),
    "any proof will do": ("handshake", Handshake, "_on_proof", _any_proof),
    "any MAC will do": ("handshake", Seal, "check", _any_mac),
    "a frame is taken again": ("handshake", Seal, "check", _same_count),
    "nobody gets in": ("handshake", Handshake, "_check_greeting", _no_greeting),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_that_is_put_in_is_found(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, owner, attribute, instead = DEFECTS[defect]
    for module in ("dispatch", "network"):
        monkeypatch.setattr(f"tests.fuzz.{module}.SECONDS", 2.0)
    with opened(name) as target:
        monkeypatch.setattr(owner, attribute, instead)
        try:
            assert _is_found(target, [*SEEDS[name], *REFUSED[name], *_inputs(name, 2, 300)])
        finally:
            monkeypatch.undo()


def _is_found(target: Callable[[bytes], bool], inputs: list[bytes]) -> bool:
    for data in inputs:
        try:
            target(data)
        except (AssertionError, TimeoutError, HandshakeError):
            return True
    return False
