"""List the installed transports, whether they can be used here, and what `auto` would choose."""

from __future__ import annotations

import argparse
import json
import os

from datadist.base.quiet import quiet
from datadist.base.shortage import explain
from datadist.cli.style import BAD, GOOD, Styled
from datadist.cli.tables import output_width, render, say
from datadist.transports.environment import variable_of
from datadist.transports.loader import (
    REPAIR,
    BackendError,
    BackendState,
    choose_backend,
    list_states,
    wanted,
)
from datadist.transports.plugin_metadata import scan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.add_argument("--json", action="store_true", help="print the same as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the table, which replaces log messages; returns 1 if no transport can be used."""
    with quiet("datadist.backend"):
        return _show_json() if args.json else _show()


def _show_json() -> int:
    chosen: str | None = None
    why = ""
    try:
        choice = choose_backend(None, os.environ)
        chosen, why = choice.name, choice.why
    except (BackendError, OSError) as error:
        why = explain(error)
    found = {
        "chosen": chosen,
        "why": why,
        "backends": [
            {
                "name": row.backend.name,
                "distribution": row.backend.distribution,
                "version": row.backend.version,
                "priority": row.priority,
                "usable": row.usable,
                "reason": row.reason,
                "options": dict(row.options),
            }
            for row in list_states()
        ],
        "skipped": [str(broken) for broken in scan().broken],
    }
    print(json.dumps(found, indent=2))
    return 1 if chosen is None else 0


def _show() -> int:
    rows = list_states()
    chosen = next((row.backend.name for row in rows if row.usable), None)
    if rows:
        print(
            render(
                ("", "BACKEND", "DISTRIBUTION", "VERSION", "PRIORITY", "USABLE", "REASON"),
                [
                    (
                        "*" if row.usable and row.backend.name == chosen else "",
                        row.backend.name,
                        row.backend.distribution,
                        row.backend.version,
                        "-" if row.priority is None else row.priority,
                        Styled("yes", GOOD) if row.usable else Styled("no", BAD),
                        row.reason,
                    )
                    for row in rows
                ],
                output_width(),
            )
        )
    for broken in scan().broken:
        say(f"skipped: {broken}. {REPAIR}")
    for row in rows:
        _show_options(row)
    print()
    return _verdict()


def _show_options(row: BackendState) -> None:
    """The options of a transport, and how each is set."""
    name = row.backend.name
    if row.options:
        print()
        say(f"options of {name}, datadist.{name}.<option> or the environment variable:")
        shown = [(variable_of(name, each), each, text) for each, text in row.options.items()]
        print(
            render(("", "VARIABLE", "OPTION", ""), [("", *line) for line in shown], output_width())
        )


def _verdict() -> int:
    name, origin = wanted(os.environ)
    if name != "auto":
        say(f"{origin} names {name}: engines without transfer_backend use that")
    try:
        choice = choose_backend(None, os.environ)
    except (BackendError, OSError) as error:
        say(explain(error))
        return 1
    if name == "auto":
        say(f"* auto chooses {choice.name}: {choice.why_this}")
    return 0
