"""Runs of the tests in virtual machines: one, or several on a wire with a lab that serves them."""

from __future__ import annotations

import compileall
import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roce.harness import initramfs, kernel
from roce.harness.machine import Boot, Machine
from roce.harness.wire import NAMES, Wire

from tests.skips import REQUIRED

ROOT = Path(__file__).resolve().parents[4]
RESULTS = ROOT / "build" / "roce"
GUEST = "DATADIST_ROCE_GUEST"
"""Set in guests, to the name of the machine."""


@dataclass(frozen=True)
class Group:
    """What the tests of a folder need."""

    machines: int
    seconds: float = 1800
    """On an idle machine a run takes a sixth of that."""


GROUPS = {
    "one_host": Group(1),
    "two_hosts": Group(2),
    "three_hosts": Group(3),
    "combined_kit": Group(1, seconds=9000),
}
ADDRESSES = {
    name: f"10.99.0.{number}/24 fd00:99::{number}/64" for number, name in enumerate(NAMES, 1)
}


def run(group: str, tests: Sequence[str]) -> tuple[Path, str]:
    """Run tests of a group (a folder of tests) in fresh machines.

    Returns the file of their reports, and what went wrong with the machine ("" if nothing).
    Raises :class:`kernel.Unavailable`.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "datadist" / "roce"
    found = kernel.fetch(cache)
    results = RESULTS / group
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    for folder in ("datadist", "plugins", "tests"):
        compileall.compile_dir(ROOT / folder, quiet=2)
    with tempfile.TemporaryDirectory(prefix="roce-") as scratch:
        initrd = Path(scratch) / "initrd"
        initramfs.build(found, initrd)
        needs = GROUPS[group]
        boot = Boot(found.image, initrd, cpus=2 if needs.machines == 1 else 1)
        runner = _alone if needs.machines == 1 else _on_a_wire
        return runner(needs, boot, Path(scratch), results, tests)


def _alone(
    needs: Group, boot: Boot, sockets: Path, results: Path, tests: Sequence[str]
) -> tuple[Path, str]:
    machine = _tester(boot, results / "a", tests, sockets, None)
    machine.start()
    machine.wait(needs.seconds)
    return machine.out / "reports", _trouble(machine)


def _on_a_wire(
    needs: Group, boot: Boot, sockets: Path, results: Path, tests: Sequence[str]
) -> tuple[Path, str]:
    """The first machine runs the tests, the others an agent."""
    names = NAMES[: needs.machines]
    wire = Wire(sockets, names)
    tester = _tester(boot, results / "a", tests, sockets, wire)
    job = f"cd {ROOT}\nexec {sys.executable} -m plugins.rdma.roce.harness.agent\n"
    others = {
        name: Machine(name, boot, results / name, job, _environ(name, "eth0"), sockets, wire)
        for name in names[1:]
    }
    try:
        with contextlib.ExitStack() as stack:
            for machine in (tester, *others.values()):
                machine.start()
                stack.callback(machine.power_off)
            stack.enter_context(_lab(tester, others, wire))
            tester.wait(needs.seconds)
    finally:
        wire.close()
    trouble = _trouble(tester)
    if trouble:
        for name, other in others.items():
            trouble += f"\n-- machine {name} --\n{other.last_words()}"
    return tester.out / "reports", trouble


def _tester(
    boot: Boot, out: Path, tests: Sequence[str], sockets: Path, wire: Wire | None
) -> Machine:
    out.mkdir(parents=True)
    (out / "tests").write_text("\n".join(tests))
    job = (
        f"cd {ROOT}\nexec {sys.executable} -m pytest -v -p no:cacheprovider "
        "--basetemp=/var/tmp/pytest @/run/out/tests\n"
    )
    environ = _environ("a", "dummy0" if wire is None else "eth0")
    return Machine("a", boot, out, job, environ, sockets, wire)


def _environ(name: str, device: str) -> dict[str, str]:
    return {
        GUEST: name,
        "ROCE_DEVICE": device,
        "ROCE_ADDRESSES": ADDRESSES[name],
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        REQUIRED: os.environ.get(REQUIRED, ""),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'plugins' / 'rdma'}",
    }


def _trouble(machine: Machine) -> str:
    if machine.status in (0, 1):  # pytest's status when all passed, or some failed
        return ""
    job = machine.out / "job.log"
    log = job.read_text(errors="replace")[-3000:] if job.exists() else ""
    what = "ended without a status" if machine.status is None else f"status {machine.status}"
    return f"the machine {what}\n-- job --\n{log}\n-- console --\n{machine.last_words()}"


@contextlib.contextmanager
def _lab(tester: Machine, others: Mapping[str, Machine], wire: Wire) -> Iterator[None]:
    """Serve the tester's requests over its serial line: one JSON object a line, both ways."""
    line = tester.connect_lab()

    def serve() -> None:
        with contextlib.suppress(OSError), line.makefile("rb") as requests:
            for text in requests:
                try:
                    answer = _obey(json.loads(text), others, wire)
                except Exception as error:
                    answer = {"error": f"{type(error).__name__}: {error}"}
                line.sendall(json.dumps(answer).encode() + b"\n")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            line.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        line.close()


def _obey(request: dict[str, Any], others: Mapping[str, Machine], wire: Wire) -> dict[str, Any]:
    order = request["do"]
    machine = others[request.get("machine", "b")]
    if order == "power_off":
        machine.power_off()
    elif order == "power_on":
        machine.start()
    elif order == "wire":
        wire.cut, wire.loss, wire.lost = request["cut"], request["loss"], 0
    elif order == "watch":
        wire.watch()
    elif order == "seen":
        seen = [[name, tos, code, n] for (name, tos, code), n in wire.seen().items()]
        return {"packets": seen, "lost": wire.lost}
    else:
        raise ValueError(f"unknown order {order!r}")
    return {}
