"""The cases: which fault hits which end of a transfer, and what the living ends must see of it.

The *mover* calls pull or push (a reader or a writer). The *owner* has the memory at the other end (the
owner of what is pulled, or the target of what is pushed).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

End = Literal["mover", "owner"]
Move = Literal["pull", "push"]
ENDS: tuple[End, ...] = ("mover", "owner")


@dataclass(frozen=True)
class Case:
    """One fault. What was stopped is continued later, and a cable that is down comes up again."""

    name: str
    move: Move
    killed: End | None = None
    stopped: End | None = None
    cable: bool = False
    """The cable of the owner's host is down."""

    @property
    def times_out(self) -> bool:
        """Whether the call of the mover ends by its own time limit, and the link may go on."""
        return self.killed is None and not self.cable

    @property
    def living(self) -> tuple[End, ...]:
        """The ends that are not killed."""
        return tuple(end for end in ENDS if end != self.killed)

    @property
    def statuses(self) -> tuple[str, ...]:
        """What calls at the living ends may raise."""
        return ("LLM_TIMEOUT",) if self.times_out else ("LLM_FAILED", "LLM_NOT_YET_LINK")

    @property
    def lasts(self) -> bool:
        """Whether the fault goes on after the error: then it is ended later."""
        return self.times_out or self.cable


CASES = (
    Case("pull-timeout", "pull", stopped="owner"),
    Case("push-timeout", "push", stopped="owner"),
    Case("reader-killed", "pull", killed="mover"),
    Case("owner-killed", "pull", killed="owner"),
    Case("writer-killed", "push", killed="mover"),
    Case("target-killed", "push", killed="owner"),
    Case("reader-killed-owner-stopped", "pull", killed="mover", stopped="owner"),
    Case("owner-killed-reader-stopped", "pull", killed="owner", stopped="mover"),
    Case("writer-killed-target-stopped", "push", killed="mover", stopped="owner"),
    Case("target-killed-writer-stopped", "push", killed="owner", stopped="mover"),
    Case("pull-cable-down", "pull", cable=True),
    Case("push-cable-down", "push", cable=True),
)
BY_NAME = {case.name: case for case in CASES}
