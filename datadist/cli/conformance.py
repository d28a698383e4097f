"""Run the conformance kit against an installed transport and report every test."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from datadist.base.texts import short_repr
from datadist.cli.far import add_far, add_hosts
from datadist.cli.style import BAD, GOOD, TITLE, WARN, Styled, paint
from datadist.cli.tables import output_width, paragraph, render, say
from datadist.testing.far_hosts import FarHostsError
from datadist.transport import API_VERSION
from datadist.transports.loader import BackendError, choose_backend

CLEAR = "\r\x1b[K"
"""Erases the line of a terminal."""
OUTCOMES = ("passed", "failed", "skipped")
RESULT = " " * 11
"""Before the further lines of a result."""

if TYPE_CHECKING:
    import pytest

    from datadist.testing import TransportConformance


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.add_argument("name", metavar="NAME", help="transport, as listed by `datadist backends`")
    parser.add_argument("-k", metavar="WORDS", dest="select",
                        help='only tests of such names or families: "Data and not many"')  # fmt: skip
    parser.add_argument("-v", "--verbose", action="store_true", help="say what each test asks for")
    parser.add_argument("--timeout-scale", type=_factor, metavar="FACTOR",
                        help="stretch every deadline, for a slow machine")  # fmt: skip
    parser.add_argument("--option", action="append", default=[], type=_option, metavar="NAME=VALUE",
                        help="option datadist.<transport>.NAME; may be repeated")  # fmt: skip
    parser.add_argument("--settings", metavar="MODULE:CLASS",
                        help="class derived from TransportConformance with what the transport "
                             "needs, such as a rank table")  # fmt: skip
    add_far(parser)
    add_hosts(parser)


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
        say(f"{choice.backend}: {choice.why_this.partition('; ')[2]}")
        try:
            if chosen.far:
                say(f"far: {_make_hosts(chosen)}")
            return _test(chosen, str(choice.backend), args)
        finally:
            chosen.teardown_class()
    except (BackendError, ImportError, _NoSettings, FarHostsError) as error:
        print(error, file=sys.stderr)
        return 2


def _test(chosen: type[TransportConformance], backend: str, args: argparse.Namespace) -> int:
    """Run the tests; the exit status."""
    import pytest

    from datadist.testing import selected

    vars(selected)["TestTransport"] = chosen
    report = _Report(args.verbose)
    command = ["--pyargs", "datadist.testing.selected", "-c", os.devnull, "--noconftest",
               "-p", "no:cacheprovider", "-p", "no:terminal", "-p", "no:xdist",
               "-p", "no:randomly"]  # fmt: skip
    ended = pytest.main([*command, *(["-k", args.select] if args.select else [])], plugins=[report])
    if ended == pytest.ExitCode.INTERRUPTED:
        print("interrupted: what was tested says nothing of the rest", flush=True)
        return 130
    return report.verdict(backend, args.select)


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
    if args.far:
        own |= {"far": args.far, "far_hosts": args.hosts}
    return type("TestTransport", (base,), own)


def _make_hosts(chosen: type[TransportConformance]) -> str:
    """Make the hosts, which the tests will use, and say what they are.

    Raises :class:`FarHostsError` where there can be none, or where the transport cannot use them.
    """
    from datadist.testing.families.kit import CANNOT_BE_FAR
    from datadist.testing.processes import PeerError

    hosts, testbed = chosen.set_up_far()
    with suppress(PeerError):  # the tests show why the transport does not start
        if testbed.capabilities.same_host_only:
            raise FarHostsError(f"{chosen.transport} cannot be tested with --far: {CANNOT_BE_FAR}")
    return hosts.describe()


class _Report:
    """Prints each result, and a failure, the moment a test has ended; a plugin of pytest."""

    def __init__(self, verbose: bool) -> None:
        self._verbose = verbose
        self._begin = time.monotonic()
        self._family = ""
        """The family that was printed last."""
        self._families: dict[str, str] = {}
        self._asked: dict[str, str] = {}
        """What each test asks for: the first line of its docstring."""
        self._counts: dict[str, Counter[str]] = {}
        """Results by family."""
        self._failed: list[str] = []
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
        self._asked[item.nodeid] = (getattr(function, "__doc__", None) or "").partition("\n")[0]
        item.extra_keyword_matches.add(family)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Print the family, and on a terminal the name of the test that begins."""
        family = self._families[nodeid]
        if family != self._family:
            _print(f"\n{paint(family, TITLE)}")
            self._family = family
        if sys.stdout.isatty():
            _print(f"  running  {_name(nodeid)}\r", end="")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a result and print it; a failure with its reason and what the processes wrote."""
        if report.when != "call" and report.outcome == "passed":
            return
        self._counts.setdefault(self._families[report.nodeid], Counter())[report.outcome] += 1
        name, clear = _name(report.nodeid), CLEAR if sys.stdout.isatty() else ""
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            _print(clear, end="")
            _say_result("skipped", WARN, f"{name}: {reason.removeprefix('Skipped: ')}")
        elif report.failed:
            self._failed.append(name)
            _print(clear, end="")
            _say_result("FAILED", BAD, f"{name} ({report.duration:.2f} s)")
            _print(report.longreprtext)
            for title, text in report.sections:
                _print(f"- {title}\n{text}")
        else:
            _print(clear, end="")
            _say_result("passed", GOOD, f"{name} ({report.duration:.2f} s)")
        if self._verbose and self._asked[report.nodeid]:
            _print(paragraph(RESULT + self._asked[report.nodeid], output_width(), RESULT))

    def verdict(self, backend: str, select: str | None) -> int:
        """Print the sums and the names of failures; the exit status."""
        print()
        rows = [
            (family, *(_count(counts, outcome) for outcome in OUTCOMES))
            for family, counts in self._counts.items()
        ]
        if rows:
            print(render(("FAMILY", *(each.upper() for each in OUTCOMES)), rows, output_width()))
        for name in self._failed:
            print(f"{paint('failed', BAD)}: {name}")
        for problem in self._problems:
            print(problem)
        total = sum(self._counts.values(), Counter())
        print(f"\n{_sum(total)} in {time.monotonic() - self._begin:.0f} s")
        if total["failed"]:
            say(
                f"{backend} {paint('does NOT conform', BAD)} to version {API_VERSION} of the interface"
            )
            return 1
        if not total["passed"] or self._problems:
            print("no test was run")
            return 2
        what = f"of the tests selected by {select!r}, none failed" if select else "conforms"
        say(f"{backend}: {paint(what, GOOD)}, version {API_VERSION} of the interface")
        return 0


def _name(nodeid: str) -> str:
    return nodeid.rpartition("::")[2].removeprefix("test_")


def _sum(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES)


def _count(counts: Counter[str], outcome: str) -> str:
    text = str(counts[outcome])
    return Styled(text, BAD) if outcome == "failed" and counts[outcome] else text


def _say_result(word: str, code: str, text: str) -> None:
    shown = paragraph(f"  {word:9}{text}", output_width(), RESULT)
    _print(f"  {paint(word, code)}{shown[2 + len(word) :]}")


def _print(text: str, end: str = "\n") -> None:
    """Print from inside of pytest, which ends quietly for this error only; `print` then says why."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise KeyboardInterrupt from None
