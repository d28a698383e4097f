"""The tutorial docs/several_hosts.md: all its blocks run, between two network namespaces."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from datadist.testing import installed
from datadist.transports.loader import BackendError, choose_backend
from tests import hosts

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "several_hosts.md").read_text()
SECONDS = 180
LOGGED = re.compile(r"^\[cluster .*\n", re.M)
"""What the log has on a slow machine: that a link waits."""
ANCHOR = "mount -t tmpfs none /run && echo up && exec cat"
"""Names of network namespaces are files below /run: here in one that ends with this process."""

pytestmark = hosts.needed


@dataclass(frozen=True)
class Block:
    """A block of code of the page."""

    language: str
    text: str

    @property
    def place(self) -> str:
        """Where its commands are to be entered: what its first line says."""
        return self.text.partition("\n")[0].removeprefix("# ")


BLOCKS = [Block(*found) for found in re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.M | re.S)]


def _texts(language: str) -> list[str]:
    return [block.text for block in BLOCKS if block.language == language]


def _commands(*places: str) -> str:
    """The commands that are entered at one of these places, in the order of the page."""
    return "\n".join(b.text for b in BLOCKS if b.language == "sh" and b.place in places)


class Machine:
    """A machine in which the names of network namespaces are its own; with the two hosts of the page."""

    def __init__(self, folder: Path, environ: dict[str, str], backend: str) -> None:
        self._folder, self._environ, self._backend = folder, environ, backend
        self._anchor = subprocess.Popen(
            ["unshare", "--mount", "--net", "sh", "-c", ANCHOR],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        try:
            assert self._anchor.stdout is not None
            assert self._anchor.stdout.readline() == b"up\n"
            making, *_ = (b.text for b in BLOCKS if b.place == "this machine")
            self.run(None, making)
        except BaseException:
            self.close()
            raise

    def place(self, host: int | None) -> Path:
        """The folder of a host, or of the machine itself."""
        folder = self._folder / (f"host{host}" if host else "machine")
        folder.mkdir(exist_ok=True)
        return folder

    def start(self, host: int | None, commands: str) -> subprocess.Popen[str]:
        """Enter commands on a host, or on the machine itself."""
        enter = ["nsenter", "--target", str(self._anchor.pid), "--mount", "--net"]
        if host:
            enter += ["ip", "netns", "exec", f"host{host}"]
        place = self.place(host)
        script = f"set -e\ncd {place}\n{commands.replace('nixl', self._backend)}"
        return subprocess.Popen(
            [*enter, "bash", "-c", script],
            env=self._environ | {"DATADIST_RUNTIME_DIR": str(place / "run")},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, host: int | None, commands: str) -> str:
        """What commands have printed; they must succeed."""
        return _output(self.start(host, commands))

    def close(self) -> None:
        """End it, and all that it holds."""
        self._anchor.kill()
        self._anchor.communicate()


def _output(process: subprocess.Popen[str], code: int = 0) -> str:
    try:
        said, _ = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code, said
    return said


def _can_be_used(backend: str) -> bool:
    with installed({"tcp": "tests.tcp_pair_engine:TcpPairTransport"}):
        try:
            choose_backend(backend, {})
        except BackendError:
            return False
    return True


BACKENDS = ["tcp", *(name for name in ("nixl",) if _can_be_used(name))]


@pytest.fixture(params=BACKENDS)
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    """The hosts with the files of the page, and the key on both."""
    with installed({"tcp": "tests.tcp_pair_engine:TcpPairTransport"}) as folder:
        paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environ = {**os.environ, "PATH": paths, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
        for name in ("DATADIST_AUTH_KEY", "DATADIST_BACKEND"):
            environ.pop(name, None)
        machine = Machine(tmp_path, environ, request.param)
        try:
            tables, (program,) = _texts("json"), _texts("python")
            for host in (1, 2):
                files = zip(
                    ("ranks.json", "ranks3.json", "move.py"), (*tables, program), strict=True
                )
                for name, text in files:
                    (machine.place(host) / name).write_text(text)
            key = next(b.text for b in BLOCKS if b.place == "host 1" and "> key" in b.text)
            machine.run(1, key)
            assert (machine.place(1) / "key").stat().st_mode & 0o777 == 0o600
            shutil.copy(machine.place(1) / "key", machine.place(2))
            yield machine
        finally:
            machine.close()


PLACES = {
    "this machine",
    "host 1",
    "host 2",
    "both hosts",
    "host 1, mixed",
    "host 2, mixed",
    "both hosts, mixed",
}


def test_every_block_is_entered_somewhere() -> None:
    assert {block.language for block in BLOCKS} == {"sh", "json", "python", "text"}
    for block in BLOCKS:
        assert block.language != "sh" or block.place in PLACES, block.text
    assert len(BLOCKS) == len(re.findall(r"^```\w", PAGE, re.M))


def _without_key(commands: str) -> str:
    return "\n".join(line for line in commands.splitlines() if "secrets.token_hex" not in line)


def test_the_page_runs(machine: Machine, request: pytest.FixtureRequest) -> None:
    backend = request.node.callspec.params["machine"]
    running = [
        machine.start(host, _without_key(_commands("both hosts", f"host {host}")))
        for host in (1, 2)
    ]
    outputs = [_output(process) for process in running]
    checked, first, second, _ = (text.replace("nixl", backend) for text in _texts("text"))
    for said, printed in zip(outputs, (first, second), strict=True):
        assert f"{backend}: works here" in said
        assert checked in said
        assert LOGGED.sub("", said).endswith(printed), said


def test_a_host_that_has_not_started(machine: Machine) -> None:
    """The second host says what the page says."""
    program = machine.place(2) / "move.py"
    program.write_text(program.read_text().replace("link_total_time = 60", "link_total_time = 3"))
    exports = "\n".join(
        line for line in _commands("both hosts").splitlines() if line.startswith("export")
    )
    said = _output(machine.start(2, f"{exports}\npython move.py 2 10.0.0.2 ranks.json"), 1)
    for line in _texts("text")[-1].splitlines():  # between them are engines of other runs
        assert line.rstrip(";") in said
    without = exports.replace("$(cat key)", "''")
    said = _output(machine.start(2, f"{without}\npython move.py 2 10.0.0.2 ranks.json"), 1)
    assert "DATADIST_AUTH_KEY" in said


def test_the_kit_is_run_as_the_page_says(machine: Machine) -> None:
    _, checking = (b.text for b in BLOCKS if b.place == "this machine")
    said = machine.run(None, f"export DATADIST_BACKEND=nixl\n{checking}")
    assert "7 passed, 0 failed, 0 skipped" in said


@pytest.mark.skipif(
    not _can_be_used("shm+tcp"),
    reason="capabilities of this version: no combination of transports",
)
def test_near_and_far_engines_in_one_domain(machine: Machine) -> None:
    key = "export DATADIST_AUTH_KEY=$(cat key)\n"
    running = [
        machine.start(host, key + _commands("both hosts, mixed", f"host {host}, mixed"))
        for host in (1, 2)
    ]
    first, second = (_output(process) for process in running)
    for cluster in (2, 3):
        assert f"cluster {cluster} has 4 MiB" in first
    for said in (first, second):
        assert "pulled 4 MiB, all of it right" in said
        assert "   2        3  10.0.0.2       0" in said
