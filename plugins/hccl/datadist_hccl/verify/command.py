"""The command: both ranks on one machine, or one rank here and the other elsewhere."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

from datadist.base.digits import number_argument
from datadist.rank_table import RankTable, RankTableError, parse_rank_table
from datadist.transport import LinkError, TransportError
from datadist_hccl import HcclTransport
from datadist_hccl.acl import AclError, Runtime
from datadist_hccl.environment import PCIE, ROCE
from datadist_hccl.libraries import load
from datadist_hccl.table import Family, family_of, uses_rdma
from datadist_hccl.verify import checks
from datadist_hccl.verify.facts import facts
from datadist_hccl.verify.session import Linked, Session

JOIN_SECONDS = 900

USAGE = """Verify the transport on real NPUs, and print a report to keep.

On one machine with two NPUs (their addresses: `hccn_tool -i <device> -ip -g`):

    python -m datadist_hccl.verify --devices 0,1 --device-ips 192.168.100.1,192.168.101.1

On two machines, on each with its rank and the same rank table of two ranks:

    python -m datadist_hccl.verify --table ranks.json --rank 0 --device 0
"""


class Report:
    """Lines of Markdown; failed lines are counted."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self.failed = 0

    def say(self, text: str) -> None:
        """A line as it is."""
        sys.stdout.write(f"[rank {self._rank}] {text}\n")  # one write: both ranks share the output
        sys.stdout.flush()

    def result(self, title: str, passed: bool, detail: str) -> None:
        """A line of the checklist."""
        self.failed += not passed
        self.say(f"- [{'x' if passed else ' '}] {title}: {'' if passed else 'FAILED: '}{detail}")

    def run(self, title: str, step: Callable[[], str]) -> None:
        """Run a step and report it."""
        try:
            self.result(title, True, step())
        except (TransportError, AssertionError) as error:
            self.result(title, False, f"{type(error).__name__}: {error}")


def main(arguments: list[str] | None = None) -> int:
    """0 where every check passed."""
    args = _parser().parse_args(arguments)
    if args.table is None:
        return _both_ranks(args)
    try:
        table = parse_rank_table(Path(args.table).read_text())
    except (OSError, RankTableError) as error:
        print(f"{args.table} cannot be used: {error}", file=sys.stderr)
        return 2
    return _one_rank(table, args.rank, args.device, args.mib << 20)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m datadist_hccl.verify",
        description=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--devices", type=_devices, default="0,1", help="two devices of this machine (0,1)"
    )
    parser.add_argument("--device-ips", help="their addresses; without them HCCS is verified")
    parser.add_argument("--table", help="rank table of two ranks, for two machines")
    parser.add_argument(
        "--rank", type=number_argument(0, 1), metavar="{0,1}", default=0, help="with --table"
    )
    parser.add_argument(
        "--device", type=number_argument(0), default=0, help="with --table: device of this rank"
    )
    parser.add_argument(
        "--mib", type=number_argument(1), default=256, help="MiB of memory per placement (256)"
    )
    return parser


def _devices(text: str) -> list[int]:
    return [number_argument(0)(number) for number in text.split(",")]


def _both_ranks(args: argparse.Namespace) -> int:
    devices = args.devices
    addresses = args.device_ips.split(",") if args.device_ips else []
    if len(devices) != 2 or len(addresses) not in (0, 2):
        print("give two devices, and two addresses or none", file=sys.stderr)
        return 2
    os.environ.setdefault(ROCE, "1" if addresses else "0")
    os.environ.setdefault(PCIE, "0" if addresses else "1")
    try:
        text = _local_table(devices, addresses)
    except (TransportError, AclError) as error:
        print(f"the transport cannot be used here: {error}", file=sys.stderr)
        return 2
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=_as_process, args=(text, rank, devices[rank], args.mib << 20))
        for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(JOIN_SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
    return max(abs(process.exitcode or 0) for process in ranks)


def _local_table(devices: list[int], addresses: list[str]) -> str:
    runtime = Runtime(load())
    runtime.initialise()
    entries = [
        {"device_id": str(runtime.physical_id(device)), "rank_id": str(rank)}
        for rank, device in enumerate(devices)
    ]
    for entry, address in zip(entries, addresses, strict=False):
        entry["device_ip"] = address
    version = "1.2" if family_of(runtime.soc_name()) is Family.A3 else "1.0"
    server = {"server_id": "this", "device": entries}
    table = {
        "version": version,
        "status": "completed",
        "server_count": "1",
        "server_list": [server],
    }
    return json.dumps(table)


def _as_process(text: str, rank: int, device: int, size: int) -> None:
    sys.exit(_one_rank(parse_rank_table(text), rank, device, size))


def _one_rank(table: RankTable, rank: int, device: int, size: int) -> int:
    report = Report(rank)
    for line in facts():
        report.say(line)
    state = HcclTransport.probe()
    report.result("libraries and device", state.usable, state.reason)
    if not state.usable:
        return 1
    try:
        with contextlib.closing(Session(table, rank, device, size)) as session:
            for name, value in session.transport.describe().items():
                report.say(f"- {name}: {value}")
            _checks(report, session)
    except (TransportError, MemoryError) as error:
        report.result("transport", False, f"{type(error).__name__}: {error}")
    report.say(f"{'all checks passed' if not report.failed else f'{report.failed} FAILED'}")
    return int(report.failed > 0)


def _checks(report: Report, session: Session) -> None:
    if session.rank == 0:
        report.run("a rank that never comes", lambda: checks.absent(session))
    linked = _link(report, session, "first")
    listed = list(checks.BASIC)
    if _rdma(session):
        listed.append(checks.HOST_MEMORY)
    for title, phases in [*listed, checks.TIME_OUT]:
        _in_step(report, session, linked, title, phases, last=title == checks.TIME_OUT[0])
    linked = _link(report, session, "second")
    session.links[-2].close()  # not earlier: the other rank may still have been at its timeout
    _in_step(report, session, linked, *checks.AGAIN)
    report.run("fence", lambda: checks.fence(session, linked))
    report.run("memory that is not the device's", lambda: checks.foreign(session))


def _link(report: Report, session: Session, name: str) -> Linked:
    try:
        linked = session.link(name)
    except LinkError as error:
        raise TransportError(f"link {name!r}: {error}") from error
    report.result(f"link {name!r}", True, "met the other rank, memory exchanged")
    return linked


def _rdma(session: Session) -> bool:
    family = family_of(str(session.transport.describe()["soc"]))
    assert family is not None
    one, other = session.table.device(0), session.table.device(1)
    return uses_rdma(family, os.environ.get(ROCE) == "1", one, other)


def _in_step(
    report: Report, session: Session, linked: Linked, title: str, phases: list[checks.Phase],
    last: bool = False,
) -> None:  # fmt: skip
    """Run the phases; ``last``: nothing is told afterwards, as the link may have ended."""
    details = []
    for number, phase in enumerate(phases):
        failure = None
        try:
            details.append(phase(session, linked))
        except (TransportError, AssertionError) as error:
            failure = f"{type(error).__name__}: {error}"
        if not (last and number == len(phases) - 1):
            told = linked.tell(failure)
            failure = failure or (told and f"the other rank: {told}")
        if failure:
            report.result(title, False, failure)
            return
    report.result(title, True, "; ".join(detail for detail in details if detail) or "as expected")
