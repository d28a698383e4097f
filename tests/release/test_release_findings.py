"""`make release-check` finds nothing in a release as it should be, and each defect that is put in."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from release.check import plan, state_of_git
from release.distributions import DISTRIBUTIONS, ROOT, version_of
from release.files import read
from release.findings import findings
from tests.release.made_release import (
    METADATA,
    VERSION,
    load,
    make_files,
    make_tree,
    tags,
    write_sdist,
    write_wheel,
)  # fmt: skip

pytestmark = pytest.mark.fast
CORE, SHM, RDMA = DISTRIBUTIONS[:3]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_tree(tmp_path)
    make_files(tmp_path)
    return tmp_path


def _found(root: Path) -> list[str]:
    return list(findings(load(root)))


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_nothing_is_found_in_a_release_as_it_should_be(root: Path) -> None:
    assert _found(root) == []


def test_a_version_of_its_own(root: Path) -> None:
    _replace(root / "plugins/rdma/pyproject.toml", VERSION, "1.2.1")
    first, *others = _found(root)
    assert first == (
        "plugins/rdma/pyproject.toml has version 1.2.1, datadist has 1.2.0: set the same one in both"
    )
    assert all("pyproject.toml differs from the working tree" in each for each in others)


def test_a_new_version_without_new_files(root: Path) -> None:
    for each in DISTRIBUTIONS:
        _replace(root / each.folder / "pyproject.toml", VERSION, "1.3.0")
    found = _found(root)
    assert "datadist-1.2.0.tar.gz has version 1.2.0, expected 1.3.0" in found
    assert "CHANGELOG.md begins with 1.2.0: expected a section for 1.3.0" in found
    assert "datadist_shm-1.2.0.tar.gz requires datadist<1.3,>=1.2, which 1.3.0 is not" in found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# Changes\n", "CHANGELOG.md begins with nothing: expected a section for 1.2.0"),
        (
            "# Changes\n\n## 1.1.0 (2025-01-31)\n\n- Something.\n",
            "CHANGELOG.md begins with 1.1.0: expected a section for 1.2.0",
        ),
        (
            "# Changes\n\n## 1.2.0 (not released)\n\n- Something.\n",
            "CHANGELOG.md says '1.2.0 (not released)': write the day of the release, as in "
            "'1.2.0 (2026-01-31)'",
        ),
        (
            "# Changes\n\n## 1.2.0 (2026-01-31)\n\n## 1.1.0 (2025-01-31)\n\n- Something.\n",
            "the section for 1.2.0 in CHANGELOG.md has no entry",
        ),
    ],
)
def test_a_changelog_that_lacks_the_release(root: Path, text: str, said: str) -> None:
    (root / "CHANGELOG.md").write_text(text)
    assert _found(root) == [said]


@pytest.mark.parametrize("tag", tags(SHM))
def test_a_missing_wheel_of_the_extension(root: Path, tag: str) -> None:
    (root / "dist" / f"datadist_shm-{VERSION}-{tag}.whl").unlink()
    wanted = tag.replace(tag.split("-")[2].split(".", maxsplit=1)[0] + ".", "")
    assert _found(root) == [f"datadist-shm: no wheel {wanted} in dist/; run make wheels"]


def test_a_wheel_for_this_machine_only(root: Path) -> None:
    tag = tags(SHM)[0]
    (root / "dist" / f"datadist_shm-{VERSION}-{tag}.whl").unlink()
    write_wheel(root / "dist", SHM, "cp310-cp310-linux_x86_64")
    assert _found(root) == [
        "datadist-shm: no wheel cp310-cp310-manylinux_2_17_x86_64 in dist/; run make wheels"
    ]


def test_a_missing_sdist_and_pure_wheel(root: Path) -> None:
    for path in (root / "dist").glob("datadist_rdma-*"):
        path.unlink()
    assert _found(root) == [
        "datadist-rdma: expected one sdist in dist/; run make wheels",
        "datadist-rdma: no wheel py3-none-any in dist/; run make wheels",
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("Summary: What it is\n", "has no summary"),
        ("License-Expression: Apache-2.0\n", "names no licence (License-Expression)"),
        ("License-File: LICENSE\n", "has no licence file"),
        ("Classifier: Operating System :: POSIX :: Linux\n", "has no classifiers"),
        ("Requires-Python: >=3.10\n", "requires Python None, expected 3.10 or later"),
        ("\n# {name}\n", "has no readme in Markdown"),
        ("Description-Content-Type: text/markdown\n", "has no readme in Markdown"),
    ],
)
def test_metadata_that_lacks_something(root: Path, line: str, said: str) -> None:
    assert line in METADATA
    write_wheel(root / "dist", RDMA, "py3-none-any", METADATA.replace(line, ""))
    assert _found(root) == [f"datadist_rdma-{VERSION}-py3-none-any.whl {said}"]


def test_a_licence_that_is_another(root: Path) -> None:
    (root / "LICENSE").write_bytes(b"Apache License, corrected\n")
    found = _found(root)
    for path in (root / "dist").iterdir():
        assert f"{path.name}: LICENSE is not the LICENSE of this repository" in found


def test_a_library_of_somebody_else(root: Path) -> None:
    others = ("datadist_shm.libs/libfoo.so.1",)
    write_wheel(root / "dist", SHM, tags(SHM)[0], others=others)
    (said,) = _found(root)
    assert "has the libraries ['datadist_shm.libs/libfoo.so.1', 'datadist_shm/_native.so']" in said


def test_files_that_are_older_than_the_tree(root: Path) -> None:
    with (root / "plugins/rdma/pyproject.toml").open("a") as file:
        file.write("# new\n")
    assert _found(root) == [
        f"datadist_rdma-{VERSION}.tar.gz: pyproject.toml differs from the working tree; "
        "run make wheels"
    ]


def test_a_file_of_another_project(root: Path) -> None:
    write_sdist(root / "dist", CORE, METADATA.replace("{name}", "other"))
    assert "datadist: expected one sdist in dist/; run make wheels" in _found(root)
    assert (
        f"datadist-{VERSION}.tar.gz is of no distribution of this repository: remove it"
        in _found(root)
    )


@pytest.mark.parametrize("metadata", ["Name: datadist\n", METADATA.replace("{version}", "one")])
def test_metadata_that_is_wrong(root: Path, metadata: str) -> None:
    write_wheel(root / "dist", RDMA, "py3-none-any", metadata)
    with pytest.raises(
        ValueError, match=r"^the metadata of datadist_rdma-.*\.whl is wrong: .*ersion"
    ):
        read(root / "dist" / f"datadist_rdma-{VERSION}-py3-none-any.whl")


def _git(root: Path, *arguments: str) -> None:
    who = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.com"}
    who |= {"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@example.com"}
    subprocess.run(["git", *arguments], cwd=root, env={**os.environ, **who}, check=True)


def test_the_state_of_git(root: Path) -> None:
    (root / ".gitignore").write_text("dist/\n")
    _git(root, "init", "--quiet")
    _git(root, "add", ".")
    _git(root, "commit", "--quiet", "--message", "All")
    assert list(state_of_git(root, VERSION)) == []
    assert "git tag -s v1.2.0" in plan(load(root))
    (root / "LICENSE").write_text("")
    assert list(state_of_git(root, VERSION)) == [
        "1 files are not committed, such as LICENSE: commit them"
    ]
    _git(root, "tag", "v1.2.0")
    _git(root, "commit", "--quiet", "--all", "--message", "More")
    assert list(state_of_git(root, VERSION)) == [
        "the tag v1.2.0 is on another commit: raise the version, or check the tag out"
    ]
    _git(root, "tag", "--force", "v1.2.0")
    assert list(state_of_git(root, VERSION)) == []


def test_what_is_uploaded_comes_after_what_it_needs(root: Path) -> None:
    _git(root, "init", "--quiet")
    lines = [line for line in plan(load(root)).splitlines() if "twine upload" in line]
    assert [line.split("dist/")[1].split("-")[0] for line in lines] == [
        each.stem for each in DISTRIBUTIONS if each.uploaded
    ]
    assert all("datadist_ucx" not in line for line in lines)


def test_the_distributions_of_this_repository_have_one_version_and_licence() -> None:
    assert len({version_of(each) for each in DISTRIBUTIONS}) == 1
    licence = (ROOT / "LICENSE").read_bytes()
    assert {(ROOT / each.folder / "LICENSE").read_bytes() for each in DISTRIBUTIONS} == {licence}


def test_no_distribution_of_this_repository_is_forgotten() -> None:
    folders = {path.parent for path in ROOT.glob("*/*/pyproject.toml") if "build" not in path.parts}
    assert {ROOT / each.folder for each in DISTRIBUTIONS} == folders | {ROOT}
