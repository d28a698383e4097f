"""The order of tests, which is random and printed as a seed by pytest-randomly, and the fast ones."""

from __future__ import annotations

import pytest

OF_PROCESSES = {"start_node", "start_on", "start_ranks", "bench", "net"}
"""Fixtures that start processes."""
SLOW = {
    "test_at_exit", "test_bench", "test_ci", "test_cli", "test_cli_output",
    "test_conformance_command", "test_drop_in", "test_faulty_transports", "test_fuzz",
    "test_hccl_libraries", "test_hccl_verify", "test_hints", "test_hostile", "test_interpreter",
    "test_jobs", "test_missing_resources", "test_own_names", "test_owned", "test_plugin_metadata",
    "test_programs", "test_pytest_plugin", "test_pytest_sample", "test_pytest_worker",
    "test_shm_link", "test_shm_short", "test_soak",
}  # fmt: skip
"""Modules whose tests take a second or more for other reasons."""
FIRST = {"test_every_cluster_pulls_from_every_other[2]"}
"""Tests that say most about a backend; the kit runs them on every one."""


def pytest_configure(config: pytest.Config) -> None:
    """Leave generators of random numbers alone: each test would get the same seed in each process."""
    if hasattr(config.option, "randomly_reset_seed"):
        config.option.randomly_reset_seed = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is fast."""
    for item in items:
        if item.name in FIRST or not (
            OF_PROCESSES.intersection(getattr(item, "fixturenames", ())) or item.path.stem in SLOW
        ):
            item.add_marker("fast")
