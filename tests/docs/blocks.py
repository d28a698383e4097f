"""Blocks of code in the documents.

A block is fenced, or indented by four spaces: such a one is for a shell. A fenced one whose text is
that of a file has a marker in the line before it, ``<!-- from examples/x/y.py -->``, or for a part of it
``<!-- from examples/x/y.py#name -->``: what lies between ``# region name`` and its ``# endregion``.
``python -m tests.docs`` writes those blocks anew.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = "", "docs", "examples/*", "plugins/*", "integrations/*"
PAGES = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.md".lstrip("/")))
MARKER = re.compile(r"<!-- from ([\w./-]+)(?:#([\w-]+))? -->")
FENCE = "```"
NO_TEXT = re.compile(r"  # (fmt: skip|type: ignore\[.*\])$", re.MULTILINE)
"""Comments for tools, which readers do not need."""


@dataclass(frozen=True)
class Block:
    """A block of code of a page."""

    page: str
    line: int
    """Of its first line in the page, from 1."""
    language: str
    text: str
    source: str | None = None
    """The file, and the region, whose text it is to be."""

    @property
    def first(self) -> str:
        """Its first line."""
        return self.text.partition("\n")[0]

    @property
    def name(self) -> str:
        """Page and line, for people."""
        return f"{self.page}:{self.line}"


def blocks_of(text: str, page: str) -> Iterator[Block]:
    """The blocks of a page. Raises ``ValueError`` for a fence that does not end."""
    lines = text.splitlines(keepends=True)
    index = 0
    while index < len(lines):
        begin = index
        index += 1
        if lines[begin].lstrip().startswith(FENCE):
            while index < len(lines) and lines[index].strip() != FENCE:
                index += 1
            if index == len(lines) or not lines[begin].startswith(FENCE):
                raise ValueError(f"{page}:{begin + 1}: a fence that does not end, or is indented")
            marker = MARKER.fullmatch(lines[begin - 1].strip()) if begin else None
            source = "#".join(filter(None, marker.groups())) if marker else None
            language = lines[begin][len(FENCE) :].strip()
            yield Block(page, begin + 2, language, "".join(lines[begin + 1 : index]), source)
            index += 1
        elif lines[begin].startswith("    ") and not lines[begin - 1].strip():
            while index < len(lines) and lines[index].startswith("    "):
                index += 1
            yield Block(page, begin + 1, "sh", textwrap.dedent("".join(lines[begin:index])))


def all_blocks() -> list[Block]:
    """Those of all pages."""
    return [
        block
        for page in PAGES
        for block in blocks_of(page.read_text(), str(page.relative_to(ROOT)))
    ]


def text_of(source: str) -> str:
    """The text of a file, or of one of its regions, as a page shows it."""
    path, _, region = source.partition("#")
    text = (ROOT / path).read_text()
    return NO_TEXT.sub("", _region(text, region, source) if region else text)


def _region(text: str, name: str, source: str) -> str:
    kept: list[str] = []
    depth = 0
    for line in text.splitlines(keepends=True):
        words = line.split()
        if words[:2] == ["#", "endregion"]:
            depth -= depth > 0
            if depth == 0 and kept:
                return textwrap.dedent("".join(kept)).strip("\n") + "\n"
        elif words[:2] == ["#", "region"]:
            depth += depth > 0 or words[2:] == [name]
        elif depth:
            kept.append(line)
    raise ValueError(f"{source}: there is no such region, or it does not end")


def refreshed(text: str, page: str) -> str:
    """The page with the text of its files in its blocks."""
    lines = text.splitlines(keepends=True)
    for block in reversed(list(blocks_of(text, page))):
        if block.source is not None:
            begin = block.line - 1
            lines[begin : begin + block.text.count("\n")] = [text_of(block.source)]
    return "".join(lines)
