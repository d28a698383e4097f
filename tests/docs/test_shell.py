"""Shell blocks of the documents run, without the commands that `elsewhere` lists."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from datadist_vllm.settings import Settings

from datadist.cli import COMMANDS
from tests.docs import elsewhere
from tests.docs.blocks import ROOT, Block, all_blocks
from tests.docs.shell import commands_of, words_of

SECONDS = 180.0
BLOCKS = [
    block
    for block in all_blocks()
    if block.language == "sh"
    and block.page not in elsewhere.TESTED_PAGES
    and (block.page, block.first) not in elsewhere.TESTED
]
PRINTS = {
    "cd examples/first": ["[1. 1. 1. 1.]"],
    "cd examples/prompt_decoder": ["request 3: CONSUMED", "request 3 is here"],
    "cd examples/layer_by_layer": ["sent 8 layers", "8 layers of two blocks are here"],
    "cd examples/overlap": ["asyncio: 64 pulls"],
    "python examples/kv_in_pool/kv_in_pool.py": ["blocks 3 and 4 of all layers are here"],
    "python overlap_asyncio.py   # tasks that are awaited, beside the synchronous loop":
        ["asyncio: 64 pulls", "threads: 64 pulls"],
    "DATADIST_JOB=blue python prompt.py & DATADIST_JOB=blue python decoder.py &":
        ["request 3: CONSUMED", "request 3 is here"],
    "mkdir datadist-acme && cd datadist-acme": ["shm"],
    "source /usr/local/Ascend/ascend-toolkit/set_env.sh": ["hccl"],
}  # fmt: skip
"""What a block prints, by its first line, besides that its commands succeed."""


def _named(block: Block) -> str:
    return block.name


def _run_here(block: Block) -> list[str]:
    return [each for each in commands_of(block.text) if elsewhere.reason(each) is None]


def _place(page: str, folder: Path) -> Path:
    """A folder that has what the commands of that page need of the checkout, by links."""
    (folder / "examples").symlink_to(ROOT / "examples")
    beside = {
        "examples/overlap/README.md": "examples/overlap",
        "docs/guide.md": "examples/prompt_decoder",
    }
    for path in (ROOT / beside[page]).iterdir() if page in beside else ():
        if not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize("block", [each for each in BLOCKS if _run_here(each)], ids=_named)
def test_the_commands_run(block: Block, tmp_path: Path) -> None:
    if "kv_in_pool" in block.text:
        pytest.importorskip("torch", reason="torch is not installed")
    for name in ("checkout", "run"):
        (tmp_path / name).mkdir(mode=0o700)
    environ = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DATADIST_RUNTIME_DIR": str(tmp_path / "run"),
        "DATADIST_JOB": "docs",
        "DATADIST_BACKEND": "shm",
    }
    commands = re.sub(r"(?:\.\./)*\.venv/bin/", "", "\n".join(_run_here(block)))  # see PATH
    shell = subprocess.Popen(
        ["bash", "-e", "-c", f"{commands}\nwait"],
        cwd=_place(block.page, tmp_path / "checkout"), env=environ, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = shell.communicate(timeout=SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)  # also what it has started
        shell.wait()
    assert shell.returncode == 0, said
    assert "Traceback" not in said, said
    for text in PRINTS.get(block.first, ()):
        assert text in said


@pytest.mark.fast
def test_what_is_looked_for_in_the_output_is_that_of_a_block() -> None:
    assert set(PRINTS) <= {block.first for block in BLOCKS if _run_here(block)}


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"datadist {name}", exit_on_error=False)
    importlib.import_module(f"datadist.cli.{name}").add_arguments(parser)
    return parser


@pytest.mark.fast
@pytest.mark.parametrize("block", BLOCKS, ids=_named)
def test_arguments_of_datadist_are_known(block: Block) -> None:
    """Also those of commands that are not run."""
    for command in commands_of(block.text):
        words = words_of(command.partition("<<")[0])
        if words and words[0].rpartition("/")[2] == "datadist":
            assert words[1] in COMMANDS, block.name
            _parser(words[1]).parse_args([word for word in words[2:] if word not in ("&", "|")])


@pytest.mark.fast
def test_the_arguments_are_really_checked() -> None:
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        _parser("bench").parse_args(["--nonsense"])


CONNECTORS = [
    (block.name, text)
    for block in BLOCKS
    for text in re.findall(r"'(\{\"kv_connector\".*?\})'", block.text, re.DOTALL)
]


@pytest.mark.fast
@pytest.mark.parametrize(("name", "text"), CONNECTORS)
def test_settings_of_the_connector_are_valid(name: str, text: str) -> None:
    given = json.loads(text)
    assert given["kv_connector"] == "DataDistConnector", name
    Settings.parse(given.get("kv_connector_extra_config", {}))


@pytest.mark.fast
def test_there_are_settings_of_the_connector() -> None:
    assert {name.partition(":")[0] for name, _ in CONNECTORS} == {
        "docs/vllm.md",
        "integrations/vllm/README.md",
    }
