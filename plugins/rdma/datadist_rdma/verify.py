"""``python -m datadist_rdma.verify``: does RDMA work here, and between two hosts?

Alone it looks at this host and moves memory through its own adapter. With ``--rank`` it does the same
between two hosts, over the public API, as an application would.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import os
import resource
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from datadist.base.digits import number_argument
from datadist.transport import Access, Group, Offer, Peer, Placement, TransportOptions
from datadist_rdma import ports
from datadist_rdma.transport import RdmaTransport
from datadist_rdma.verify_report import MIB, ROUNDS, Report, rate


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks; 0 if all passed."""
    args = _parse(arguments)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING)
    report = Report()
    _look(report)
    if report.failed:
        return 1
    if args.rank is None:
        _loop(report, args)
    else:
        from datadist_rdma import verify_pair

        verify_pair.run(report, args)
    print("all passed" if not report.failed else f"{report.failed} failed")
    return 1 if report.failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m datadist_rdma.verify", description=__doc__)
    parser.add_argument(
        "--rank", type=number_argument(0, 1), metavar="{0,1}", help="our part in a run on two hosts"
    )
    parser.add_argument(
        "--device-ip", nargs=2, type=_address, metavar=("RANK0", "RANK1"),
        help="RoCE addresses for the rank table",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=number_argument(1), default=256, help="MiB to move (default 256)"
    )
    parser.add_argument("--traffic-class", type=number_argument(0, 255), help="0 to 255")
    parser.add_argument("--service-level", type=number_argument(0, 7), help="0 to 7")
    parser.add_argument(
        "--ib-read-bw", action="store_true", help="compare with ib_read_bw (it opens port 18515)"
    )
    parser.add_argument("--verbose", action="store_true", help="show the log")
    return parser.parse_args(arguments)


def _address(text: str) -> str:
    try:
        return str(ports.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# -- this host -------------------------------------------------------------------------------------


def _look(report: Report) -> None:
    state = RdmaTransport.probe()
    report.line("ok" if state.usable else "FAIL", "device", state.reason)
    gids, reasons = ports.list_gids()
    for gid in gids:
        mtu = Path(f"/sys/class/net/{gid.interface}/mtu")
        with contextlib.suppress(OSError):
            report.line("ok", f"address {gid}", f"{gid.interface}, MTU {mtu.read_text().strip()}")
    for reason in reasons:
        report.line("note", "unused", reason)
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit != resource.RLIM_INFINITY and os.geteuid() != 0:
        report.line("note", "locked memory (ulimit -l)", f"{limit // 1024} KiB: pools must fit")
    else:
        report.line("ok", "locked memory (ulimit -l)", "not limited for us")


def _loop(report: Report, args: argparse.Namespace) -> None:
    """Two transports in this process, connected through the adapter."""
    options = TransportOptions(traffic_class=args.traffic_class, service_level=args.service_level)
    size = args.size * MIB
    with contextlib.ExitStack() as stack:
        ends = []
        with report.step(f"register 2 x {args.size} MiB") as detail:
            begun = time.monotonic()
            for _ in range(2):
                transport = RdmaTransport(options)
                stack.callback(transport.close)
                region = transport.allocate(size, Placement.HOST)
                stack.callback(transport.release, region)
                ends.append((transport, region))
            detail.append(f"{time.monotonic() - begun:.2f} s")
        if len(ends) < 2:
            return
        links = []
        with report.step("connect") as detail:
            begun = time.monotonic()
            for rank, (transport, region) in enumerate(ends):
                peers = {r: Peer(r, f"verify-{r}") for r in (0, 1)}
                group = Group("verify", rank, peers, None, time.monotonic() + 60)
                links.append(transport.open(group, [region], Access.READ_WRITE))
                stack.callback(links[-1].close)
            offers = [link.offer(1 - rank).data for rank, link in enumerate(links)]
            for rank, link in enumerate(links):
                link.attach(1 - rank, Offer(offers[1 - rank]))
            detail.append(f"{(time.monotonic() - begun) * 1e3:.1f} ms")
        if report.failed:
            return
        mine, theirs = (region.address for _, region in ends)
        views = [
            np.frombuffer((ctypes.c_char * size).from_address(region.address), np.uint8)
            for _, region in ends
        ]

        def move(verb: str, block: int) -> float:
            local, remote, length = neighbours(mine, theirs, size, block)
            begun = time.monotonic()
            getattr(links[0], verb)(1, local, remote, length, 60)
            return time.monotonic() - begun

        for verb, source, target in (("read", 1, 0), ("write", 0, 1)):
            check_moves(report, verb, size, views[source], views[target], move)


def neighbours(
    mine: int, theirs: int, size: int, block: int
) -> tuple[array[int], array[int], array[int]]:
    """Segments that swap neighbouring blocks, so that no two can be merged."""
    numbers = np.arange(size // block, dtype=np.int64)
    vectors = (
        mine + (numbers ^ 1) * block, theirs + numbers * block, np.full(len(numbers), block),
    )  # fmt: skip
    local, remote, length = (array("q", vector.tobytes()) for vector in vectors)
    return local, remote, length


def check_moves(
    report: Report,
    verb: str,
    size: int,
    source: np.ndarray[tuple[int], np.dtype[np.uint8]],
    target: np.ndarray[tuple[int], np.dtype[np.uint8]],
    move: Callable[[str, int], float],
) -> None:
    """Move everything in blocks of several sizes, compare it, and tell the best throughput."""
    for block in (4096, 65536, MIB):
        with report.step(f"{verb} in blocks of {block // 1024} KiB") as detail:
            source[:] = np.random.default_rng(block).integers(0, 256, size, np.uint8)
            target[:] = 0
            best = min(move(verb, block) for _ in range(ROUNDS))
            moved = target.reshape(-1, 2, block)[:, ::-1]
            if not np.array_equal(source.reshape(-1, 2, block), moved):
                raise ValueError("the bytes differ")
            detail.append(rate(size / best))


if __name__ == "__main__":
    sys.exit(main())
