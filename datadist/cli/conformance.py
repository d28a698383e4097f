"""Run the conformance kit against an installed transport and report every test."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from datadist.base.texts import short_repr
from datadist.transport import API_VERSION
from datadist.transports.loader import BackendError, choose_backend

if TYPE_CHECKING:
    import pytest

    from datadist.testing import TransportConformance


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.add_argument("name", metavar="NAME", help="transport, as listed by `datadist backends`")
    parser.add_argument("-k", metavar="WORDS", dest="select",
                        help='only tests of such names or families: "Data and not many"')  # fmt: skip
    parser.add_argument("-v", "--verbose", action="store_true", help="name every test")
    parser.add_argument("--timeout-scale", type=_factor, metavar="FACTOR",
                        help="stretch every deadline, for a slow machine")  # fmt: skip
    parser.add_argument("--option", action="append", default=[], type=_option, metavar="NAME=VALUE",
                        help="option datadist.<transport>.NAME; may be repeated")  # fmt: skip
    parser.add_argument("--settings", metavar="MODULE:CLASS",
                        help="class derived from TransportConformance with what the transport "
                             "needs, such as a rank table")  # fmt: skip


def _factor(text: str) -> float:
    plain = re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text)
    value = float(text) if plain else 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(
            f"{short_repr(text)} is not a positive number, such as 2 or 0.5"
        )
    return value


def _option(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not name or not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def run(args: argparse.Namespace) -> int:
    """Returns 0 if the transport conforms, 1 if a test failed, 2 if no test could run."""
    if not __debug__:
        from datadist.testing.families.kit import NEEDS_ASSERT

        print(NEEDS_ASSERT, file=sys.stderr)
        return 2
    try:
        choice = choose_backend(args.name, {})
        chosen = _class_of(args)
    except (BackendError, ImportError, _NoSettings) as error:
        print(error, file=sys.stderr)
        return 2
    import pytest

    from datadist.testing import selected

    vars(selected)["TestTransport"] = chosen
    print(f"{choice.backend}: {choice.why.partition('; ')[2]}", flush=True)
    report = _Report(args.verbose)
    command = ["--pyargs", "datadist.testing.selected", "-c", os.devnull, "--noconftest",
               "-p", "no:cacheprovider", "-p", "no:terminal", "-p", "no:xdist"]  # fmt: skip
    pytest.main([*command, *(["-k", args.select] if args.select else [])], plugins=[report])
    return report.verdict(str(choice.backend), args.select)


class _NoSettings(Exception):
    """The class of --settings cannot be used."""


def _class_of(args: argparse.Namespace) -> type[TransportConformance]:
    from datadist.testing import TransportConformance

    base: type[TransportConformance] = TransportConformance
    if args.settings:
        module, _, name = args.settings.partition(":")
        found = getattr(importlib.import_module(module), name, None)
        if not (isinstance(found, type) and issubclass(found, TransportConformance)):
            raise _NoSettings(
                f"--settings {args.settings}: {found!r} is no class derived from "
                "datadist.testing.TransportConformance"
            )
        base = found
    own: dict[str, Any] = {"transport": args.name, "extra": {**base.extra, **dict(args.option)}}
    if args.timeout_scale:
        own["timeout_scale"] = args.timeout_scale
    return type("TestTransport", (base,), own)


class _Report:
    """Collects results by family and prints them; a plugin of pytest."""

    def __init__(self, verbose: bool) -> None:
        self._verbose = verbose
        self._begin = time.monotonic()
        self._families: dict[str, str] = {}
        self._counts: dict[str, Counter[str]] = {}
        """Results by family, in the order in which families ran."""
        self._failures: list[pytest.TestReport] = []
        self._problems: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Report modules that could not be collected."""
        if report.failed:
            self._problems.append(report.longreprtext)

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Note the family, which is the class that defines the test."""
        function = getattr(item, "function", None)
        family = function.__qualname__.split(".")[0] if function else ""
        self._families[item.nodeid] = family
        item.extra_keyword_matches.add(family)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a result; print its name if it is not a success."""
        if report.when != "call" and report.outcome == "passed":
            return
        family = self._families[report.nodeid]
        if family not in self._counts:
            self._close_family()
            self._counts[family] = Counter()
            print(f"\n{family}", flush=True)
        self._counts[family][report.outcome] += 1
        name = report.nodeid.rpartition("::")[2].removeprefix("test_")
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            print(f"  skipped  {name}: {reason.removeprefix('Skipped: ')}", flush=True)
        elif report.failed:
            self._failures.append(report)
            print(f"  FAILED   {name}", flush=True)
        elif self._verbose:
            print(f"  passed   {name} ({report.duration:.2f} s)", flush=True)

    def _close_family(self) -> None:
        if self._counts:
            print(f"  {_sum(list(self._counts.values())[-1])}", flush=True)

    def verdict(self, backend: str, select: str | None) -> int:
        """Print failures and the sum; the exit status."""
        self._close_family()
        for report in self._failures:
            print(f"\n--- {report.nodeid.rpartition('::')[2]}\n{report.longreprtext}")
            for title, text in report.sections:
                print(f"- {title}\n{text}")
        for problem in self._problems:
            print(problem)
        total = sum(self._counts.values(), Counter())
        print(f"\n{_sum(total)} in {time.monotonic() - self._begin:.0f} s")
        if total["failed"]:
            print(f"{backend} does NOT conform to version {API_VERSION} of the interface")
            return 1
        if not total["passed"] or self._problems:
            print("no test was run")
            return 2
        what = f"of the tests selected by {select!r}, none failed" if select else "conforms"
        print(f"{backend}: {what}, version {API_VERSION} of the interface")
        return 0


def _sum(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
