"""Examine this machine for the chosen backend, and say what to change.

The default is the backend that `auto` or DATADIST_BACKEND chooses; all others are listed, and do not
matter. Exits with 1 if a chosen backend cannot work. With notes only it exits with 0.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from textwrap import shorten

from datadist.base.digits import number_argument
from datadist.base.quiet import quiet
from datadist.base.shortage import explain
from datadist.cli.style import BAD, GOOD, SOFT, WARN, paint
from datadist.cli.tables import output_width, paragraph, say
from datadist.diagnosis import Finding, Level, examine, worst
from datadist.transports.combined import SEPARATOR
from datadist.transports.loader import BackendError, choose_backend, list_backends, wanted
from datadist.transports.plugin_metadata import named_directly

MARKS = {Level.OK: ("ok", GOOD), Level.NOTE: ("note", WARN), Level.PROBLEM: ("PROBLEM", BAD)}
INDENT = " " * 8
"""As wide as a mark, and before the lines that follow it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.add_argument("--backend", metavar="NAME", action="append", default=[],
                        help="examine for this backend only; may be repeated")  # fmt: skip
    parser.add_argument("--pool", metavar="BYTES", type=number_argument(0), default=0,
                        help="also say whether a pool of this size fits")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Returns 0 if all chosen backends work, else 1."""
    findings = examine(_names(args.backend), args.pool)
    name, origin = wanted(os.environ)
    named = args.backend or ([] if name == "auto" else [name])
    with quiet("datadist.backend"):
        chosen, why = _chosen(named)
        others = [] if args.backend else _others(chosen)
    if why and named and not args.backend:
        why = f"{origin}: {why}"
    verdict = worst(findings, chosen)
    failed = not chosen or verdict is Level.PROBLEM
    if args.json:
        print(json.dumps(_report(findings, chosen, failed), indent=2))
    else:
        _show(findings, chosen, others)
        say(why if failed and why else _summary(chosen, findings, failed), "  ")
    return int(failed)


def _others(chosen: Sequence[str]) -> list[str]:
    """What is installed besides; nothing where none is chosen, since all are shown then."""
    return [each.name for each in list_backends() if each.name not in chosen] if chosen else []


def _show(findings: Sequence[Finding], chosen: Sequence[str], others: Sequence[str]) -> None:
    """Each finding about the chosen backends, then a line for each of the others."""
    for finding in findings:
        if not chosen or _concerns(finding, chosen):
            tagged = finding.backends if len(chosen) != 1 else ()
            _show_one(finding, f" [{', '.join(sorted(tagged))}]" if tagged else "")
    if others:
        print()
        say("other backends, not needed (`datadist doctor --backend NAME` examines one):", "  ")
        for name in others:
            say(f"  {name}: {_in_short(name, findings)}", "    ", SOFT)
    print()


def _show_one(finding: Finding, concerns: str) -> None:
    word, code = MARKS[finding.level]
    text = paragraph(f"{word:8}{finding.name}{concerns}: {finding.found}", output_width(), INDENT)
    print(paint(word, code) + text[len(word) :])
    if finding.remedy:
        say(f"{INDENT}-> {finding.remedy}", INDENT + "   ")


def _in_short(name: str, findings: Sequence[Finding]) -> str:
    """Whether another backend can be used; the first thing that is in its way."""
    problem = next((f for f in findings if name in f.backends and f.level is Level.PROBLEM), None)
    return f"cannot be used: {shorten(problem.found, 120)}" if problem else "can be used"


def _concerns(finding: Finding, chosen: Sequence[str]) -> bool:
    return not finding.backends or not finding.backends.isdisjoint(chosen)


def _chosen(named: Sequence[str]) -> tuple[list[str], str]:
    """The chosen backends; if none can be chosen, an empty list and the reason."""
    installed = {backend.name for backend in list_backends()}
    missing = sorted(
        name
        for name in named
        if name not in installed and named_directly(name) is None and SEPARATOR not in name
    )
    if missing:
        return [], f"not installed: {', '.join(missing)} (`datadist backends` lists what is)"
    try:
        for name in named:
            if name not in installed:
                choose_backend(name, {})
        if named:
            return _names(named), ""
        return [name for name, _ in choose_backend(None, os.environ).parts], ""
    except BackendError as error:
        return [], str(error)
    except OSError as error:
        return [], f"no backend can be tried: {explain(error)}"


def _names(named: Sequence[str]) -> list[str]:
    """The names of backends, some of which may be given as ``module:Class``, or two as ``a+b``."""
    parts = _parts(named)
    direct = [named_directly(name) for name in parts]
    return [
        given if found is None else found.name for given, found in zip(parts, direct, strict=True)
    ]


def _parts(named: Sequence[str]) -> list[str]:
    """Each backend by itself."""
    return [part.strip() for name in named for part in name.split(SEPARATOR)]


def _summary(chosen: Sequence[str], findings: Sequence[Finding], failed: bool) -> str:
    names = ", ".join(chosen)
    if failed:
        return f"{names}: {paint('does not work here', BAD)}; see PROBLEM above"
    notes = sum(f.level is Level.NOTE and _concerns(f, chosen) for f in findings)
    return f"{names}: {paint('works here', GOOD)}" + (f", {notes} note(s) above" if notes else "")


def _report(findings: Sequence[Finding], chosen: Sequence[str], failed: bool) -> dict[str, object]:
    return {
        "works": not failed,
        "backends": list(chosen),
        "findings": [
            {**finding.as_dict(), "concerns_chosen": _concerns(finding, chosen)}
            for finding in findings
        ],
    }
