"""Files of the code that the documents name exist, and limits have the numbers that are documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

from datadist.control.account import Item
from datadist.control.tcp import HANDSHAKE_SECONDS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("plugins/*/README.md")])
BESIDE = (
    "",
    "datadist",
    "plugins/rdma",
    "plugins/hccl",
    "plugins/shm",
    "plugins/nixl",
    "examples/datadist-ucx",
)
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


LIMITED = {
    module: importlib.import_module(f"datadist.control.{module}")
    for module in ("account", "turns", "places", "messages", "session", "discovery", "listener",
                   "network_discovery", "closing")
} | {"requests": importlib.import_module("datadist.caches.requests")}  # fmt: skip
NO_LIMITS = {
    "listener.MAX_HANDSHAKES",  # by the process's descriptor limit: said in words
    "messages.WIRE_VERSION",
    "messages.NO_ANSWER",
    "session.CHUNK",
    "session.TOGETHER",
    "session.KERNEL_FDS",
    "session.DRAIN_SECONDS",
    "session.RETRY_SECONDS",
    "session.STALLED_SECONDS",
    "session.TRUNCATED",
    "session.READ",
    "session.WRITE",
    "discovery.RETRY_SECONDS",
    "discovery.REFUSAL_SECONDS",
    "listener._PAUSE_SECONDS",
    "network_discovery.AGAIN",
    "network_discovery.AGAIN_SECONDS",
    "network_discovery.MAX_REPORTED",
    "closing.STOP_SECONDS",
}


def _own_numbers(module: ModuleType) -> dict[str, float]:
    """Constants that a module assigns itself; those that it imports are another one's."""
    tree = ast.parse(inspect.getsource(module))
    names: list[ast.expr] = []
    for node in tree.body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                names += target.elts if isinstance(target, ast.Tuple) else [target]
    found = {name.id: getattr(module, name.id) for name in names if isinstance(name, ast.Name)}
    return {n: v for n, v in found.items() if n.isupper() and isinstance(v, (int, float))}


def _limits() -> dict[str, float]:
    found = {f"Item.{item.name}": float(item.limit) for item in Item}
    for name, module in LIMITED.items():
        found |= {f"{name}.{const}": number for const, number in _own_numbers(module).items()}
    found["tcp.HANDSHAKE_SECONDS"] = HANDSHAKE_SECONDS
    return {name: number for name, number in found.items() if name not in NO_LIMITS}


def test_every_limit_on_peers_is_documented_with_its_number() -> None:
    text = (ROOT / "docs" / "constraints.md").read_text()
    rows = re.findall(r"^\| (.+) \| ([\d.]+) \| `([\w.]+)` \|$", text, re.MULTILINE)
    assert {name: float(number) for _, number, name in rows} == _limits()
    words = {name: what for what, _, name in rows}
    for item in Item:
        assert item.words in words[f"Item.{item.name}"]
    assert "64 at least and 1024 at\nmost" in text
    assert 64 <= LIMITED["listener"].MAX_HANDSHAKES <= 1024
