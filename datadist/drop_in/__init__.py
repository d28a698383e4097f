"""Lets programs written for `llm_datadist` run on this implementation, when they are told to.

The folder beside this file holds a package of that name; it is found only after
:func:`install_as_llm_datadist`, or under `datadist run`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

__all__ = ["FOLDER", "DropInError", "install_as_llm_datadist", "prepend_path", "refuse_if_imported"]

FOLDER = Path(__file__).resolve().parent
NAME = "llm_datadist"


class DropInError(RuntimeError):
    """Another package `llm_datadist` is imported already."""


def install_as_llm_datadist() -> None:
    """Make ``import llm_datadist`` mean this implementation, here and in child processes.

    Call it before anything imports that name, for example at the top of a conftest.

    Raises :class:`DropInError` (a ``RuntimeError``) when the real package is imported already.
    """
    refuse_if_imported()
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    prepend_path(os.environ)


def refuse_if_imported() -> None:
    """Raise :class:`DropInError` when another package `llm_datadist` is imported."""
    present = sys.modules.get(NAME)
    if present is not None and not _is_ours(present):
        raise DropInError(
            f"llm_datadist is imported already, from {getattr(present, '__file__', 'nowhere')}: call "
            "install_as_llm_datadist() before anything imports it, or use `datadist run`"
        )


def prepend_path(environ: MutableMapping[str, str]) -> None:
    """Put the folder first on the module path of processes that are given ``environ``."""
    rest = [part for part in environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    if str(FOLDER) not in rest:
        environ["PYTHONPATH"] = os.pathsep.join([str(FOLDER), *rest])


def _is_ours(module: object) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve().is_relative_to(FOLDER)
