"""Validate a rank table, and the mapping of clusters to ranks, before linking."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from datadist.base.digits import parse_digits
from datadist.base.texts import short_repr
from datadist.cli.style import BAD, GOOD, paint
from datadist.cli.tables import output_width, render, say
from datadist.rank_table import RankTable, RankTableError, parse_rank_table
from datadist.transport import TransportError, TransportOptions
from datadist.transports.loader import BackendError, choose_backend


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.add_argument(
        "table", metavar="rank_table.json", help="the table; - reads standard input"
    )
    parser.add_argument("--mapping", metavar="JSON",
                        help='cluster id to rank, such as \'{"1": 0, "2": 1}\'')  # fmt: skip
    parser.add_argument("--backend", metavar="NAME",
                        help="also check what this transport needs of the table")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print problems and ranks as JSON")


def run(args: argparse.Namespace) -> int:
    """Returns 0 without problems, 1 after listing every problem, 2 if something could not be read."""
    try:
        text = sys.stdin.read() if args.table == "-" else Path(args.table).read_text()
    except (OSError, ValueError) as error:
        problem = f"cannot read {short_repr(args.table)}: {_unreadable(args.table, error)}"
        if args.json:
            print(json.dumps(_report(None, {}, [problem]), indent=2))
        else:
            print(problem, file=sys.stderr)
        return 2
    problems: list[str] = []
    mapping = _mapping(args.mapping, problems)
    table = None
    try:
        table = parse_rank_table(text)
    except RankTableError as error:
        problems = error.problems + problems
    if table is not None:
        problems += table.address_problems()
        problems += [
            f"{text} (works only where device ids are labels, as on shm)"
            for text in table.shared_devices()
        ]
    if table is not None and mapping:
        problems += table.check_ranks(mapping.values())
    if args.backend:
        problems += _backend_problems(args.backend, table)
    if args.json:
        print(json.dumps(_report(table, mapping, problems), indent=2))
        return int(bool(problems))
    if problems or table is None:
        for problem in problems:
            print(problem, file=sys.stderr)
        print(paint(f"{len(problems)} problem(s)", BAD, sys.stderr), file=sys.stderr)
        return 1
    print(_picture(table, mapping))
    checked = f"structure and {args.backend}" if args.backend else "structure only (see --backend)"
    ok = f"rank table {table.version}: {len(table.devices)} ranks; checked: {checked}"
    say(ok, code=GOOD)
    return 0


def _report(
    table: RankTable | None, mapping: dict[int, int], problems: list[str]
) -> dict[str, object]:
    clusters = {rank: cluster for cluster, rank in mapping.items()}
    devices = table.devices if table is not None else ()
    ranks = [{**asdict(device), "cluster": clusters.get(device.rank)} for device in devices]
    return {"problems": problems, "version": table and table.version, "ranks": ranks}


def _unreadable(table: str, error: Exception) -> str:
    if table.lstrip()[:1] in ("{", "["):
        return "it is JSON, give the name of the file that holds it, or - and the JSON as input"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _mapping(text: str | None, problems: list[str]) -> dict[int, int]:
    if text is None:
        return {}
    try:
        raw = json.loads(text)
        given = raw.items()
    except (ValueError, AttributeError):
        problems.append(f'--mapping is {text!r}, expected JSON such as {{"1": 0, "2": 1}}')
        return {}
    mapping: dict[int, int] = {}
    for key, rank in given:
        cluster = parse_digits(key)
        if cluster is None or cluster >= 2**64:
            problems.append(f"--mapping: {short_repr(key)} is not a cluster id in [0, 2^64)")
            continue
        mapping[cluster] = rank
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank < 2**32:
            problems.append(
                f"--mapping: the rank of cluster {cluster} is {rank!r}, expected a number"
            )
    if not 2 <= len(given) <= 4:
        problems.append(f"--mapping names {len(given)} clusters, a domain has 2 to 4")
    elif not problems and list(mapping.values()) != sorted(mapping.values()):
        problems.append(f"--mapping is {text}: list the clusters in ascending order of rank")
    return {} if problems else mapping


def _backend_problems(name: str, table: RankTable | None) -> list[str]:
    try:
        choice = choose_backend(name, os.environ)
        transport = choice.transport_class(TransportOptions())
    except (BackendError, TransportError) as error:
        return [f"backend {name}: {error}"]
    problems = []
    try:
        for rank in table.ranks if table is not None else ():
            assert table is not None
            try:
                transport.check_table(table, rank)
            except TransportError as error:
                problems.append(f"backend {name}, rank {rank}: {error}")
    finally:
        transport.close()
    return problems


def _picture(table: RankTable, mapping: dict[int, int]) -> str:
    clusters = {rank: cluster for cluster, rank in mapping.items()}
    optional = {
        "HOST_IP": "host_ip",
        "DEVICE_IP": "device_ip",
        "DEVICE_PORT": "device_port",
        "HOST_PORT": "host_port",
        "SUPER_POD": "super_pod_id",
        "SUPER_DEVICE": "super_device_id",
    }
    shown = {
        title: name
        for title, name in optional.items()
        if any(getattr(device, name) is not None for device in table.devices)
    }
    header = ["RANK", *(["CLUSTER"] if mapping else []), "SERVER", "DEVICE", *shown]
    rows = [
        [
            device.rank,
            *([clusters[device.rank]] if mapping else []),
            device.server_id,
            device.device_id,
            *(
                "-" if (value := getattr(device, name)) is None else value
                for name in shown.values()
            ),
        ]
        for device in table.devices
    ]
    return render(header, rows, output_width())
