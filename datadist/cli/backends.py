"""List the installed transports, whether they can be used here, and what `auto` would choose."""

from __future__ import annotations

import argparse
import os

from datadist.base.quiet import quiet
from datadist.cli.tables import render
from datadist.transports.loader import REPAIR, BackendError, choose_backend, list_states, wanted
from datadist.transports.plugin_metadata import scan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(_args: argparse.Namespace) -> int:
    """Print the table, which replaces log messages; returns 1 if no transport can be used."""
    with quiet("datadist.backend"):
        return _show()


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
                        "yes" if row.usable else "no",
                        row.reason,
                    )
                    for row in rows
                ],
            )
        )
    for broken in scan().broken:
        print(f"skipped: {broken}. {REPAIR}")
    return _verdict(chosen)


def _verdict(chosen: str | None) -> int:
    name, origin = wanted(os.environ)
    if name != "auto":
        print(f"{origin} names {name}: engines without transfer_backend use that")
    try:
        choice = choose_backend(None, os.environ)
    except BackendError as error:
        print(error)
        return 1
    if name == "auto":
        print(f"* auto chooses {chosen}: {choice.why}")
    return 0
