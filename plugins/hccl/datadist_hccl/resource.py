"""Description of an engine's device; members that link by address build a rank table from these.

The form is that of the option ``llm.LocalCommRes``: a rank table of one server with one device, without
a rank. Who gives none has it made from the device and from the machine's configuration of addresses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import from_json

from datadist.rank_table import RankDevice, RankTable, RankTableError, parse_rank_table
from datadist.transport import LinkError
from datadist_hccl.acl import Device
from datadist_hccl.table import Family, version_of

MAX_TEXT = 64 << 10
ADDRESSES = Path("/etc/hccn.conf")
"""Addresses of the devices of a machine, as lines ``address_<physical number>=<IP>``."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
SUPER_DEVICE_ID, SUPER_POD_ID = 403, 405
"""Attributes of aclrtGetDeviceInfo."""

Text = Annotated[str, Field(min_length=1, max_length=256)]


class Resource(BaseModel):
    """The device of one rank."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal["1.0", "1.2"]
    server_id: Annotated[str, Field(min_length=1, max_length=64)]
    device_id: Annotated[int, Field(ge=0, le=15)]
    device_ip: Text | None = None
    device_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    super_device_id: Text | None = None
    super_pod_id: Text | None = None


def given(text: str, physical_id: int) -> Resource:
    """The resource that the user gave. Raises :class:`LinkError`."""
    problem = "local_comm_res (llm.LocalCommRes) cannot be used"
    if len(text) > MAX_TEXT:
        raise LinkError(f"{problem}: it has more than {MAX_TEXT} characters")
    try:
        raw = from_json(text)  # which has a limit of nesting, other than the library's
        table = parse_rank_table(json.dumps(_with_rank(raw)))
    except (ValueError, RankTableError) as error:
        raise LinkError(f"{problem}: {error}") from None
    device = table.devices[0]
    if device.device_id != physical_id:
        raise LinkError(
            f"{problem}: device_id is {device.device_id}, this engine runs on physical device "
            f"{physical_id}"
        )
    if table.version == "1.2" and device.super_device_id is None:
        raise LinkError(f"{problem}: version 1.2 needs super_device_id")
    if device.device_ip is not None and version_of(device.device_ip) is None:
        raise LinkError(
            f"{problem}: device_ip is {device.device_ip!r}, which is no IP address: give that of the NPU"
        )
    return _of(table.version, device)


def _with_rank(raw: Any) -> Any:
    """A complete table of one rank; whatever is not as expected is left to its parser."""
    servers = raw.get("server_list") if isinstance(raw, dict) else None
    if not isinstance(servers, list) or len(servers) != 1:
        raise ValueError("server_list must have exactly one server")
    devices = servers[0].get("device") if isinstance(servers[0], dict) else None
    if not isinstance(devices, list) or len(devices) != 1 or not isinstance(devices[0], dict):
        raise ValueError("the server must have exactly one device")
    devices[0]["rank_id"] = "0"
    return {"status": "completed", "server_count": "1"} | raw


def _of(version: str, device: RankDevice) -> Resource:
    return Resource(
        version="1.2" if version == "1.2" else "1.0",
        server_id=device.server_id,
        device_id=device.device_id,
        device_ip=device.device_ip,
        device_port=device.device_port,
        super_device_id=device.super_device_id,
        super_pod_id=device.super_pod_id,
    )


def found(device: Device, family: Family, addresses: Path = ADDRESSES) -> Resource:
    """The description from the device and the machine; engines of one machine have the same server id."""
    pod = family is Family.A3
    return Resource(
        version="1.2" if pod else "1.0",
        server_id=BOOT_ID.read_text().strip(),
        device_id=device.physical_id,
        device_ip=address_of(device.physical_id, addresses),
        super_device_id=str(device.info(SUPER_DEVICE_ID)) if pod else None,
        super_pod_id=str(device.info(SUPER_POD_ID)) if pod else None,
    )


def address_of(physical_id: int, addresses: Path) -> str | None:
    """The address of a device in the machine's configuration, if it says one."""
    try:
        lines = addresses.read_text()
    except OSError:
        return None
    line = re.search(rf"^address_{physical_id}\s*=\s*(\S+)", lines, re.MULTILINE)
    return line[1] if line else None


def merge(resources: Mapping[int, Resource]) -> RankTable:
    """The rank table of the ranks' resources, equal on all ranks. Raises :class:`LinkError`."""
    version = min(resource.version for resource in resources.values())
    servers: dict[str, list[dict[str, str]]] = {}
    pods: dict[str, list[str]] = {}
    for rank, resource in sorted(resources.items()):
        fields = resource.model_dump(
            include={"device_id", "device_ip", "device_port", "super_device_id"}, exclude_none=True
        )
        entry = {name: str(value) for name, value in fields.items()} | {"rank_id": str(rank)}
        servers.setdefault(resource.server_id, []).append(entry)
        if resource.super_pod_id is not None:
            members = pods.setdefault(resource.super_pod_id, [])
            members += [] if resource.server_id in members else [resource.server_id]
    table: dict[str, Any] = {
        "version": version,
        "status": "completed",
        "server_count": str(len(servers)),
        "server_list": [
            {"server_id": name, "device": entries} for name, entries in servers.items()
        ],
    }
    if version == "1.2" and pods:
        table["super_pod_list"] = [
            {"super_pod_id": pod, "server_list": [{"server_id": name} for name in names]}
            for pod, names in pods.items()
        ]
    try:
        return parse_rank_table(json.dumps(table))
    except RankTableError as error:
        raise LinkError(f"the members' local resources make no rank table: {error}") from error
