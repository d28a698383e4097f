"""How often and how long a communicator tries to meet its peers."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest
from datadist_hccl import abi, communicator
from datadist_hccl.acl import Device
from datadist_hccl.communicator import SLICE_SECONDS, SPARE_ATTEMPTS, Closed, Communicator
from datadist_hccl.memory import Memory
from datadist_hccl.one_sided import Hccl, HcclError

from datadist.transport import LinkError
from tests.interrupts import raising_anew

DEADLINE = 1000.0


class Library:
    """An HCCL whose attempts fail, on a clock that moves with its attempts and pauses only."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int, quick: bool) -> None:
        self.now = 0.0
        self.attempts: list[int] = []
        """The seconds of each."""
        self._code = code
        self._quick = quick
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=self._sleep)
        monkeypatch.setattr(communicator, "time", clock)

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def prepare(self, _handle: int, seconds: int) -> None:
        """Fail, at once or when the time is over."""
        self.attempts.append(seconds)
        self.now += 0.01 if self._quick else seconds
        raise HcclError("HcclCommPrepare", self._code, "")

    def communicator(self) -> Communicator:
        """One that was made."""
        device = cast("Device", SimpleNamespace(hold=lambda: None))
        made: Any = Communicator(device, cast("Hccl", self), cast("Memory", None), "link")
        made._handle = 1
        return cast("Communicator", made)


@pytest.mark.parametrize("attempts", [1, 3])
def test_attempts_that_fail_at_once_are_counted(
    monkeypatch: pytest.MonkeyPatch, attempts: int
) -> None:
    library = Library(monkeypatch, abi.HCCL_INTERNAL, quick=True)
    with pytest.raises(LinkError, match="HCCL did not meet all ranks"):
        library.communicator().prepare(DEADLINE, attempts, lambda: False)
    assert len(library.attempts) == attempts + SPARE_ATTEMPTS
    assert library.now < 10


@pytest.mark.parametrize("code", sorted(communicator.NOT_RETRYABLE))
def test_what_another_attempt_would_not_change_is_tried_once(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    library = Library(monkeypatch, code, quick=True)
    with pytest.raises(LinkError):
        library.communicator().prepare(DEADLINE, 5, lambda: False)
    assert len(library.attempts) == 1


@pytest.mark.parametrize("code", [abi.HCCL_TIMEOUT, abi.HCCL_INTERNAL])
def test_peers_that_come_late_are_waited_for_until_the_deadline(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """In attempts that become longer, up to a limit, and do not go beyond it."""
    library = Library(monkeypatch, code, quick=False)
    with pytest.raises(LinkError):
        library.communicator().prepare(DEADLINE, 1, lambda: False)
    assert DEADLINE <= library.now < DEADLINE + 1
    assert library.attempts[:5] == [1, 2, 4, 8, SLICE_SECONDS]
    assert max(library.attempts) == SLICE_SECONDS


def test_a_link_that_is_not_wanted_any_more_is_given_up_after_the_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = Library(monkeypatch, abi.HCCL_TIMEOUT, quick=False)
    with pytest.raises(Closed):
        library.communicator().prepare(DEADLINE, 1, lambda: len(library.attempts) == 3)
    assert len(library.attempts) == 3


def _unused_communicator() -> Communicator:
    device: Any = SimpleNamespace(hold=lambda: None, drop=lambda: None, bound=nullcontext)
    nothing: Any = SimpleNamespace()
    return Communicator(device, nothing, nothing, "link")


def test_what_a_handler_raises_leaves_nobody_inside() -> None:
    moments = 0
    for where, made in raising_anew(_unused_communicator, lambda made: made.use(lambda _: None)):
        moments += 1
        assert made.close(0.0), where
    assert moments > 3


def test_who_comes_out_last_ends_what_was_closed_meanwhile() -> None:
    made, ended = _unused_communicator(), list[str]()
    made._device.drop = lambda: ended.append("dropped")  # type: ignore[method-assign]
    made.use(lambda _: made.close(0.0))
    assert ended == ["dropped"]
    with pytest.raises(Closed):
        made.use(lambda _: None)
    assert ended == ["dropped"], "once"
