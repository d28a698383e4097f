"""Options of transports from the environment, for programs that cannot be changed.

One rule: ``DATADIST_<BACKEND>_<NAME>``, in capitals, is the option ``datadist.<backend>.<name>``, and
options that the program gives come first. An empty value is none.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping

from datadist.base.texts import nearest

__all__ = ["VARIABLES", "options_from", "set_by", "variable_of", "warn_of_unknown"]

log = logging.getLogger("datadist.options")

PREFIX = "DATADIST_"
VARIABLES = frozenset(
    {
        "DATADIST_AUTH_KEY", "DATADIST_BACKEND", "DATADIST_HCCL_LIBRARIES", "DATADIST_JOB",
        "DATADIST_PEER_TIMEOUT", "DATADIST_RENDEZVOUS", "DATADIST_RUNTIME_DIR",
    }
)  # fmt: skip
"""Documented variables that are no options of a transport."""


def variable_of(backend: str, name: str = "") -> str:
    """The variable of an option; with no name, what the variables of a backend begin with."""
    return re.sub(r"\W", "_", f"{PREFIX}{backend}_{name}").upper()


def options_from(
    environ: Mapping[str, str], backend: str, known: Iterable[str] | None
) -> dict[str, str]:
    """The options of a backend that the environment sets, by name.

    ``known`` are the names that the transport declares; what is none of them is an option too, which
    the transport refuses, since nobody else has such a variable.
    """
    begin = variable_of(backend)
    names = {variable_of(backend, name): name for name in known or ()}
    return {
        names.get(variable, variable.removeprefix(begin).lower()): value
        for variable, value in environ.items()
        if variable.startswith(begin) and value and variable not in VARIABLES
    }


def warn_of_unknown(environ: Mapping[str, str], backend: str, known: Iterable[str] | None) -> None:
    """Log which variables are none of ours, but similar to one that is."""
    wanted = [*VARIABLES, *(variable_of(backend, name) for name in known or ())]
    for variable in _unknown(environ, backend):
        near = nearest(variable, wanted, cutoff=0.8)
        if near is not None:
            log.warning("there is no environment variable %s, it has no effect; did you mean %s?",
                        variable, near)  # fmt: skip


def _unknown(environ: Mapping[str, str], backend: str) -> list[str]:
    """Variables of our prefix that are neither documented nor those of the backend."""
    begin = variable_of(backend)
    return sorted(
        variable
        for variable in environ
        if variable.startswith(PREFIX)
        and not variable.startswith(begin)
        and variable not in VARIABLES
    )


def set_by(error: str, backend: str, names: Iterable[str]) -> str:
    """Which variables an error about options is about; empty where it is about none."""
    named = [variable_of(backend, name) for name in names if f"datadist.{backend}.{name}" in error]
    return f" [environment: {', '.join(named)}]" if named else ""
