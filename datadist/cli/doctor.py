"""Examine this machine for each backend, and say what to change.

Exits with 1 if a chosen backend cannot work. The default is the backend that `auto` or
DATADIST_BACKEND chooses. With notes only it exits with 0.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from datadist.base.digits import number_argument
from datadist.base.quiet import quiet
from datadist.base.shortage import explain
from datadist.diagnosis import Finding, Level, examine, worst
from datadist.transports.combined import SEPARATOR
from datadist.transports.loader import BackendError, choose_backend, list_backends
from datadist.transports.plugin_metadata import named_directly

MARKS = {Level.OK: "ok", Level.NOTE: "note", Level.PROBLEM: "PROBLEM"}


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
    with quiet("datadist.backend"):
        chosen, why = _chosen(args.backend)
    verdict = worst(findings, chosen)
    failed = not chosen or verdict is Level.PROBLEM
    if args.json:
        print(json.dumps(_report(findings, chosen, failed), indent=2))
    else:
        for finding in findings:
            print(_line(finding))
        print(why if failed and why else _summary(chosen, findings, failed))
    return int(failed)


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


def _line(finding: Finding) -> str:
    concerns = f" [{', '.join(sorted(finding.backends))}]" if finding.backends else ""
    mark = MARKS[finding.level]
    if sys.stdout.isatty() and finding.level is Level.PROBLEM:
        mark = f"\x1b[31m{mark}\x1b[0m"
    text = f"{mark:8}{finding.name}{concerns}: {finding.found}"
    return f"{text}\n        -> {finding.remedy}" if finding.remedy else text


def _summary(chosen: Sequence[str], findings: Sequence[Finding], failed: bool) -> str:
    names = ", ".join(chosen)
    if failed:
        return f"{names}: does not work here; see PROBLEM above"
    concerned = [f for f in findings if not f.backends or f.backends & set(chosen)]
    notes = sum(f.level is Level.NOTE for f in concerned)
    return f"{names}: works here" + (f", {notes} note(s) above" if notes else "")


def _report(findings: Sequence[Finding], chosen: Sequence[str], failed: bool) -> dict[str, object]:
    return {
        "works": not failed,
        "backends": list(chosen),
        "findings": [finding.as_dict() for finding in findings],
    }
