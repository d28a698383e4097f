"""Files of the code that the documents name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("plugins/*/README.md")])
BESIDE = ("", "datadist", "plugins/rdma", "plugins/hccl", "plugins/shm", "examples/datadist-ucx")
NAMED = re.compile(r"`([a-z_]+(?:/[a-z_]+)+\.py)`")


def _exists(path: str) -> bool:
    return any((ROOT / folder / path).exists() for folder in BESIDE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    missing = [path for path in NAMED.findall(page.read_text()) if not _exists(path)]
    assert missing == []


def test_pages_name_files() -> None:
    assert any(NAMED.search(page.read_text()) for page in PAGES)
    assert not _exists("engine/pull.py")
