"""Compare this library with other engines on one host: same workloads, same run, in turns.

    python benchmarks/compare.py                    # everything that is installed
    python benchmarks/compare.py paged-gqa latency --only nixl --rounds 5 --json result.json

Everything runs in a network namespace that has only the loopback device, because some engines listen
on every address they find. That needs `unshare` (util-linux) and root, or user namespaces.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from contenders import CONTENDERS, Contender
from tables import described, markdown, replaced

from datadist.base.digits import number_argument
from datadist.bench.shapes import ONE_BLOCK, SHAPES, Shape
from datadist.cli.tables import render

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
INSIDE = "DATADIST_COMPARE_INSIDE"
SECONDS = 180.0
SHAPES_HERE: dict[str, Shape] = {
    **SHAPES,
    "paged-gqa": replace(SHAPES["paged-gqa"], blocks=1024, title="256 of 1024 blocks of 32 KiB"),
    "latency": ONE_BLOCK,
    "push": replace(ONE_BLOCK, name="push", title="one block of 4 KiB, pushed"),
    "link": replace(ONE_BLOCK, name="link", blocks=16384 - 64),
}
"""As in `datadist bench`; smaller caches around the same transfers, and a pool of 64 MiB for link."""


class Failed(Exception):
    """A contender cannot do a workload; the text says why."""


def main() -> int:
    """Parse, enter the namespace, run, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=", ".join(SHAPES_HERE))
    parser.add_argument("--only", action="append", default=[], metavar="TEXT",
                        help="contenders whose name contains it; may be given again")  # fmt: skip
    parser.add_argument("--rounds", type=number_argument(1), default=3, metavar="N")
    parser.add_argument(
        "--pulls",
        type=number_argument(1),
        default=5,
        metavar="N",
        help="per round, after the first",
    )
    parser.add_argument("--quick", action="store_true", help="small caches, to try it out")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--write", action="store_true",
                        help="replace the tables between the markers of docs/benchmarks.md")  # fmt: skip
    args = parser.parse_args()
    unknown = [name for name in args.workloads if name not in SHAPES_HERE]
    if unknown:
        parser.error(f"there is no workload {unknown[0]}")
    if INSIDE not in os.environ:
        return _enter_namespace()
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    names = args.workloads or list(SHAPES_HERE)
    chosen = [c for c in CONTENDERS if not args.only or any(t in c.name for t in args.only)]
    results = []
    for name in names:
        shape = SHAPES_HERE[name]
        if args.quick and name in SHAPES:
            shape = shape.quick()
        results += _workload(name, shape, chosen, args.rounds, args.pulls)
        print(_table(name, shape, [r for r in results if r["workload"] == name]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.write:
        PAGE.write_text(
            replaced(PAGE.read_text(), markdown(results, described(args.rounds, args.pulls)))
        )
    return 0


def _enter_namespace() -> int:
    """Run again where only the loopback device exists."""
    if not shutil.which("unshare") or not shutil.which("ip"):
        print("needs unshare (util-linux) and ip (iproute2)", file=sys.stderr)
        return 2
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    command = ["unshare", *user, "--net", sys.executable, *sys.argv]
    return subprocess.run(command, env={**os.environ, INSIDE: "1"}, check=False).returncode


def _workload(
    name: str, shape: Shape, contenders: list[Contender], rounds: int, pulls: int
) -> list[dict[str, Any]]:
    """Rounds in which every contender has its turn; the medians are over all rounds."""
    found: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        for contender in contenders:
            if name not in contender.workloads or "failed" in found.get(contender.name, {}):
                continue
            print(f"{name}, round {number + 1}: {contender.name}", file=sys.stderr, flush=True)
            entry = found.setdefault(
                contender.name, {"contender": contender.name, "workload": name, "bytes": shape.nbytes,
                                 "cold": [], "warm": [], "connect": [], "owner_cpu": []},
            )  # fmt: skip
            try:
                for key, values in _turn(contender, name, shape, pulls).items():
                    entry[key] += values
            except Failed as error:
                entry["failed"] = str(error)
    return list(found.values())


def _turn(contender: Contender, name: str, shape: Shape, pulls: int) -> dict[str, list[float]]:
    """One pair of processes from its start to its end."""
    direction = "push" if name == "push" else "pull"
    with tempfile.TemporaryDirectory(prefix="datadist-compare-") as place:
        environ = {**contender.environ, "DATADIST_RUNTIME_DIR": place}
        owner = _Process(contender.owner, environ, contender, shape, direction)
        mover = _Process(contender.mover, environ, contender, shape, direction)
        try:
            card = owner.call("card")
            owner.call("expect")
            cpu = -owner.call("cpu")
            count = 2000 if name in ("latency", "push") else pulls
            measured: dict[str, list[float]] = mover.call("measure", card, count)
            cpu += owner.call("cpu")
            target, lists = owner if direction == "push" else mover, shape.lists(count + 1)
            target.call("clear")
            mover.call("move", lists)
            if target.call("problems", lists):
                raise Failed("bytes are wrong")
            mover.call("close")
            owner.call("close")
            return {**measured, "owner_cpu": [cpu]}
        finally:
            mover.end()
            owner.end()


class _Process:
    """An owner or a mover in a process that was started with the contender's environment."""

    def __init__(
        self, target: str, environ: dict[str, str], contender: Contender, shape: Shape,
        direction: str,
    ) -> None:  # fmt: skip
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        before = dict(os.environ)
        os.environ.update(environ)
        try:
            self._process = context.Process(
                target=_serve,
                args=(theirs, target, {**contender.tuning, "direction": direction}, shape),
                daemon=True,
            )
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()
        try:
            self._result()
        except Failed:
            self.end()
            raise

    def call(self, method: str, *args: Any) -> Any:
        """Run a method over there."""
        self._pipe.send((method, args))
        return self._result()

    def _result(self) -> Any:
        if not self._pipe.poll(SECONDS):
            raise Failed(f"nothing happened for {SECONDS:g} s")
        try:
            ok, value = self._pipe.recv()
        except EOFError:
            raise Failed("its process has ended") from None
        if not ok:
            raise Failed(value)
        return value

    def end(self) -> None:
        """End the process, by force if need be."""
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(pipe: Connection, target: str, tuning: dict[str, str], shape: Shape) -> None:
    module, _, name = target.partition(":")
    try:
        side = getattr(importlib.import_module(module), name)(shape, tuning)
        pipe.send((True, None))
    except Exception as error:
        pipe.send((False, f"{type(error).__name__}: {error}"))
        return
    while True:
        try:
            method, args = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            if method == "measure":
                answer = (True, _measure(side, shape, *args))
            elif method == "cpu":
                answer = (True, time.process_time())
            else:
                answer = (True, getattr(side, method)(*args))
        except Exception as error:
            answer = (False, f"{type(error).__name__}: {error}")
        pipe.send(answer)


def _measure(side: Any, shape: Shape, card: Any, pulls: int) -> dict[str, Any]:
    """Connect, move once, and again and again."""
    lists = [shape.lists(number) for number in range(pulls + 1)]
    began = time.perf_counter()
    side.connect(card)
    connected = time.perf_counter()
    side.move(lists[0])
    first = time.perf_counter()
    warm = []
    for fresh in lists[1:]:
        start = time.perf_counter()
        side.move(fresh)
        warm.append(time.perf_counter() - start)
    return {"connect": [first - began], "cold": [first - connected], "warm": warm}


def _table(name: str, shape: Shape, results: list[dict[str, Any]]) -> str:
    """One row per contender; the first one is what the others are compared with."""
    best = next((statistics.median(r["warm"]) for r in results if r["warm"]), None)
    rows = []
    for result in results:
        warm = sorted(result["warm"])
        if "failed" in result or not warm or best is None:
            rows.append(
                [result["contender"], "-", "-", "-", "-", "-", result.get("failed", "")[:60]]
            )
            continue
        middle = statistics.median(warm)
        moved = len(warm) * shape.nbytes / 2**30
        cpu = sum(result["owner_cpu"]) / moved if shape.nbytes > 1 << 20 else None
        rows.append([
            result["contender"],
            _speed(shape, middle), f"{_speed(shape, warm[-1])}..{_speed(shape, warm[0])}",
            _speed(shape, statistics.median(result["cold"])),
            f"{statistics.median(result['connect']) * 1e3:.2f} ms",
            f"{middle / best:.2f}",
            "-" if cpu is None else f"{cpu:.3f}",
        ])  # fmt: skip
    header = (
        name.upper(), "MEDIAN", "RANGE", "COLD", "CONNECT TO FIRST BYTE", "TIME / FIRST ROW",
        "OWNER CPU S/GIB",
    )  # fmt: skip
    return f"\n{shape.title}\n{render(header, rows)}"


def _speed(shape: Shape, seconds: float) -> str:
    if shape.nbytes > 1 << 20:
        return f"{shape.nbytes / seconds / 1e9:.2f} GB/s"
    return f"{seconds * 1e6:.1f} us"


if __name__ == "__main__":
    sys.exit(main())
