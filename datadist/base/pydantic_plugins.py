"""Plugins of pydantic, which it looks for when the first model of a process is defined.

It reads the metadata of all installed packages for that. One package whose metadata is damaged would
end the import of every module with a model.
"""

from __future__ import annotations

import logging

from pydantic import create_model

from datadist.base.callers import pass_on

__all__ = ["load_pydantic_plugins"]

log = logging.getLogger("datadist")


def load_pydantic_plugins() -> None:
    """Have pydantic load its plugins, before models are defined: it tries once, then goes on without."""
    try:
        create_model("PluginProbe")
    except Exception as error:
        pass_on(error)
        log.debug("pydantic goes on without plugins, since %s: %s", type(error).__name__, error)
