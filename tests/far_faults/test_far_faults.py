"""Each case once, on every far transport that is installed, and rounds that must find what is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from datadist.transport import FORCE_SECONDS
from tests import hosts
from tests.far_faults import place, settings
from tests.far_faults.__main__ import main
from tests.far_faults.cases import BY_NAME, CASES, Case
from tests.far_faults.defects import DEFECTS
from tests.far_faults.report import table
from tests.far_faults.rounds import Outcome, run
from tests.far_faults.settings import INTERFACES, MEMORIES, Setting

PATIENCE = 20.0
"""How fast it is, is a question for `make far-faults`, on a machine that does nothing else."""
LEFT_OPEN = {"ucx": "UCX keeps its context where a cable was cut while it sent"}
"""What is known of a backend after a cable was down: nothing else may be wrong."""
FOUND = {
    "reads_land_late": ("pull-timeout", "late bytes in memory of the mover"),
    "writes_land_late": ("push-timeout", "late bytes in memory of the owner"),
    "never_settles": ("pull-timeout", "memory of the mover is not back"),
    "notices_death_late": ("owner-killed", r"the mover saw the fault after \d"),
    "reports_another_error": ("pull-timeout", "the mover saw LLM_FAILED, not LLM_TIMEOUT"),
    "hides_failures": ("pull-timeout", "the mover saw OK, not LLM_TIMEOUT"),
    "leaks": (
        "owner-killed",
        "the mover after finalize: 1 threads|descriptors are left: /dev/null",
    ),
    "dies_with_its_peer": ("reader-killed", "the owner has ended by itself, exit code -6"),
    "jams": ("pull-timeout", "the mover with a third engine: .*LLM_"),
}
"""The case that finds a defect, and by what."""


def _check_place(backend: str) -> None:
    missing = settings.missing(backend) or place.missing()
    if missing is not None:
        pytest.skip(missing)


def _any_backend() -> str:
    """The first that there is here."""
    for backend in INTERFACES:
        if settings.missing(backend) is None:
            return backend
    pytest.skip(settings.missing(backend) or "")


@hosts.needed
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", INTERFACES)
def test_a_fault_between_hosts(backend: str, case: Case, tmp_path: Path) -> None:
    _check_place(backend)
    memory = MEMORIES[CASES.index(case) % len(MEMORIES)]
    outcome = run(case, Setting(backend, memory, patience=PATIENCE), tmp_path)
    others = [text for text in outcome.findings if "after finalize: " not in text]
    if outcome.findings and not others and case.cable and backend in LEFT_OPEN:
        pytest.xfail(LEFT_OPEN[backend])
    assert not outcome.findings


@hosts.needed
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_found(defect: str, tmp_path: Path) -> None:
    backend = _any_backend()
    _check_place(backend)
    name, finding = FOUND[defect]
    quick = defect.endswith("_late")  # else the session with a stopped owner may end before
    outcome = run(BY_NAME[name], Setting(backend, quick=quick, defect=defect), tmp_path)
    assert any(re.search(finding, text) for text in outcome.findings), outcome.findings
    assert (tmp_path / "findings.txt").read_text().splitlines() == outcome.findings


def test_the_table_tells_real_rounds_apart() -> None:
    case, short, real = CASES[0], Setting("x"), Setting("x", force_seconds=FORCE_SECONDS)
    head, row = table([
        Outcome(case, short, [], 0.5, 2.0), Outcome(case, short, ["wrong"], 1.5, 1.0),
        Outcome(case, real, [], 0.2, 32.0),
    ])  # fmt: skip
    assert row.split() == [case.name, "3", "2", "1.50", "2.00", "1", "32.00"]
    assert len(row) == len(head)


def test_the_program_exits_with_one_and_keeps_evidence_where_a_round_was_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def pretend(case: Case, setting: Setting, evidence: Path) -> Outcome:
        evidence.mkdir(parents=True)
        (evidence / "findings.txt").touch()
        wrong = setting.memory == "registered"
        return Outcome(case, setting, ["a byte came late"] if wrong else [])

    for module in (settings, place):
        monkeypatch.setattr(module, "missing", lambda *_: None)
    monkeypatch.setattr("tests.far_faults.__main__.run", pretend)
    arguments = ["--backend", "x", "--case", "owner-killed", "--evidence", str(tmp_path)]
    assert main([*arguments, "--rounds", "2"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["owner-killed-1"]
    assert "  a byte came late\n" in capsys.readouterr().out
    assert main([*arguments, "--rounds", "1"]) == 0
    assert "0 of 1 rounds were wrong" in capsys.readouterr().out
