"""Measure transfers between two engines and compare them with the limits of the machine or network.

Engines run in separate processes. Every byte is verified, outside of the measured time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from datadist import LLMException, Placement
from datadist.base import cgroups
from datadist.base.digits import number_argument
from datadist.base.processor import processor
from datadist.base.quiet import quiet
from datadist.base.version import own_version
from datadist.bench import measure
from datadist.bench.beside_large import beside_large
from datadist.bench.grants import grants
from datadist.bench.limits import threads_of_machine
from datadist.bench.measured_engine import BenchError, Settings
from datadist.bench.parallel import parallel
from datadist.bench.places import Places
from datadist.bench.plot import check_plot, plot
from datadist.bench.report import problems, report
from datadist.bench.results import Result
from datadist.bench.scale import scale
from datadist.bench.shapes import GIB_PULL, MIB, SHAPES
from datadist.cli.far import add_far
from datadist.cli.style import BAD, paint
from datadist.cli.tables import output_width, paragraph
from datadist.transports.loader import BackendError, choose_backend

WORKLOADS = [*SHAPES, "latency", "link", "beside", "parallel", "grants", "small", "scale"]
DEFAULT = [*SHAPES, "latency", "link", "beside", "parallel", "grants", "small"]
STANDARD_OUTPUT = Path("-")
POOLS = [64 * MIB, 256 * MIB, 1024 * MIB]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    add = parser.add_argument
    add("workloads", nargs="*", metavar="WORKLOAD",
        help=f"of {', '.join(WORKLOADS)}, or all (default: all but scale)")  # fmt: skip
    add("--backend", default="auto", metavar="NAME", help="transport (default auto)")
    add("--memory", default="pool", choices=("pool", "registered", "empty"),
        help="caches in the pool, in other memory, or in datadist.empty (default pool)")  # fmt: skip
    add("--placement", default="device", choices=("device", "host"),
        help="where caches are; some transports have one only (default device)")  # fmt: skip
    add("--direction", default="pull", choices=("pull", "push"), help="default pull")
    add("--repeat", type=number_argument(1), default=7, metavar="N",
        help="large transfers and links per workload (default 7)")  # fmt: skip
    add("--threads", type=number_argument(1), default=threads_of_machine(), metavar="N",
        help="threads of the reference copies (default: the CPUs, up to 4)")  # fmt: skip
    add("--option", action="append", default=[], metavar="KEY=VALUE",
        help="an option of init, such as datadist.shm.threads=1; may be given again")  # fmt: skip
    add("--quick", action="store_true", help="small caches and few repetitions, to try it out")
    add("--json", type=Path, metavar="FILE",
        help="write every measurement; - is standard output, instead of tables")  # fmt: skip
    add_far(parser)
    add("--plot", type=Path, metavar="FILE.png",
        help="draw throughput and latency; .svg, .pdf and so on too")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Returns 0 if every byte was right, 1 otherwise, 2 if something cannot be measured."""
    results: list[Result] = []
    try:
        with quiet("datadist"), Places(args.far) as places:
            names, settings = _workloads(args.workloads), _settings(args, places)
            _check_files(args, names)
            for name in names:
                results += _measure(name, settings, args)
        if args.plot:
            plot(results, args.plot, _title(settings))
    except (BenchError, LLMException) as error:
        _progress("")
        print(f"cannot measure: {error}", file=sys.stderr)
        return 2
    _progress("")
    wrong = problems(results)
    if args.json:
        _write_json(args.json, settings, results)
    if args.json != STANDARD_OUTPUT:
        width = output_width()
        print(f"{paragraph(_title(settings), width)}\n\n{report(results, width)}")
    for problem in wrong:
        print(f"{paint('MISMATCH', BAD, sys.stderr)} {problem}", file=sys.stderr)
    return 1 if wrong else 0


def _check_files(args: argparse.Namespace, names: list[str]) -> None:
    """Find before anything is measured what would keep the results from being written."""
    if args.plot:
        check_plot(args.plot, names)
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        if path is None or path == STANDARD_OUTPUT:
            continue
        place = path if path.exists() else path.parent
        if path.is_dir() or not place.exists() or not os.access(place, os.W_OK):
            raise BenchError(f"{option} is {path}, which cannot be written: name a file in a folder "
                             "that exists and that you may write to")  # fmt: skip


def _workloads(given: list[str]) -> list[str]:
    names = WORKLOADS if given == ["all"] else given or DEFAULT
    unknown = [name for name in names if name not in WORKLOADS]
    if unknown:
        raise BenchError(f"there is no workload {unknown[0]}; use {', '.join(WORKLOADS)} or all")
    return names


def _settings(args: argparse.Namespace, places: Places) -> Settings:
    options = {}
    for item in args.option:
        key, sign, value = item.partition("=")
        if not sign:
            raise BenchError(f"--option is {item!r}, expected KEY=VALUE")
        options[key] = value
    try:
        backend = choose_backend(args.backend, os.environ).name
    except BackendError as error:
        raise BenchError(str(error)) from None
    return Settings(backend, args.memory, args.direction, options, places.hosts, places.text,
                    Placement[args.placement.upper()])  # fmt: skip


def _measure(name: str, settings: Settings, args: argparse.Namespace) -> Iterator[Result]:
    def progress(text: str) -> None:
        _progress(f"{name}: {text}")

    repeat = min(3, args.repeat) if args.quick else args.repeat
    if name in SHAPES:
        shape = SHAPES[name].quick() if args.quick else SHAPES[name]
        yield measure.throughput(settings, shape, repeat, args.threads, progress)
    elif name == "latency":
        yield measure.latency(settings, 1000 if args.quick else 10000, progress)
    elif name == "link":
        for pool in POOLS[:1] if args.quick else POOLS:
            yield measure.link_time(settings, pool, repeat, progress)
    elif name == "beside":
        yield measure.beside(settings, min(3, repeat) if args.quick else repeat, progress)
    elif name == "parallel":
        shape = SHAPES["paged-mla"].quick() if args.quick else SHAPES["paged-mla"]
        yield parallel(settings, shape, repeat, progress)
    elif name == "grants":
        yield grants(settings, repeat, args.quick, progress)
    elif name == "small":
        shape = GIB_PULL.quick() if args.quick else GIB_PULL
        yield beside_large(settings, shape, 100 if args.quick else 2000, progress)
    else:
        yield from scale(settings, min(5, repeat), args.threads, args.quick, progress)


def _progress(text: str) -> None:
    """Print the current step on standard error: on a terminal in one line, else one line each."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def _title(settings: Settings) -> str:
    extra = "".join(f", {key}={value}" for key, value in settings.options.items())
    far = f"; far: {settings.places}" if settings.places else ""
    return (
        f"datadist {own_version()}, backend {settings.backend}, {settings.direction}, "
        f"{settings.memory} memory ({settings.placement.name}){extra}{far}; "
        f"{cgroups.cpus()} CPUs ({processor()}), "
        f"{platform.machine()}, Linux {platform.release().partition('-')[0]}, "
        f"Python {platform.python_version()}"
    )


def _write_json(path: Path, settings: Settings, results: list[Result]) -> None:
    data = {
        "run": _title(settings),
        "datadist": own_version(),
        "backend": settings.backend,
        "direction": settings.direction,
        "memory": settings.memory,
        "placement": settings.placement.name,
        "options": dict(settings.options),
        "far": settings.places or None,
        "results": [result.to_json() for result in results],
    }
    text = json.dumps(data, indent=1)
    print(text) if path == STANDARD_OUTPUT else path.write_text(text + "\n")
