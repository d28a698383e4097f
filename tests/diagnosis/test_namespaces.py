"""What `datadist doctor` says of namespaces, and of engines that could not be reached from here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from datadist.control import process
from datadist.diagnosis import Level, namespaces
from tests import namespaces as made
from tests import nodes, privileges
from tests.namespaces import Contained
from tests.nodes import Node
from tests.privileges import in_child

pytestmark = made.needed


@pytest.fixture
def contained(runtime_dir: Path) -> Iterator[Node]:
    """A node in a container that shares the runtime directory."""
    node = Contained({"DATADIST_RUNTIME_DIR": str(runtime_dir)})
    yield node
    node.close()


def test_without_engines_only_the_namespaces_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATADIST_RUNTIME_DIR", str(tmp_path / "none"))
    names = [finding.name for finding in namespaces.examine()]
    assert names == ["pid namespace", "user namespace"]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", ["pid", "user"])
def test_a_namespace_of_a_container(kind: str) -> None:
    def look() -> str:
        made.enter_new([kind])
        made.enter_new(["mount"])
        if kind == "pid":
            made.mount("proc", "/proc")
        return namespaces.namespace(kind, Path(f"/proc/self/ns/{kind}")).found

    assert "one of a container: " in in_child(look)


def test_a_proc_of_another_pid_namespace(tmp_path: Path) -> None:
    def look() -> list[str]:
        made.enter_new(["pid"])
        return [finding.name for finding in namespaces.examine()]

    assert "'/proc'" in in_child(look)


def test_engines_that_can_be_reached_are_no_finding(
    start_node: Callable[..., Node], runtime_dir: Path
) -> None:
    start_node(1)
    assert list(namespaces.engines(runtime_dir)) == []


def test_the_host_reaches_an_engine_of_a_container(contained: Node, runtime_dir: Path) -> None:
    contained.do(nodes.init, 2)
    assert list(namespaces.engines(runtime_dir)) == []


def test_an_engine_of_another_pid_namespace(
    start_node: Callable[..., Node], contained: Node, runtime_dir: Path
) -> None:
    start_node(1)
    text = contained.do(_examine, str(runtime_dir))
    assert text.startswith("NOTE engine of cluster 1: its registered memory cannot be reached")
    assert "another pid namespace" in text


def test_an_engine_that_may_not_be_read(start_node: Callable[..., Node], runtime_dir: Path) -> None:
    start_node(1)
    looking = start_node()
    looking.do(privileges.drop_ptrace)
    assert "capabilities that this process lacks" in looking.do(_examine, str(runtime_dir))


def test_an_engine_of_another_user(
    start_node: Callable[..., Node], runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_node(1)
    real = process.peer_of
    monkeypatch.setattr(namespaces, "peer_of", lambda sock: (real(sock)[0], privileges.NOBODY))
    (finding,) = namespaces.engines(runtime_dir)
    assert finding.level is Level.NOTE
    assert f"it belongs to user {privileges.NOBODY}" in finding.found


def _examine(here: nodes.Here, path: str) -> str:
    del here
    findings = namespaces.engines(Path(path))
    return "\n".join(f"{each.level.name} {each.name}: {each.found}" for each in findings)
