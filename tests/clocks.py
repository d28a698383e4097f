"""Uses of clocks in sources, Python and C, that are not known to be of a clock that nobody sets.

What is permitted is listed, not what is forbidden: a new function of ``time`` is reported until it
is listed here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple


class Use(NamedTuple):
    """A use of a clock: the function it is in, or "", and its text."""

    function: str
    what: str


PERMITTED = {
    "time": {
        "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time", "sleep",
        "thread_time", "clock_gettime", "CLOCK_MONOTONIC", "CLOCK_BOOTTIME",
    },
    "datetime": {"timedelta", "timezone", "UTC"},
}  # fmt: skip
"""What may be used of the modules that know the date; anything else may ask for it."""
MODULES = {*PERMITTED, "_datetime", "_time"}
CLOCKS = {
    "CLOCK_MONOTONIC", "CLOCK_MONOTONIC_RAW", "CLOCK_MONOTONIC_COARSE", "CLOCK_BOOTTIME",
    "CLOCK_THREAD_CPUTIME_ID",
}  # fmt: skip
FOREIGN = re.compile(
    r"\b(gettimeofday|clock_gettime|CLOCK_REALTIME\w*|CLOCK_TAI|time\.time(_ns)?\b|datetime\.\w+)"
)
"""In strings, other than docstrings: functions of C libraries, and programs of other processes."""
OF_OTHER_MODULES = {"datetime64", "formatdate", "localtime", "timespec_get", "utime"}


def in_python(source: str) -> set[Use]:
    """Every use of a clock in a module that is not permitted for all."""
    tree = ast.parse(source)
    finder = _Finder(_aliases(tree), _docstrings(tree))
    finder.visit(tree)
    return finder.found


def _aliases(tree: ast.AST) -> dict[str, str]:
    """Names of the modules in this one, wherever they are imported, and by whom."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                if alias.name in MODULES and getattr(node, "module", None) not in MODULES:
                    found[alias.asname or alias.name] = alias.name
    return found


def _docstrings(tree: ast.AST) -> set[ast.AST]:
    """Strings that are statements."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}


class _Finder(ast.NodeVisitor):
    def __init__(self, aliases: dict[str, str], docstrings: set[ast.AST]) -> None:
        self.found: set[Use] = set()
        self._aliases = aliases
        self._docstrings = docstrings
        self._function = ""

    def _note(self, node: ast.AST) -> None:
        self.found.add(Use(self._function, ast.unparse(node)))

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        outer, self._function = self._function, node.name
        self.generic_visit(node)
        self._function = outer

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.visit_FunctionDef(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module in MODULES and node.level == 0:
            if not {alias.name for alias in node.names} <= PERMITTED.get(node.module, set()):
                self._note(node)
            if any(alias.name == "clock_gettime" for alias in node.names):
                self._note(node)  # its argument would have to be followed

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Of a module only what is permitted; a module of another module is one, too."""
        module = self._module(node.value)
        if module is None:
            if node.attr in OF_OTHER_MODULES or FOREIGN.search(node.attr):
                self._note(node)
            self.generic_visit(node)
        elif node.attr not in PERMITTED.get(module, set()):
            self._note(node)

    def _module(self, node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return self._aliases.get(node.id)
        if isinstance(node, ast.Attribute) and node.attr in MODULES:
            return node.attr
        return None

    def visit_Name(self, node: ast.Name) -> None:
        """A module that is not asked for an attribute goes where nobody can follow it."""
        if node.id in self._aliases or FOREIGN.fullmatch(node.id):
            self._note(node)

    def visit_Call(self, node: ast.Call) -> None:
        """An argument that names a module may import it, whatever the function is called here."""
        name = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
        first = node.args[0] if node.args else None
        if any(isinstance(arg, ast.Constant) and arg.value in MODULES for arg in node.args):
            self._note(node)
        if name == "clock_gettime" and getattr(first, "attr", None) not in CLOCKS:
            self._note(node)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if isinstance(node.slice, ast.Constant) and node.slice.value in MODULES:
            self._note(node)  # sys.modules["time"]
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        text = node.value.decode(errors="replace") if isinstance(node.value, bytes) else node.value
        if isinstance(text, str) and node not in self._docstrings and FOREIGN.search(text):
            self._note(node)


# -- C ---------------------------------------------------------------------------------------

_COMMENT_OR_STRING = re.compile(
    r"//(?:\\\n|[^\n])*|/\*.*?\*/"
    r"""|R"([^\s()\\]*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'""",
    re.DOTALL,
)
"""Strings begin no comment; they may name a function that is looked up."""
_ASKS = re.compile(
    r"\b(time|ftime|gettimeofday|timespec_get|localtime\w*|gmtime\w*|stime|strftime"
    r"|pthread_cond_timedwait|pthread_(?:mutex|rwlock)_timed\w+|sem_timedwait|mq_timed\w+)\s*\("
    r"|\b(CLOCK_REALTIME\w*|CLOCK_TAI|system_clock|utc_clock|FUTEX_CLOCK_REALTIME|SYS_gettimeofday"
    r"|__NR_gettimeofday|SYS_time|__NR_time)\b"
)
"""The timed waits of POSIX compare their deadline with the date, unless told otherwise."""
_BY_CLOCK = re.compile(
    r"\b(?:clock_gettime|clock_nanosleep|timerfd_create|timer_create|\w*condattr_setclock|\w*clockwait|"
    r"sem_clockwait)\s*\(([^()]*)"
)


def in_c(source: str) -> set[Use]:
    """Every use of the date in C or C++, comments aside, and of clocks that have no known name."""
    text = _COMMENT_OR_STRING.sub(lambda m: " " if m[0].startswith("/") else m[0], source)
    found = {match[1] or match[2] for match in _ASKS.finditer(text)}
    for match in _BY_CLOCK.finditer(text):
        if not CLOCKS & set(re.findall(r"\w+", match[1])):
            found.add(match[0])
    return {Use("", what) for what in found}


def uses(path: str, source: str) -> Iterator[tuple[str, str, str]]:
    """Path, function and text of every use in a file, by the kind of the file."""
    for use in sorted((in_python if path.endswith(".py") else in_c)(source)):
        yield (path, *use)
