"""Every block of code in the documents is the text of a file that runs, is run, or has a reason."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from datadist.rank_table import parse_rank_table
from datadist.testing import TransportConformance
from tests.docs import elsewhere
from tests.docs.blocks import ROOT, Block, all_blocks, blocks_of, refreshed, text_of
from tests.docs.scripts import RUN_BY
from tests.docs.shell import commands_of, words_of

BLOCKS = all_blocks()
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

pytestmark = pytest.mark.fast


def _named(block: Block) -> str:
    return block.name


def _is_listed(block: Block) -> bool:
    key = block.page, block.first
    return block.page in elsewhere.TESTED_PAGES or key in elsewhere.TESTED or key in elsewhere.SHOWN


def _check(block: Block) -> None:
    """Raise unless something runs the block, or a reason is given."""
    if block.source is not None:
        _check_source(block)
    elif not _is_listed(block):
        assert block.language in CHECKS, (
            f"{block.name}: nothing runs this {block.language or 'unnamed'} block; take its text from a "
            "script of examples/ (tests/docs/blocks.py), or list it in tests/docs/elsewhere.py"
        )
        CHECKS[block.language](block)


def _check_source(block: Block) -> None:
    assert block.source is not None
    path = block.source.partition("#")[0]
    assert block.text == text_of(block.source), f"{block.name}: run python -m tests.docs"
    if path.endswith(".py"):
        assert path in RUN_BY, f"{block.name}: no test runs {path}, see tests/docs/scripts.py"
    else:
        CHECKS[block.language](block)


def _check_table(block: Block) -> None:
    assert parse_rank_table(block.text).address_problems() == []


def _check_python(block: Block) -> None:
    """It is complete: classes of the conformance kit, with the attributes that the kit knows."""
    names: dict[str, object] = {}
    exec(compile(block.text, block.name, "exec"), names)
    classes = [each for name, each in names.items() if name.startswith("Test")]
    assert classes, f"{block.name}: what runs nothing shows nothing; take it from a script"
    for each in classes:
        assert isinstance(each, type)
        assert issubclass(each, TransportConformance)
        known = {name for base in TransportConformance.__mro__ for name in vars(base)}
        known |= {name for base in TransportConformance.__mro__ for name in _annotated(base)}
        assert {name for name in vars(each) if not name.startswith("__")} <= known, block.name


def _annotated(kind: type) -> set[str]:
    return set(vars(kind).get("__annotations__", ()))


def _check_shell(block: Block) -> None:
    """What is not run has targets and arguments that exist; the rest runs in test_shell.py."""
    for command in commands_of(block.text):
        words = words_of(command.partition("<<")[0])
        if words and words[0] == "make":
            assert words[1] in TARGETS, f"{block.name}: the Makefile has no target {words[1]}"


CHECKS = {"json": _check_table, "python": _check_python, "sh": _check_shell}


@pytest.mark.parametrize("block", BLOCKS, ids=_named)
def test_a_block_runs(block: Block) -> None:
    _check(block)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("```python\nprint(1)\n```\n", "runs nothing"),
        ("```\nwhat is printed\n```\n", "nothing runs this unnamed block"),
        ("```yaml\na: 1\n```\n", "nothing runs this yaml block"),
        ("```sh\nmake nonsense\n```\n", "no target nonsense"),
        ('```json\n{"version": "1.0"}\n```\n', "server_list"),
        ("<!-- from examples/first/first.py -->\n```python\nother\n```\n", "python -m tests.docs"),
        ("<!-- from tests/ports.py -->\n```python\n```\n", "python -m tests.docs"),
        ("<!-- from examples/first/first.py#nonsense -->\n```python\n```\n", "no such region"),
    ],
)
def test_a_block_that_nothing_runs_is_refused_by_name(text: str, words: str) -> None:
    (block,) = blocks_of(text, "docs/new.md")
    with pytest.raises((AssertionError, ValueError), match=words):
        _check(block)


def test_a_script_that_no_test_runs_is_refused() -> None:
    (block,) = blocks_of(
        refreshed("<!-- from tests/ports.py -->\n```python\n```\n", "x"), "docs/new.md"
    )
    with pytest.raises(AssertionError, match=r"no test runs tests/ports\.py"):
        _check(block)


def test_what_is_listed_is_there_once() -> None:
    keys = Counter((block.page, block.first) for block in BLOCKS)
    for key in [*elsewhere.TESTED, *elsewhere.SHOWN]:
        assert keys[key] == 1, key
    pages = {block.page for block in BLOCKS}
    assert set(elsewhere.TESTED_PAGES) <= pages
    for test in [*elsewhere.TESTED.values(), *elsewhere.TESTED_PAGES.values(), *RUN_BY.values()]:
        assert (ROOT / test).is_file(), test


def test_reasons_are_needed() -> None:
    commands = [
        command
        for block in BLOCKS
        if block.language == "sh" and not _is_listed(block)
        for command in commands_of(block.text)
    ]
    for pattern in elsewhere.NOT_HERE:
        assert any(re.match(pattern, command) for command in commands), pattern


def test_pages_are_refreshed_as_a_whole() -> None:
    page = "before\n<!-- from examples/first/ranks.json -->\n```json\nold\n```\nafter\n"
    fresh = refreshed(page, "x")
    assert fresh.startswith("before\n")
    assert fresh.endswith("```\nafter\n")
    assert "old" not in fresh
    assert refreshed(fresh, "x") == fresh


def test_all_kinds_of_pages_have_blocks() -> None:
    folders = {block.page.partition("/")[0] for block in BLOCKS}
    assert {"README.md", "docs", "examples", "plugins", "integrations"} <= folders


def test_fences_end() -> None:
    for text in ("```python\nx = 1\n", "  ```python\n  x = 1\n  ```\n"):
        with pytest.raises(ValueError, match=r"docs/new\.md:1: a fence"):
            list(blocks_of(text, "docs/new.md"))
