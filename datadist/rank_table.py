"""The rank table, versions 1.0 and 1.2: which device is which rank, and where.

Fields and rules follow the rank table documents of HCCL (``rank_table_config_a2``,
``rank_table_config_a3``). Only the structure is checked here: real tables repeat placeholders
(``x.x.x.x``), so addresses, unique ids and the order of ranks among servers are for the transports
that depend on them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from itertools import islice
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)

from datadist.base import hints
from datadist.base.addresses import is_address, looks_numeric
from datadist.base.digits import parse_digits
from datadist.base.picklable import PicklableError
from datadist.base.pydantic_plugins import load_pydantic_plugins
from datadist.base.texts import MAX_LIST_ELEMENTS, short_repr

__all__ = ["RankDevice", "RankTable", "RankTableError", "parse_own_table", "parse_rank_table"]

load_pydantic_plugins()
MAX_TEXT = 1 << 20
MAX_PROBLEMS = 100
"""Problems of one table that are named."""
KEPT_TABLES, KEPT_CHARACTERS = 16, 64 << 10
"""How many tables of this program are kept, of at most so many characters: it may link by one again."""


class RankTableError(PicklableError, ValueError):
    """A rank table that cannot be used; ``problems`` lists everything that is wrong with it."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def _digits(value: object) -> object:
    """Numbers are text in the documents; programs also write plain integers."""
    number = parse_digits(value) if isinstance(value, str) else value
    if number is None or isinstance(number, (bool, float)):
        raise ValueError('expected a number as text, such as "0"')
    return number


def _text(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Number = Annotated[int, BeforeValidator(_digits), Field(ge=0, lt=2**32)]
Port = Annotated[int, BeforeValidator(_digits), Field(ge=1, le=65535)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=256), BeforeValidator(_text)]
ServerId = Annotated[str, StringConstraints(min_length=1, max_length=64), BeforeValidator(_text)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Device(_Model):
    device_id: Number
    rank_id: Number
    device_ip: Text | None = None
    device_port: Port | None = None
    host_port: Port | None = None
    super_device_id: Text | None = None
    backup_device_ip: Text | None = None
    backup_device_port: Port | None = None


# Each with lists whose elements are not looked at, then with their elements: the former find the
# problems one by one, up to a number, where the latter found one.


class _ServerFields(_Model):
    server_id: ServerId
    host_ip: Text | None = None
    device: Annotated[list[Any], Field(min_length=1)]


class _Server(_ServerFields):
    device: Annotated[list[_Device], Field(min_length=1, fail_fast=True)]


class _PodServer(_Model):
    server_id: ServerId


class _PodFields(_Model):
    super_pod_id: Text
    server_list: list[Any]


class _Pod(_PodFields):
    server_list: Annotated[list[_PodServer], Field(fail_fast=True)]


class _TableFields(_Model):
    version: Literal["1.0", "1.2"]
    status: Literal["completed"]
    server_count: Number | None = None
    server_list: Annotated[list[Any], Field(min_length=1)]
    super_pod_list: list[Any] | None = None


class _Table(_TableFields):
    server_list: Annotated[list[_Server], Field(min_length=1, fail_fast=True)]
    super_pod_list: Annotated[list[_Pod], Field(fail_fast=True)] | None = None


@dataclass(frozen=True, order=True)
class RankDevice:
    """One rank of a table: its device, and where that is."""

    rank: int
    server: int
    """Number of the server among those of the table, in order of their lowest rank."""
    server_id: str
    device_id: int
    host_ip: str | None = None
    device_ip: str | None = None
    device_port: int | None = None
    host_port: int | None = None
    super_pod_id: str | None = None
    super_device_id: str | None = None
    backup_device_ip: str | None = None
    backup_device_port: int | None = None


@dataclass(frozen=True)
class RankTable:
    """A rank table in normal form: equal for tables that mean the same.

    The order of servers and devices, layout, status and ``server_count`` do not matter.
    """

    version: str
    devices: tuple[RankDevice, ...]
    """By rank."""

    @cached_property
    def canonical(self) -> str:
        """Strict JSON of this table, identical on all ranks whose tables mean the same."""
        servers: dict[int, dict[str, Any]] = {}
        pods: dict[str, list[dict[str, str]]] = {}
        for device in self.devices:
            if device.server not in servers:
                entry: dict[str, Any] = {"server_id": device.server_id, "device": []}
                if device.host_ip is not None:
                    entry["host_ip"] = device.host_ip
                servers[device.server] = entry
                if device.super_pod_id is not None:
                    pods.setdefault(device.super_pod_id, []).append({"server_id": device.server_id})
            servers[device.server]["device"].append(_device_json(device))
        table: dict[str, Any] = {
            "version": self.version,
            "status": "completed",
            "server_count": str(len(servers)),
            "server_list": [servers[number] for number in sorted(servers)],
        }
        if pods:
            table["super_pod_list"] = [
                {"super_pod_id": pod, "server_list": members} for pod, members in pods.items()
            ]
        return json.dumps(table, sort_keys=True, separators=(",", ":"))

    @property
    def ranks(self) -> tuple[int, ...]:
        """All ranks, ascending."""
        return tuple(device.rank for device in self.devices)

    def device(self, rank: int) -> RankDevice:
        """The device of a rank. Raises ``KeyError``."""
        for device in self.devices:
            if device.rank == rank:
                return device
        raise KeyError(rank)

    def check_ranks(self, ranks: Iterable[int]) -> list[str]:
        """What is wrong with a mapping's ranks: they must be this table's, each once."""
        ranks = sorted(ranks)
        if ranks == list(self.ranks):
            return []  # in a fifth of the time
        counts = Counter(ranks)
        problems = [
            f"rank {rank} is given to {count} clusters in cluster_rank_info, expected one each"
            for rank, count in sorted(counts.items())
            if count > 1
        ]
        missing = sorted(set(counts) - set(self.ranks))
        extra = sorted(set(self.ranks) - set(counts))
        if missing:
            problems.append(
                f"cluster_rank_info names rank {_list(missing)}, which no device of the rank "
                "table has"
            )
        if extra:
            problems.append(
                f"the rank table has a device with rank_id {_list(extra)}, which cluster_rank_info "
                "does not name"
            )
        return problems

    def shared_devices(self) -> list[str]:
        """Devices of a server that several ranks use without a ``device_port`` each, all different.

        A device is one rank's, unless each of its processes has a ``device_port`` (rank table
        documents of HCCL): one process without is enough for a problem. Where device ids are only
        labels, as on shm, such a table works.
        """
        users: dict[tuple[str, int], list[RankDevice]] = {}
        for device in self.devices:
            users.setdefault((device.server_id, device.device_id), []).append(device)
        return [
            f"ranks {_and([each.rank for each in sharing])} use device {device_id} of server "
            f"{server_id}: give each a device_port of its own"
            for (server_id, device_id), sharing in users.items()
            if len(sharing) > len({each.device_port for each in sharing} - {None})
            and len(sharing) > 1
        ]

    def address_problems(self) -> list[str]:
        """Fields that are meant as addresses and are none; placeholders (``x.x.x.x``) are left alone."""
        return [
            f"{name} of rank {device.rank} is {value!r}, which is no IP address: numbers have no leading "
            "zeros and end at 255"
            for device in self.devices
            for name in ("server_id", "host_ip", "device_ip", "backup_device_ip")
            if _is_bad_address(name, value := getattr(device, name))
        ]

    def differences(self, other: RankTable, here: str, there: str) -> list[str]:
        """What two tables mean differently; ``here`` and ``there`` say whose they are."""
        found = []
        if self.version != other.version:
            found.append(f"rank table version is {self.version} {here} and {other.version} {there}")
        mine = {device.rank: asdict(device) for device in self.devices}
        theirs = {device.rank: asdict(device) for device in other.devices}
        for rank in sorted({*mine, *theirs}):
            if len(found) >= MAX_PROBLEMS:
                return [*found, "and more"]
            if rank not in mine or rank not in theirs:
                place = here if rank not in mine else there
                found.append(f"the rank table has no rank {rank} {place}")
                continue
            found += [
                f"{name} of rank {rank} in the rank table is {value!r} {here} and "
                f"{theirs[rank][name]!r} {there}"
                for name, value in mine[rank].items()
                if theirs[rank][name] != value
            ]
        return found


def _is_bad_address(name: str, value: str | None) -> bool:
    if value is None or (name == "server_id" and value.count(".") != 3):
        return False  # servers may also be called by a number
    return any(looks_numeric(text) and not is_address(text) for text in value.split(","))


def parse_rank_table(text: str) -> RankTable:
    """Read the JSON text of a rank table; a trailing comma before ``]`` or ``}`` is accepted.

    Raises :class:`RankTableError` with every problem (at most 100), each at its field.
    """
    raw = _read_json(text)
    problems: list[str] = []
    table = None
    try:
        table = _Table.model_validate(raw)
    except ValidationError:
        problems = list(islice(_field_problems(raw), MAX_PROBLEMS))
    repeated = _rank_problems(raw)
    if table is not None and not repeated:
        problems += _gap_problems(table)
    problems += repeated + _count_problems(raw) + _pod_problems(raw)
    if problems or table is None:
        more = len(problems) - MAX_PROBLEMS
        raise RankTableError(problems[:MAX_PROBLEMS] + ([f"and {more} more"] if more > 0 else []))
    return _normal(table)


_parse_kept = lru_cache(KEPT_TABLES)(parse_rank_table)


def parse_own_table(text: str) -> RankTable:
    """:func:`parse_rank_table` for tables of this program, of which the last ones are kept."""
    return _parse_kept(text) if len(text) <= KEPT_CHARACTERS else parse_rank_table(text)


# A string that never ends matches up to the end, else each of its quotes would be tried again.
_TOKEN = re.compile(r'"(?:[^"\\]+|\\.)*"?|,(?=[ \t\r\n]*[\]}])', re.DOTALL)


def _without_trailing_commas(text: str) -> str:
    """Blanks take their place, so that positions in error messages stay true."""
    return _TOKEN.sub(lambda match: " " if match[0] == "," else match[0], text)


def _near(text: str, error: Exception) -> str:
    """The text around the place of an error."""
    if not isinstance(error, json.JSONDecodeError):
        return ""
    return f", near {text[max(0, error.pos - 20) : error.pos + 20]!r}"


def _read_json(text: str) -> dict[str, Any]:
    if len(text) > MAX_TEXT:
        raise RankTableError([f"it has {len(text)} characters, more than {MAX_TEXT}"])
    try:
        raw = json.loads(_without_trailing_commas(text))
    except (ValueError, RecursionError) as error:
        why = hints.for_json_text(text) or f"{error}{_near(text, error)}"
        raise RankTableError([f"it is not valid JSON: {why}"]) from None
    if isinstance(raw, str):
        raise RankTableError(["it is a JSON string in which the table is: give that text itself"])
    if not isinstance(raw, dict):
        raise RankTableError([f"expected a JSON object, got {type(raw).__name__}"])
    return raw


def _field_problems(raw: dict[str, Any]) -> Iterator[str]:
    """What is wrong with single fields, object by object."""
    yield from _problems(_TableFields, raw)
    for server, value in _elements(raw, "server_list"):
        yield from _problems(_ServerFields, value, server)
        for device, each in _elements(value, "device", server):
            yield from _problems(_Device, each, device)
    for pod, value in _elements(raw, "super_pod_list"):
        yield from _problems(_PodFields, value, pod)
        for member, each in _elements(value, "server_list", pod):
            yield from _problems(_PodServer, each, member)


_Place: TypeAlias = "tuple[str | int, ...]"


def _elements(parent: object, name: str, place: _Place = ()) -> list[tuple[_Place, object]]:
    """The elements of a list field, each with its place."""
    values = parent.get(name) if isinstance(parent, dict) else None
    if not isinstance(values, list):
        return []
    return [((*place, name, i), value) for i, value in enumerate(values)]


def _problems(model: type[_Model], value: object, place: _Place = ()) -> list[str]:
    try:
        model.model_validate(value)
    except ValidationError as error:
        return [_describe(item, (*place, *item["loc"])) for item in error.errors()]
    return []


def _describe(item: Any, place: _Place) -> str:
    path = ""
    for part in place:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    if item["type"] == "missing":
        return f"{path}: is required"
    value = repr(item["input"])
    shown = value if len(value) <= 60 else value[:57] + "..."
    hint = ' ("initializing" tables cannot be used)' if path == "status" else ""
    return f"{path}: {_expectation(item)}, got {shown}{hint}"


def _expectation(item: Any) -> str:
    if item["type"] == "model_type":
        return "expected a JSON object"
    message: str = item["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be", "expected")
    return message[0].lower() + message[1:]


# What is wrong beyond single fields. These look at the raw table, and only at its well-formed
# fields, so that they find their problems beside those of single fields.

_NUMBER: TypeAdapter[int] = TypeAdapter(Number)


def _number(value: object) -> int | None:
    try:
        return _NUMBER.validate_python(value)
    except ValidationError:
        return None


def _objects(parent: object, name: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects in a list field, each with its path below the parent."""
    values = parent.get(name) if isinstance(parent, dict) else None
    if not isinstance(values, list):
        return []
    return [(f"{name}[{i}]", value) for i, value in enumerate(values) if isinstance(value, dict)]


def _rank_problems(raw: dict[str, Any]) -> list[str]:
    problems = []
    seen: dict[int, str] = {}
    for server_path, server in _objects(raw, "server_list"):
        for device_path, device in _objects(server, "device"):
            path = f"{server_path}.{device_path}.rank_id"
            rank = _number(device.get("rank_id"))
            if rank in seen:
                problems.append(
                    f"{path}: expected a rank of its own, but {rank} is also that of {seen[rank]}"
                )
            elif rank is not None:
                seen[rank] = path
    return problems


def _count_problems(raw: dict[str, Any]) -> list[str]:
    if raw.get("server_count") is None:
        required = raw.get("version") == "1.0"
        return ["server_count: is required in version 1.0"] if required else []
    count, servers = _number(raw["server_count"]), raw.get("server_list")
    if count is None or not isinstance(servers, list) or count == len(servers):
        return []
    return [f"server_count: expected {len(servers)}, the length of server_list, got {count}"]


def _pod_problems(raw: dict[str, Any]) -> list[str]:
    known = {str(server.get("server_id")) for _, server in _objects(raw, "server_list")}
    return [
        f"{pod_path}.{member_path}.server_id: expected the server_id of a server in server_list, "
        f"got {short_repr(member['server_id'])}"
        for pod_path, pod in _objects(raw, "super_pod_list")
        for member_path, member in _objects(pod, "server_list")
        if "server_id" in member and str(member["server_id"]) not in known
    ]


def _gap_problems(table: _Table) -> list[str]:
    ranks = sorted(device.rank_id for server in table.server_list for device in server.device)
    if ranks == list(range(len(ranks))):
        return []
    return [
        f"rank_id: expected the ranks 0 to {len(ranks) - 1} of {len(ranks)} devices, "
        f"got {_list(ranks[:MAX_LIST_ELEMENTS])}{', ...' if ranks[MAX_LIST_ELEMENTS:] else ''}"
    ]


_ONLY_1_2 = {"super_device_id", "backup_device_ip", "backup_device_port"}


def _normal(table: _Table) -> RankTable:
    """Without what the version does not use, which therefore may differ between ranks."""
    unused = _ONLY_1_2 if table.version == "1.0" else set()
    listed = table.super_pod_list if table.version != "1.0" else None
    pods = {
        member.server_id: pod.super_pod_id
        for pod in sorted(listed or (), key=lambda pod: pod.super_pod_id)
        for member in pod.server_list
    }
    servers = sorted(table.server_list, key=lambda server: min(d.rank_id for d in server.device))
    devices = [
        RankDevice(
            rank=device.rank_id,
            server=number,
            server_id=server.server_id,
            host_ip=server.host_ip,
            super_pod_id=pods.get(server.server_id),
            **device.model_dump(exclude={"rank_id", *unused}),
        )
        for number, server in enumerate(servers)
        for device in server.device
    ]
    return RankTable(table.version, tuple(sorted(devices)))


_TEXT_FIELDS = (
    "device_ip",
    "device_port",
    "host_port",
    "super_device_id",
    "backup_device_ip",
    "backup_device_port",
)


def _device_json(device: RankDevice) -> dict[str, str]:
    fields = {"device_id": str(device.device_id), "rank_id": str(device.rank)}
    for name in _TEXT_FIELDS:
        value = getattr(device, name)
        if value is not None:
            fields[name] = str(value)
    return fields


def _list(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks))


def _and(ranks: list[int]) -> str:
    return f"{_list(ranks[:-1])} and {ranks[-1]}"
