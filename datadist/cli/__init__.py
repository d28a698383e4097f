"""The command line, `datadist COMMAND`; one module per subcommand."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from datadist.base.version import own_version

COMMANDS = {
    "backends": "list the installed transports, and which one `auto` would choose",
    "bench": "measure transfers and compare them with this machine's limits",
    "check": "validate a rank table and show the domain that it describes",
    "conformance": "test an installed transport against the interface and report",
    "demo": "move a KV cache between processes of this host and verify it",
    "doctor": "examine this machine for each backend, and say what to change",
    "top": "watch the engines of this user: links, throughput, latencies, failures",
    "run": "run a program that imports llm_datadist on datadist",
    "table": "write a rank table for so many ranks and hosts",
}
"""Subcommands and their help; each is a module with ``add_arguments(parser)`` and ``run(args)``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    try:
        try:
            return _run(argv)
        finally:  # after --help as well, which ends by SystemExit
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has closed the pipe; nothing more can be printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="datadist", description="KV caches between processes, over interchangeable transports"
    )
    parser.add_argument("--version", action="version", version=f"datadist {own_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    modules = {}
    for name, text in COMMANDS.items():
        modules[name] = importlib.import_module(f"datadist.cli.{name}")
        sub = commands.add_parser(name, help=text, description=modules[name].__doc__)
        modules[name].add_arguments(sub)
    args = parser.parse_args(argv)
    return int(modules[args.command].run(args))
