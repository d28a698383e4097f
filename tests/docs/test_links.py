"""Links of the documents lead to files of the checkout and to headings that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, ROOT

pytestmark = pytest.mark.fast

LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def _anchors(text: str) -> set[str]:
    """Headings, as GitHub names them in addresses."""
    plain = (re.sub(r"[^\w\- ]", "", heading.strip().lower()) for heading in HEADING.findall(text))
    return {heading.replace(" ", "-") for heading in plain}


def _broken(text: str, page: Path) -> Iterator[str]:
    for path, anchor in LINK.findall(text):
        target = page.parent / path if path else page
        if path.startswith("http"):
            continue
        if not target.exists():
            yield path
        elif anchor and anchor not in _anchors(text if target == page else target.read_text()):
            yield f"{path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert list(_broken(page.read_text(), page)) == []


def test_broken_links_are_found() -> None:
    text = (
        "# A `b` heading\n[1](#a-b-heading) [2](#c) [3](nothing.md) [4](guide.md#no) [5](guide.md)"
    )
    found = list(_broken(text, ROOT / "docs" / "grants.md"))
    assert found == ["#c", "nothing.md", "guide.md#no"]
