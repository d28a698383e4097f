"""The options ``--far`` and ``--hosts`` of commands that put processes on different hosts."""

from __future__ import annotations

import argparse

from datadist.testing.far_hosts import AUTOMATIC, KINDS

HELP = {
    AUTOMATIC: "put the ranks on different hosts, so that they meet over the network: network "
    "namespaces where those can be made, else as --far=directories; an option's value may contain "
    "{device} and {address} of the host",
    "namespaces": "with network namespaces, or not at all (needs root and `ip`)",
    "directories": "with runtime directories and addresses of loopback of their own",
}


def add_far(parser: argparse.ArgumentParser) -> None:
    """Declare ``--far``, whose value is optional: an argument that follows it is never taken for one."""
    for kind in (AUTOMATIC, *KINDS):
        name = "--far" if kind == AUTOMATIC else f"--far={kind}"
        parser.add_argument(name, dest="far", action="store_const", const=kind, help=HELP[kind])


def add_hosts(parser: argparse.ArgumentParser) -> None:
    """Declare ``--hosts``."""
    parser.add_argument(
        "--hosts", type=int, choices=(2, 3, 4), default=4, metavar="N",
        help="hosts of --far, 2 to 4 (default 4, one for each rank); with 2, ranks 0 and 2 are on the "
             "first one, 1 and 3 on the second one",
    )  # fmt: skip
