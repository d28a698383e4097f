"""What an engine keeps of the grants of its peers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from datadist.caches.directory import KeyName
from datadist.control.messages import AskGrant, GrantAnswer, Message
from datadist.grants import messages
from datadist.grants.granted import Granted
from datadist.grants.messages import GrantMessages
from tests.interrupts import meanwhile_anew

MOST = 8
LIMIT = SimpleNamespace(deadline=1e9)
INCARNATION = "0" * 32


class _Owner:
    """The view of a peer that grants every key, and answers at once."""

    def __init__(self) -> None:
        self.incarnation = INCARNATION
        self.session = SimpleNamespace(closed=False, cluster_id=1)
        self.known = GrantMessages(cast("Any", None), cast("Any", None))

    def send(self, message: Message) -> None:
        assert isinstance(message, AskGrant)
        name = KeyName(message.space, message.key, message.model)
        granted = Granted(1, INCARNATION, 2, 0, 0, 1, name, np.array([message.key % 7]))
        answer = GrantAnswer(id=message.id, live=True, token=granted.encode())
        self.known.on_message(cast("Any", self), answer)

    def ask(self, key: int) -> None:
        answered = self.known.ask(cast("Any", self), _name(key), cast("Any", LIMIT))
        assert answered is not None
        assert answered.name == _name(key)

    def keeps(self, key: int) -> bool:
        return self.known.known(cast("Any", self), _name(key)) is not None


def _name(key: int) -> KeyName:
    return KeyName("request", key, 0)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_KNOWN", MOST)


@pytest.mark.usefixtures("few")
def test_the_last_grants_are_kept() -> None:
    owner = _Owner()
    for key in range(3 * MOST):
        owner.ask(key)
    assert [key for key in range(3 * MOST) if owner.keeps(key)] == list(range(2 * MOST, 3 * MOST))


@pytest.mark.usefixtures("few")
def test_one_asks_while_another_one_drops_the_oldest() -> None:
    def prepare() -> _Owner:
        owner = _Owner()
        for key in range(MOST):
            owner.ask(key)
        return owner

    for where, owner in meanwhile_anew(
        prepare, lambda each: each.ask(100), lambda each: each.ask(200)
    ):
        assert owner.keeps(100), where
        assert owner.keeps(200), where
        assert MOST - 3 <= sum(map(owner.keeps, range(MOST))) <= MOST - 2, where
