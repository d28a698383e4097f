"""What holds for the tests of all folders."""

from __future__ import annotations

import pytest

pytest_plugins = ["tests.skips"]


def pytest_configure(config: pytest.Config) -> None:
    """The order of tests is random; what they draw themselves is not made equal in all of them."""
    if hasattr(config.option, "randomly_reset_seed"):
        config.option.randomly_reset_seed = False
