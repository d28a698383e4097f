"""Run a Python program in which `import llm_datadist` imports datadist, also in its child
processes.

An installed package of that name is hidden for this program only.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from datadist.drop_in import DropInError, prepend_path, refuse_if_beside, refuse_if_imported


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take all arguments unparsed: options after the program belong to the program."""
    parser.usage = "datadist run [-m] PROGRAM [ARGUMENT ...]"
    parser.add_argument("-m", dest="module", action="store_true", help="PROGRAM is a module name")
    parser.add_argument(
        "program",
        nargs=argparse.REMAINDER,
        metavar="PROGRAM [ARGUMENT ...]",
        help="a script or, with -m, a module, and its arguments",
    )


def run(args: argparse.Namespace) -> int:
    """Replace this process by the program (exec); returns only if that is impossible."""
    if not args.program:
        print("datadist run: name a script, or a module with -m", file=sys.stderr)
        return 2
    program = args.program[0]
    if not args.module and not os.path.exists(program):
        print(f"datadist run: there is no script {program!r}", file=sys.stderr)
        return 2
    try:
        refuse_if_imported()  # at the start of the interpreter, as by a .pth file
        refuse_if_beside(Path.cwd() if args.module else Path(program).resolve().parent)
    except DropInError as error:
        print(f"datadist run: {error}", file=sys.stderr)
        return 2
    return _become([sys.executable, *(["-m"] if args.module else []), *args.program])


def _become(command: list[str]) -> NoReturn:
    environ = dict(os.environ)
    prepend_path(environ)
    sys.stdout.flush()
    os.execve(command[0], command, environ)
