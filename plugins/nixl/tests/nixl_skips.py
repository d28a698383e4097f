"""What tests of the transport itself need."""

from __future__ import annotations

import importlib.metadata

import pytest
from datadist_nixl import library


def _missing() -> str | None:
    if library.find() is None:
        return "NIXL is not installed (pip install --no-deps nixl-cu12)"
    try:
        importlib.metadata.distribution("datadist-nixl")
    except importlib.metadata.PackageNotFoundError:
        return "datadist-nixl is not installed (pip install plugins/nixl)"
    return None


_reason = _missing()
needed = pytest.mark.skipif(_reason is not None, reason=_reason or "")
"""Mark of tests that need NIXL and the plugin."""
