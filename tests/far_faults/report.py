"""The table of a run: a line per case."""

from __future__ import annotations

from collections.abc import Sequence

from tests.far_faults.rounds import Outcome

HEAD = (
    "case", "rounds", "right", "error, worst", "quarantine, worst", "real FORCE_SECONDS",
    "quarantine, worst",
)  # fmt: skip
"""The first quarantine is that of rounds with a short FORCE_SECONDS, the second that of the others."""


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Lines; times in seconds."""
    cases = list(dict.fromkeys(outcome.case.name for outcome in outcomes))
    rows = [HEAD, *(_row(name, [o for o in outcomes if o.case.name == name]) for name in cases)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    return [_line(row, widths) for row in rows]


def _row(name: str, outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    short = [outcome for outcome in outcomes if not outcome.setting.real]
    real = [outcome for outcome in outcomes if outcome.setting.real]
    return (
        name,
        str(len(outcomes)),
        str(sum(not outcome.findings for outcome in outcomes)),
        _worst([outcome.error_seconds for outcome in outcomes]),
        _worst([outcome.quarantine_seconds for outcome in short]),
        str(len(real)),
        _worst([outcome.quarantine_seconds for outcome in real]),
    )


def _worst(seconds: Sequence[float]) -> str:
    return f"{max(seconds):.2f}" if seconds else "-"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(row, widths, strict=True)
    cells = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]
    return "  ".join(cells)
