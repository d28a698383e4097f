"""Options of transports from the environment, for programs that cannot be changed.

One rule: ``DATADIST_<BACKEND>_<NAME>``, in capitals, is the option ``datadist.<backend>.<name>``, and
options that the program gives come first. An empty value is none.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from datadist.base.texts import nearest

__all__ = ["VARIABLES", "GivenOptions", "options_from", "options_of", "variable_of"]

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


@dataclass(frozen=True)
class GivenOptions:
    """The options of a transport: of the program, and of the environment where that gives none."""

    values: Mapping[str, str]
    """By name; of two transports by ``<backend>.<name>``."""
    variables: Mapping[str, str]
    """What the environment gave: the option's whole name to its variable."""

    def set_by(self, error: str) -> str:
        """Which variables an error about options is about; empty where it is about none."""
        named = [variable for option, variable in self.variables.items() if option in error]
        return f" [environment: {', '.join(named)}]" if named else ""


def options_of(
    parts: Sequence[tuple[str, type]],
    given: Mapping[str, Mapping[str, str]],
    environ: Mapping[str, str],
) -> GivenOptions:
    """The options of a backend that is made of ``parts``: one transport, or two, with their names.

    ``given`` are those of the program by backend. Logs which variables are none of ours, but similar.
    """
    values: dict[str, str] = {}
    variables: dict[str, str] = {}
    wanted = {*VARIABLES}
    for backend, transport in parts:
        known = getattr(transport, "options", None)
        outside = options_from(environ, backend, known)
        own = given.get(backend, {})
        prefix = f"{backend}." if len(parts) > 1 else ""
        values |= {f"{prefix}{name}": value for name, value in {**outside, **own}.items()}
        variables |= {
            f"datadist.{backend}.{name}": variable_of(backend, name)
            for name in outside.keys() - own.keys()
        }
        wanted |= {variable_of(backend, name) for name in known or ()}
    _warn_of_unknown(environ, [variable_of(backend) for backend, _ in parts], sorted(wanted))
    return GivenOptions(values, variables)


def _warn_of_unknown(
    environ: Mapping[str, str], begins: Sequence[str], wanted: Sequence[str]
) -> None:
    """Log which variables are none of ours, but similar to one that is."""
    for variable in _unknown(environ, begins):
        near = nearest(variable, wanted, cutoff=0.8)
        if near is not None:
            log.warning("there is no environment variable %s, it has no effect; did you mean %s?",
                        variable, near)  # fmt: skip


def _unknown(environ: Mapping[str, str], begins: Sequence[str]) -> list[str]:
    """Variables of our prefix that are neither documented nor those of a backend."""
    return sorted(
        variable
        for variable in environ
        if variable.startswith(PREFIX)
        and not variable.startswith(tuple(begins))
        and variable not in VARIABLES
    )
