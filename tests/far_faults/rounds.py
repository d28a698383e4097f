"""One round of a case: the fault in the middle of a transfer, and everything that must hold after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import nodes
from tests.far_faults import ends
from tests.far_faults.cases import Case, End
from tests.far_faults.place import CLUSTERS, WHO, Place, Who, place
from tests.far_faults.settings import (
    PEER_TIMEOUT,
    QUARANTINE_MARGIN,
    STOPPED_SECONDS,
    SYNC_SECONDS,
    WATCH_SECONDS,
    Setting,
    error_limit,
)
from tests.nodes import RemoteError

TRIES = 3
"""So often a transfer may have ended before the fault came; nothing is found out by such a round."""
GRACE = 5.0
"""Until a process that is late is asked no more; what is late is wrong all the same."""
FAILURES = (RemoteError, TimeoutError, EOFError, OSError, AssertionError)
"""What a process answers, or that it does not."""


class Missed(Exception):
    """The transfer had ended before the fault came."""


class Died(Exception):
    """A process ended that nobody has killed."""


@dataclass
class Outcome:
    """What a round has found."""

    case: Case
    setting: Setting
    findings: list[str] = field(default_factory=list)
    """What was wrong; nothing where the round was right."""
    error_seconds: float = 0.0
    """Until the last living end saw the fault; of a time-out, since the call began."""
    quarantine_seconds: float = 0.0
    """From the first error until all memory was in use again."""


def run(case: Case, setting: Setting, evidence: Path) -> Outcome:
    """A round; what was wrong is described in files of that directory, which is made."""
    evidence.mkdir(parents=True, exist_ok=True)
    for _ in range(TRIES):
        outcome = Outcome(case, setting)
        with place(setting, case.move, evidence) as here:
            try:
                Round(here, outcome).run()
            except Missed:
                continue
            except Died as error:
                outcome.findings.append(str(error))
            except FAILURES as error:
                outcome.findings.append(f"the round did not go on: {type(error).__name__} {error}")
            if outcome.findings:
                here.write_evidence(outcome.findings)
            return outcome
    return Outcome(case, setting, [f"{TRIES} transfers ended before the fault came"])


class Round:
    """The steps, in the order of :meth:`run`."""

    def __init__(self, here: Place, outcome: Outcome) -> None:
        self._here = here
        self._outcome = outcome
        self._case = outcome.case
        self._links: dict[Who, int] = {}
        self._struck = 0.0
        self._called = 0.0
        self._first_error = 0.0
        self._lifted = 0.0
        """When a fault that lasts was ended; 0 before."""

    def run(self) -> None:
        """Everything."""
        self._begin_transfer()
        self._strike()
        self._see_error_of_mover()
        if self._case.lasts and self._outcome.setting.quick:
            self._lift()
        else:
            self._see_error_of_owner()
        early = ("mover",) if self._lasts else self._case.living
        self._use_again(early)
        if self._lasts:
            self._lift()
            self._use_again([end for end in self._case.living if end not in early])
        self._see_reused()
        time.sleep(WATCH_SECONDS)
        self._check_memory()
        self._work_again()
        self._check_memory()
        self._end()

    @property
    def _lasts(self) -> bool:
        """Whether the fault goes on: the owner is stopped, or cannot be reached."""
        return self._case.lasts and not self._lifted

    def _use_again(self, living: Sequence[End]) -> None:
        """Have these ends use their memory again, and work with others meanwhile."""
        for end in living:
            seconds = self._quarantine_limit() - time.monotonic() + GRACE
            self._here.nodes[end].do(ends.begin_reuse, self._outcome.setting.memory, seconds)
        for end in living:
            self._try(f"the {end} with a third engine", self._exchange, end, "third")

    def _wrong(self, text: str) -> None:
        self._outcome.findings.append(text)

    def _try(self, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Make a call; what it raises is a finding, and the round goes on if every process lives.

        Raises :class:`Died`.
        """
        try:
            return call(*arguments)
        except FAILURES as error:
            self._wrong(f"{what}: {type(error).__name__} {error}")
        time.sleep(GRACE / 10)  # the end of a process is known a moment after that of its pipe
        for who, node in self._here.nodes.items():
            if who != self._case.killed and not node.is_alive:
                raise Died(f"the {who} has ended by itself, exit code {node.exit_code}")
        return None

    # -- the fault -------------------------------------------------------------------------------

    def _begin_transfer(self) -> None:
        case, here = self._case, self._here.nodes
        source: End = "owner" if case.move == "pull" else "mover"
        ids: dict[Who, int] = {}
        for who in WHO:
            content = ends.SOURCE if who == source else ends.BEFORE
            ids[who] = here[who].do(ends.make, self._outcome.setting.memory, content)
        self._links = self._here.link("pair", "owner", "mover")
        cluster = CLUSTERS["owner"]
        self._called = here["mover"].do(
            ends.begin, case.move, cluster, ids["owner"], case.times_out
        )
        if not here[self._destination].do(ends.await_landing):
            raise Missed

    def _strike(self) -> None:
        case, here = self._case, self._here
        if case.stopped is not None:
            here.nodes[case.stopped].pause()
        self._struck = time.monotonic()
        if case.killed is not None:
            here.nodes[case.killed].kill()
        if case.cable:
            here.cut("owner")
        if case.killed is not None and case.stopped is not None:
            time.sleep(STOPPED_SECONDS)
            self._struck = time.monotonic()
            here.nodes[case.stopped].resume()

    def _see_error_of_mover(self) -> None:
        if "mover" in self._case.living:
            found = self._here.nodes["mover"].do(ends.outcome, SYNC_SECONDS + GRACE)
            self._judge("mover", found)

    def _see_error_of_owner(self) -> None:
        """It has made no call: its link says what has become of the peer."""
        if "owner" in self._case.living and not self._case.times_out:
            seconds = self._error_limit() + GRACE
            arguments = (ends.await_loss, self._links["owner"], CLUSTERS["mover"], seconds)
            found = self._try("the owner", self._here.nodes["owner"].do, *arguments)
            if found is not None:
                self._judge("owner", found)

    def _judge(self, end: End, found: tuple[str, float, str]) -> None:
        """In time, and with a documented status?"""
        limit = self._error_limit()
        status, when, text = found
        if status == "OK" and end == "mover" and self._is_whole():
            raise Missed
        seconds = when - (self._called if self._case.times_out else self._struck)
        self._outcome.error_seconds = max(self._outcome.error_seconds, seconds)
        self._first_error = min(self._first_error or when, when)
        if status not in self._case.statuses:
            self._wrong(f"the {end} saw {status}, not {' or '.join(self._case.statuses)}: {text}")
        if seconds > limit:
            self._wrong(f"the {end} saw the fault after {seconds:.2f} s, not {limit:g} s: {text}")

    @property
    def _destination(self) -> End:
        return "mover" if self._case.move == "pull" else "owner"

    def _is_whole(self) -> bool:
        """Whether all had arrived before the fault came, as far as that can be known."""
        case, end = self._case, self._destination
        if end == case.killed or (end == case.stopped and case.times_out):
            return False
        return bool(self._here.nodes[end].do(ends.is_whole))

    def _lift(self) -> None:
        """End a fault that lasts: at once, or after transfers that are in flight were forced to end."""
        if not self._outcome.setting.quick:
            time.sleep(max(0.0, self._lifted_at() - time.monotonic()))
        if self._case.cable:
            self._here.mend("owner")
        else:
            self._here.nodes["owner"].resume()
        self._lifted = time.monotonic()

    # -- what must hold after it -------------------------------------------------------------------

    def _lifted_at(self) -> float:
        """When the fault is ended, or will be."""
        forced = self._first_error + self._outcome.setting.force_seconds
        return self._lifted or forced + PEER_TIMEOUT

    def _quarantine_limit(self) -> float:
        forced = self._first_error + self._outcome.setting.force_seconds
        latest = max(forced, self._lifted_at() if self._case.lasts else 0.0)
        return latest + QUARANTINE_MARGIN + self._outcome.setting.patience

    def _error_limit(self) -> float:
        return error_limit(self._case) + self._outcome.setting.patience

    def _see_reused(self) -> None:
        limit = self._quarantine_limit()
        for end in self._case.living:
            left = max(0.0, limit - time.monotonic()) + 2 * GRACE
            found = self._try(f"the {end}", self._here.nodes[end].do, ends.reused, left)
            if found is None:
                continue
            when, why = found
            seconds = when - self._first_error
            self._outcome.quarantine_seconds = max(self._outcome.quarantine_seconds, seconds)
            if why:
                self._wrong(f"memory of the {end} is not back after {seconds:.1f} s: {why}")
            elif when > limit:
                allowed = limit - self._first_error
                self._wrong(
                    f"memory of the {end} was back after {seconds:.1f} s, not {allowed:.1f}"
                )

    def _check_memory(self) -> None:
        for end in self._case.living:
            found = self._try(f"the {end}", self._here.nodes[end].do, ends.changed)
            for text in found or ():
                self._wrong(f"late bytes in memory of the {end}: {text}")

    def _work_again(self) -> None:
        """The two ends can link again; a new process is in place of one that was killed."""
        for end in self._case.living:
            node = self._here.nodes[end]
            self._try(f"unlink of the {end}", node.do, nodes.unlink, self._links[end])
        if self._case.killed is not None:
            self._here.start(self._case.killed)
            self._here.nodes[self._case.killed].do(ends.make, "registered", ends.BEFORE)
        self._try("the two ends again", self._exchange, "mover", "owner")

    def _exchange(self, first: Who, second: Who) -> None:
        one, other = self._here.nodes[first], self._here.nodes[second]
        seeds = CLUSTERS[first], CLUSTERS[second]
        one.do(ends.fill_small, seeds[0])
        cache_id = other.do(ends.fill_small, seeds[1])
        self._here.link(f"{first} {second} again", first, second)
        one.do(ends.pull_small, seeds[1], cache_id, seeds[1])
        if self._case.move == "push":
            one.do(ends.push_small, seeds[1], cache_id)
            other.do(ends.check_pushed, seeds[0])

    def _end(self) -> None:
        for end in self._case.living:
            left = self._try(f"finalize of the {end}", self._here.nodes[end].do, ends.end)
            for text in left or ():
                self._wrong(f"the {end} after finalize: {text}")
