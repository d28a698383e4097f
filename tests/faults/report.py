"""Write docs/faults.md from the matrix and the detection times of a run.

DATADIST_FAULTS_RECORD=build/faults.jsonl make test ARGS=tests/faults
python -m tests.faults.report build/faults.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.faults.matrix import (
    BACKENDS,
    FAULTS,
    IMPOSSIBLE,
    LINK_SECONDS,
    MATRIX,
    MOMENTS,
    SYNC_SECONDS,
    Cell,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "faults.md"
BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"

AFTER = {
    "relink": "unlink, link again",
    "same link": "go on with the same link",
    "finalize": "finalize",
}


def rows(cells: Iterable[Cell]) -> list[str]:
    """Lines of the table without what was measured."""
    lines = []
    for cell in cells:
        outcome = (
            cell.status if cell.status.isupper() else f"`{cell.status}`".replace(" or ", "` or `")
        )
        parts = [f"“{part.strip(': ')}”" for part in cell.says.split(" or ")]
        said = f": {' or '.join(parts)}" if cell.says not in ("", "unlink") else ""
        lines.append(
            f"| {cell.fault} | {cell.moment} | {outcome}{said} | {cell.seconds:g} s "
            f"| {AFTER[cell.after]} |"
        )
    return lines


def explanations() -> list[str]:
    """What the names of faults and moments mean."""
    return [
        *(f"- **{name}**: {text}" for name, text in FAULTS.items()),
        "",
        *(f"- **{name}**: {text}" for name, text in MOMENTS.items()),
        "",
        *(f"- **{name}**, a column: {text}" for name, text in BACKENDS.items()),
        "",
        *(
            f"Not in the table: {fault}, {moment}; {why}."
            for (fault, moment), why in IMPOSSIBLE.items()
        ),
    ]


def table(measured: dict[tuple[str, str], float]) -> list[str]:
    """The whole table; times in milliseconds."""
    backends = [backend for backend in BACKENDS if any(b == backend for _, b in measured)]
    head = "".join(f" {backend}, measured |" for backend in backends)
    lines = [
        f"| Fault | Moment | We see | Bound | What then works |{head}",
        "|---|---|---|---|---|" + "---|" * len(backends),
    ]
    for cell, row in zip(MATRIX, rows(MATRIX), strict=True):
        times = (measured.get((cell.name, backend)) for backend in backends)
        shown = "".join(
            f" {seconds * 1e3:.0f} ms |" if seconds is not None else " |" for seconds in times
        )
        lines.append(row + shown)
    return lines


def main() -> int:
    """Replace the part between the marks."""
    measured = {}
    for line in Path(sys.argv[1]).read_text().splitlines():
        item = json.loads(line)
        measured[item["name"], item["backend"]] = item["seconds"]
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    settings = (
        f"`link_total_time` is {LINK_SECONDS} s where the link fails, and `sync_kv_timeout` is "
        f"{SYNC_SECONDS} s in these tests."
    )
    middle = "\n".join([BEGIN, *explanations(), "", settings, "", *table(measured), END])
    DOCUMENT.write_text(before + middle + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
