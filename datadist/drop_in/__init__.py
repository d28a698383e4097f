"""Runs programs written for `llm_datadist` on this implementation, on request.

The folder beside this file holds a package of that name; it is found only after
:func:`install_as_llm_datadist`, or under `datadist run`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

__all__ = [
    "FOLDER",
    "DropInError",
    "install_as_llm_datadist",
    "prepend_path",
    "refuse_if_beside",
    "refuse_if_imported",
]

FOLDER = Path(__file__).resolve().parent
NAME = "llm_datadist"


class DropInError(RuntimeError):
    """Another package `llm_datadist` is imported already."""


def install_as_llm_datadist() -> None:
    """Make ``import llm_datadist`` import this implementation, here and in child processes.

    Call it before anything imports that name, for example at the top of a conftest.

    Raises :class:`DropInError` (a ``RuntimeError``) when the real package is imported already.
    """
    refuse_if_imported()
    sys.path[:] = [str(FOLDER), *(entry for entry in sys.path if entry != str(FOLDER))]
    prepend_path(os.environ)


def refuse_if_imported() -> None:
    """Raise :class:`DropInError` when another package `llm_datadist` is imported."""
    present = sys.modules.get(NAME)
    if present is not None and not _is_ours(present):
        raise DropInError(
            f"llm_datadist is imported already, from {getattr(present, '__file__', 'nowhere')}: call "
            "install_as_llm_datadist() before anything imports it, or use `datadist run`"
        )


def refuse_if_beside(folder: Path) -> None:
    """Raise :class:`DropInError` if Python would find another package of that name before ours.

    That is the folder of a script, or the working directory of a module.
    """
    found = [folder / NAME / "__init__.py", folder / f"{NAME}.py"]
    present = next((path for path in found if path.exists()), None)
    if present is not None and folder.resolve() != FOLDER and not os.environ.get("PYTHONSAFEPATH"):
        raise DropInError(
            f"{present} lies beside the program, so that Python would import it first: start the "
            "program from another folder, or set PYTHONSAFEPATH=1 (Python 3.11 and later)"
        )


def prepend_path(environ: MutableMapping[str, str]) -> None:
    """Put the folder first on the module path of processes that are given ``environ``."""
    given = [part for part in environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    rest = [part for part in given if part != str(FOLDER)]
    environ["PYTHONPATH"] = os.pathsep.join([str(FOLDER), *rest])


def _is_ours(module: object) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve().is_relative_to(FOLDER)
