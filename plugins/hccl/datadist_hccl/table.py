"""What HCCL needs of a rank table, and which kind of connection each pair of ranks gets.

Rules: the rank table documents of HCCL for A2 (1.0) and A3 (1.2), and its parser. Core has checked the
structure: here are the addresses, ids and order that only HCCL depends on.
"""

from __future__ import annotations

from collections import Counter
from enum import Enum

from datadist.base.addresses import parse_address
from datadist.base.digits import is_digits
from datadist.rank_table import RankDevice, RankTable
from datadist.transport import LinkError
from datadist_hccl.environment import PCIE, ROCE

MAX_DEVICE_ID = 15


class Family(Enum):
    """Chips on which the one-sided operations work as this transport uses them."""

    A2 = "Atlas A2"
    A3 = "Atlas A3"


def family_of(soc: str) -> Family | None:
    """The family of a chip by its name; None for all others."""
    if soc.startswith("Ascend910B"):
        return Family.A2
    return Family.A3 if soc.startswith("Ascend910_93") else None


def uses_rdma(family: Family, roce: bool, one: RankDevice, other: RankDevice) -> bool:
    """Whether HCCL connects two ranks by RDMA; by HCCS otherwise."""
    if roce:
        return True
    if family is Family.A2:
        return one.server != other.server
    return one.super_pod_id != other.super_pod_id


def check(table: RankTable, rank: int, physical_id: int, family: Family, roce: bool | None) -> None:
    """Raise :class:`LinkError` with everything that HCCL would refuse, each at its field."""
    problems = [
        *_own_device(table, rank, physical_id),
        *_inside_one_server(table, roce),
        *_devices(table),
        *_servers(table),
        *_pods(table),
        *_addresses(table, family, bool(roce)),
    ]
    if problems:
        raise LinkError("; ".join(problems))


def _own_device(table: RankTable, rank: int, physical_id: int) -> list[str]:
    own = table.device(rank).device_id
    if own == physical_id:
        return []
    return [
        f"device_id of rank {rank}, which is this engine, is {own}, but the engine runs on physical "
        f"device {physical_id}: correct the table or device_id of the configuration"
    ]


def _inside_one_server(table: RankTable, roce: bool | None) -> list[str]:
    servers = Counter(device.server_id for device in table.devices)
    shared = next((server for server, count in servers.items() if count > 1), None)
    if shared is None or roce is not None:
        return []
    ranks = [str(device.rank) for device in table.devices if device.server_id == shared]
    return [
        f"ranks {', '.join(ranks)} share server {shared}, where a domain needs {ROCE}=1 in the "
        f"environment of every rank before the first link (or, to use HCCS on purpose, {ROCE}=0 and "
        f"{PCIE}=1)"
    ]


def _devices(table: RankTable) -> list[str]:
    problems = [
        f"device_id of rank {device.rank} is {device.device_id}, it must be at most {MAX_DEVICE_ID}"
        for device in table.devices
        if device.device_id > MAX_DEVICE_ID
    ]
    return problems + table.shared_devices()


def _servers(table: RankTable) -> list[str]:
    names = {device.server: device.server_id for device in table.devices}
    problems = [
        f"server_id {name} is given to {count} servers, it must be unique"
        for name, count in Counter(names.values()).items()
        if count > 1
    ]
    order = [device.server for device in table.devices]
    if order != sorted(order):
        problems.append("ranks of different servers are interleaved: number them server by server")
    for device in {device.server: device for device in table.devices}.values():
        if device.host_ip is not None and version_of(device.host_ip) is None:
            problems.append(
                f"host_ip of server {device.server_id} is {device.host_ip!r}, no IP address"
            )
    return problems


def _pods(table: RankTable) -> list[str]:
    if all(device.super_pod_id is None for device in table.devices):
        return []
    problems = []
    for device in table.devices:
        if device.super_pod_id is None:
            problems.append(f"server {device.server_id} is in no entry of super_pod_list")
        if device.super_device_id is None or not is_digits(device.super_device_id):
            problems.append(
                f"super_device_id of rank {device.rank} is {device.super_device_id!r}: with "
                "super_pod_list it must be a decimal number as text"
            )
    counts = Counter((device.super_pod_id, device.super_device_id) for device in table.devices)
    problems += [
        f"super_device_id {number} is given {count} times in super node {pod}"
        for (pod, number), count in counts.items()
        if count > 1
    ]
    return problems


def _addresses(table: RankTable, family: Family, roce: bool) -> list[str]:
    several = len({device.server for device in table.devices}) > 1
    one_pod = len({device.super_pod_id for device in table.devices}) == 1
    needed = roce or (several and not (family is Family.A3 and one_pod))
    problems, versions, owners = [], set(), dict[str, int]()
    for device in table.devices:
        if device.device_ip is None:
            if needed:
                problems.append(f"device_ip of rank {device.rank} is missing: RDMA needs it")
            continue
        version = version_of(device.device_ip)
        if version is None:
            problems.append(
                f"device_ip of rank {device.rank} is {device.device_ip!r}, no IP address"
            )
        versions.add(version)
        for address in device.device_ip.split(","):
            if address in owners:
                problems.append(
                    f"device_ip {address} is given to ranks {owners[address]} and {device.rank}"
                )
            owners[address] = device.rank
    if {4, 6} <= versions and several:
        problems.append("device_ip must be IPv4 for all ranks or IPv6 for all ranks")
    return problems


def version_of(addresses: str) -> int | None:
    """4 or 6 for an address or a list of them; None for anything else."""
    try:
        versions = {parse_address(text).version for text in addresses.split(",")}
    except ValueError:
        return None
    return versions.pop() if len(versions) == 1 else None
