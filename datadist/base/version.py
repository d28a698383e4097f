"""The version of this library."""

from __future__ import annotations

from importlib import metadata

from datadist.base.callers import pass_on

__all__ = ["own_version"]


def own_version() -> str:
    """The version of `datadist`; in words where it runs without the metadata of an installation."""
    try:
        found = metadata.version("datadist")
    except Exception as error:  # what damaged metadata raises depends on the version of Python
        pass_on(error)
        return "of unknown version (no package metadata)"
    return found or "of unknown version (damaged package metadata)"
