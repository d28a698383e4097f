"""Write a rank table: which rank runs on which host and device.

The ranks are spread over the hosts in order, and numbered on each one as devices 0, 1 and so on.
Addresses of devices, as hccl needs them, are for you to add.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from datadist.base.addresses import is_address
from datadist.base.digits import number_argument
from datadist.base.texts import short_repr
from datadist.rank_table import RankTableError, parse_rank_table

ONE_HOST = "here"
MAX_RANKS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.add_argument("--ranks", metavar="N", type=number_argument(1, MAX_RANKS), required=True,
                        help="how many ranks")  # fmt: skip
    parser.add_argument("--hosts", metavar="A,B", default="",
                        help="addresses or names, that of rank 0 first; default: one host")  # fmt: skip
    parser.add_argument("--version", choices=["1.0", "1.2"], default="1.0",
                        help="of the rank table (%(default)s)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print the table; returns 2 where none can be made."""
    hosts = [host.strip() for host in args.hosts.split(",")] if args.hosts else [ONE_HOST]
    problems = _problems(hosts, args.ranks)
    text = json.dumps(_table(hosts, args.ranks, args.version), indent=2)
    if not problems:
        try:
            problems = parse_rank_table(text).address_problems()
        except RankTableError as error:
            problems = error.problems
    for problem in problems:
        print(f"datadist table: {problem}", file=sys.stderr)
    if problems:
        return 2
    print(text)
    if len(hosts) > 1 and not is_address(hosts[0]):
        print(
            f"{hosts[0]} is no address: set DATADIST_RENDEZVOUS to host:port of rank 0 on all ranks",
            file=sys.stderr,
        )
    return 0


def _problems(hosts: list[str], ranks: int) -> list[str]:
    found = [
        f"--hosts names {short_repr(host)} {hosts.count(host)} times, expected each host once"
        for host in sorted(set(hosts))
        if hosts.count(host) > 1
    ]
    if "" in hosts:
        found.append("--hosts has an empty name, expected names separated by commas")
    if len(hosts) > ranks:
        found.append(
            f"--hosts names {len(hosts)} hosts for {ranks} ranks, expected at most {ranks}"
        )
    return found


def _table(hosts: list[str], ranks: int, version: str) -> dict[str, Any]:
    share, more = divmod(ranks, len(hosts))
    numbers = iter(range(ranks))
    servers = []
    for index, host in enumerate(hosts):
        devices = [
            {"device_id": str(device), "rank_id": str(next(numbers))}
            for device in range(share + (index < more))
        ]
        address = {"host_ip": host} if is_address(host) else {}
        servers.append({"server_id": host, **address, "device": devices})
    return {
        "version": version,
        "status": "completed",
        "server_count": str(len(hosts)),
        "server_list": servers,
    }
