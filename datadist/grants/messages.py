"""What this engine knows of the grants of its peers, asks of them, and tells them.

A grant is asked for once and kept while it lives, as far as we know. Releases are sent in batches: those
that were made until the control thread comes to it travel in one message.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import islice
from typing import Any, Protocol

from datadist.caches.directory import KeyName
from datadist.caches.owned import describe
from datadist.caches.peers import PeerView
from datadist.caches.requests import Request, Requests, no_answer
from datadist.control.messages import (
    MAX_RELEASES,
    AskGrant,
    CheckGrant,
    GrantAnswer,
    Message,
    ReleaseGrants,
)
from datadist.grants.granted import Granted
from datadist.grants.owner import OwnGrants
from datadist.status import LLMException, LLMStatusCode

__all__ = ["GrantMessages"]

MAX_KNOWN = 1 << 12
"""Grants of peers that are kept; the oldest ones are asked for again."""


class TimeLimit(Protocol):
    """The time that a call has, and its name as text."""

    deadline: float
    """By time.monotonic."""


class GrantMessages:
    """Both ends of the questions about grants.

    Asking and releasing is for any thread, the rest for the reactor.
    """

    def __init__(self, own: OwnGrants, post: Callable[[Callable[[], None]], object]) -> None:
        self._own = own
        self._post = post
        self._requests: Requests[GrantAnswer] = Requests()
        self._known: OrderedDict[tuple[str, KeyName], Granted] = OrderedDict()
        """By the owner's incarnation and the key; threads drop the oldest one in one step of C."""
        self._finished: deque[tuple[PeerView, int | KeyName]] = deque()
        """To be sent: generations, and keys of grants that were not asked for."""
        self._sending = False

    # -- asking ------------------------------------------------------------------------------

    def known(self, view: PeerView, name: KeyName) -> Granted | None:
        """What the owner answered before."""
        return self._known.get((view.incarnation, name))

    def forget(self, view: PeerView, name: KeyName) -> None:
        """It has ended, or is of no use any more."""
        self._known.pop((view.incarnation, name), None)

    def ask(self, view: PeerView, name: KeyName, limit: TimeLimit) -> Granted | None:
        """The grant of a key, from its owner; None where the key names none.

        What the owner published before has arrived by then. Raises LLM_TIMEOUT when it does not
        answer, LLM_NOT_YET_LINK when it is gone, LLM_FAILED for an answer that makes no sense.
        """
        assert name.space != "blocks"
        space = name.space
        answer = self._ask(
            view, limit, f"whether it grants {describe(name)}",
            lambda number: AskGrant(id=number, space=space, key=name.key, model=name.model),
        )  # fmt: skip
        if not answer.live:
            self.forget(view, name)
            return None
        granted = self._decode(view, name, answer.token)
        self._known[view.incarnation, name] = granted
        with suppress(KeyError):  # other threads have dropped some
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        return granted

    @staticmethod
    def _decode(view: PeerView, name: KeyName, token: bytes) -> Granted:
        cluster = view.session.cluster_id
        try:
            granted = Granted.decode(token)
            if (granted.incarnation, granted.name) != (view.incarnation, name):
                raise ValueError("it is about another grant")
        except ValueError as error:
            raise LLMException(
                f"the answer of cluster {cluster} about the grant of {describe(name)} makes no sense: "
                f"{error}",
                status_code=LLMStatusCode.LLM_FAILED,
            ) from error
        return granted

    def is_live(self, view: PeerView, generation: int, limit: TimeLimit) -> bool:
        """Whether a grant lives at its owner, after all that was read before. Raises as :meth:`ask`."""
        answer = self._ask(
            view, limit, "whether the grant lives",
            lambda number: CheckGrant(id=number, generation=generation),
        )  # fmt: skip
        return answer.live

    def _ask(
        self, view: PeerView, limit: TimeLimit, what: str, make: Callable[[int], Message]
    ) -> GrantAnswer:
        cluster = view.session.cluster_id

        def wait(request: Request[GrantAnswer]) -> GrantAnswer:
            answer = request.wait(limit.deadline)
            if answer is not None:
                return answer
            raise no_answer(cluster, request.over.is_set(), limit, what)

        return self._requests.ask(view, make, wait)

    # -- releasing ---------------------------------------------------------------------------

    def release(self, view: PeerView, grant: int | KeyName, at_once: bool = False) -> None:
        """Tell the owner soon that we have finished with a grant: its generation, or its key.

        ``at_once``: before whatever the caller sends it next.
        """
        if at_once:
            _send(view, [grant])
            return
        self._finished.append((view, grant))
        try:
            if not self._sending:
                self._sending = True
                self._post(self._send_releases)
        except BaseException:  # of the handler of a signal: nobody else would post it
            self._post(self._send_releases)
            raise

    def _send_releases(self) -> None:
        self._sending = False
        by_view: dict[PeerView, list[int | KeyName]] = {}
        while self._finished:
            view, grant = self._finished.popleft()
            by_view.setdefault(view, []).append(grant)
        for view, grants in by_view.items():
            for part in _parts(grants):
                _send(view, part)

    # -- messages of peers -------------------------------------------------------------------

    def on_message(self, view: PeerView, message: Message) -> bool:
        """Whether it was one of these messages."""
        match message:
            case AskGrant():
                self._on_ask(view, message)
            case CheckGrant():
                number = message.id
                self._own.checked(
                    message.generation,
                    lambda live: view.send(GrantAnswer(id=number, live=live and view.subscribed)),
                )
            case GrantAnswer():
                self._requests.answer(view, message.id, message)
            case ReleaseGrants():
                if view.subscribed:
                    names = [KeyName(*key) for key in message.keys]
                    self._own.released(view.incarnation, message.generations, names)
            case _:
                return False
        return True

    def _on_ask(self, view: PeerView, message: AskGrant) -> None:
        """Only peers that are linked, or about to be, hear of grants."""

        def answer(token: bytes) -> None:
            live = bool(token)
            view.send(GrantAnswer(id=message.id, live=live, token=token))

        if not view.subscribed:
            answer(b"")
            return
        name = KeyName(message.space, message.key, message.model)
        self._own.asked(view.incarnation, name, answer)

    def on_gone(self, view: PeerView) -> None:
        """A peer's session is over."""
        self._own.lost(view.incarnation)
        for key in [key for key in list(self._known) if key[0] == view.incarnation]:
            self._known.pop(key, None)
        self._requests.on_gone(view)


def _send(view: PeerView, grants: list[int | KeyName]) -> None:
    numbers = [grant for grant in grants if not isinstance(grant, tuple)]
    names: list[Any] = [grant for grant in grants if isinstance(grant, tuple)]
    view.send(ReleaseGrants(generations=numbers, keys=names))


def _parts(grants: Iterable[int | KeyName]) -> Iterable[list[int | KeyName]]:
    rest = iter(grants)
    while part := list(islice(rest, MAX_RELEASES)):
        yield part
