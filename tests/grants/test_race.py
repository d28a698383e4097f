"""Readers beside an owner that ends grants and reuses their blocks; `make race` takes longer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.grants.race import race


@pytest.mark.parametrize(("memory", "one_sided"), [("pool", False), ("numpy", True)])
def test_no_pull_gets_the_bytes_of_another_grant(
    tmp_path: Path, memory: str, one_sided: bool
) -> None:
    figures = race(600, 3, memory, one_sided, 20, tmp_path)
    assert figures["wrong"] == []
    assert figures["pulls"] == 600
    results, ends = figures["results"], figures["ends"]
    allowed = {"LLM_SUCCESS", "LLM_SUCCESS with a token", "LLM_KV_CACHE_NOT_EXIST"}
    assert results.keys() == allowed, figures
    assert min(results.values()) > 5, figures
    assert ends.keys() >= {"REVOKED", "LAPSED"}, figures
