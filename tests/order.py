"""The order of tests, which is random and printed as a seed by pytest-randomly."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Leave generators of random numbers alone: each test would get the same seed in each process."""
    if hasattr(config.option, "randomly_reset_seed"):
        config.option.randomly_reset_seed = False
