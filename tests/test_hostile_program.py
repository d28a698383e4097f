"""The program of a hostile member (tests/hostile): the others work on, and it is disconnected."""

from __future__ import annotations

import pytest

from tests.hostile.__main__ import faults, main, observe
from tests.hostile.behaviours import BEHAVIOURS
from tests.hostile.world import Seen

SHOWN_OUT = {
    "not valid": "it sent a frame that is not valid",
    "large, not valid": "it sent a frame that is not valid",
}
HARMLESS = ("half-open", "within a frame", "lies")
"""Behaviours that a session outlives."""
"""Behaviours that break the protocol, and why their sessions end."""


@pytest.mark.parametrize("wire", ["shm", "tcp"])
@pytest.mark.parametrize("name", [*SHOWN_OUT, *HARMLESS])
def test_honest_members_work_beside_a_hostile_one(wire: str, name: str) -> None:
    quiet, seen = observe(wire, [name], 2, SHOWN_OUT.get(name, ""))
    assert quiet.failures == seen.failures == []
    assert seen.joined > 0, "it was a member of none"
    for what in ("link", "pull, known key", "pull, new key", "unlink", "finalize"):
        assert seen.times[what], f"no {what} was done"
    if name in SHOWN_OUT:
        assert any(SHOWN_OUT[name] in reason for reason in seen.reasons), seen.reasons


def test_faults_are_seen() -> None:
    """The program is not blind: to an operation that fails, nor to one that takes longer."""
    quiet, seen = Seen(), Seen()
    quiet.times["link"], seen.times["link"] = [1.0, 1.0, 9.0], [1.0, 2.5, 2.5]
    assert faults(seen, quiet, 3.0) == []
    assert faults(seen, quiet, 2.0) == ["link takes 2.5 times as long"]
    seen.failures.append("unlink at cluster 1: LLM_FAILED")
    assert faults(seen, quiet, 3.0) == ["1 failures: unlink at cluster 1: LLM_FAILED"]


def test_the_program_says_what_became_of_each_operation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--wire", "shm", "--rounds", "1", "--behaviour", "half-open", "--ratio", "1e9"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "shm: half-open (was a member" in out
    assert out.count("  finalize ") == 1
    assert "usual" in out
    assert out.endswith("0 faults\n")
    assert set(SHOWN_OUT) <= set(BEHAVIOURS)
