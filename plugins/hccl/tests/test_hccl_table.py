"""What HCCL needs of rank tables, and the kind of connection of each pair."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import hccl_sim
import pytest
from datadist_hccl.table import Family, check, family_of, uses_rdma

from datadist.rank_table import RankTable, RankTableError, parse_rank_table
from datadist.transport import LinkError

Change = Callable[[dict[str, Any]], object]


def _table(ranks: int = 2, servers: int = 2, change: Change = lambda _raw: None) -> RankTable:
    raw = json.loads(hccl_sim.table(ranks, servers))
    change(raw)
    return parse_rank_table(json.dumps(raw))


def _device(raw: dict[str, Any], server: int, device: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = raw["server_list"][server]["device"][device]
    return found


def _pods(*pods: list[str]) -> Change:
    def change(raw: dict[str, Any]) -> None:
        raw["version"] = "1.2"
        raw["super_pod_list"] = [
            {"super_pod_id": str(number), "server_list": [{"server_id": s} for s in servers]}
            for number, servers in enumerate(pods)
        ]
        for number, server in enumerate(raw["server_list"]):
            for place, device in enumerate(server["device"]):
                device["super_device_id"] = str(10 * number + place)

    return change


def _set(server: int, device: int, **fields: str) -> Change:
    return lambda raw: _device(raw, server, device).update(fields)


def _second_server(**fields: str) -> Change:
    return lambda raw: raw["server_list"][1].update(fields)


def _all(*changes: Change) -> Change:
    return lambda raw: [change(raw) for change in changes]


ONE, TWO = "10.0.0.1", "10.0.0.2"


def _without_addresses(raw: dict[str, Any]) -> None:
    for server in raw["server_list"]:
        for device in server["device"]:
            del device["device_ip"]


@pytest.mark.parametrize(
    ("table", "family", "roce"),
    [
        (_table(), Family.A2, None),
        (_table(4, 2), Family.A2, True),
        (_table(4, 2), Family.A2, False),
        (_table(2, 1, _without_addresses), Family.A2, False),
        (_table(2, 2, _without_addresses), Family.A3, None),
        (_table(2, 2, _pods([ONE, TWO])), Family.A3, None),
        (_table(2, 2, _set(0, 0, device_ip="192.168.0.9,192.168.1.9")), Family.A2, None),
        (
            _table(2, 2, lambda raw: raw.pop("server_count") and raw.update(version="1.2")),
            Family.A2,
            None,
        ),
    ],
)
def test_tables_that_can_be_used(table: RankTable, family: Family, roce: bool | None) -> None:
    check(table, 0, 0, family, roce)


@pytest.mark.parametrize(
    ("table", "family", "roce", "message"),
    [
        (_table(2, 1), Family.A2, None, r"HCCL_INTRA_ROCE_ENABLE=1 .*or.*HCCL_INTRA_ROCE_ENABLE=0"),
        (_table(2, 2, _without_addresses), Family.A2, None, "device_ip of rank 0 is missing"),
        (_table(2, 1, _without_addresses), Family.A2, True, "device_ip of rank 1 is missing"),
        (
            _table(2, 2, _all(_pods([ONE], [TWO]), _without_addresses)),
            Family.A3,
            None,
            "device_ip of rank 0 is missing",
        ),
        (_table(2, 2, _set(1, 0, device_ip="x.x.x.x")), Family.A2, None, "no IP address"),
        (_table(2, 2, _set(1, 0, device_ip="fe80::1")), Family.A2, None, "IPv4 for all ranks or"),
        (
            _table(2, 2, _set(1, 0, device_ip="192.168.0.1")),
            Family.A2,
            None,
            "given to ranks 0 and 1",
        ),
        (_table(2, 2, _set(1, 0, device_id="16")), Family.A2, None, "at most 15"),
        (_table(2, 2, _set(0, 0, device_id="3")), Family.A2, None, "physical device 0"),
        (_table(2, 1, _set(0, 1, device_id="0")), Family.A2, True, "device_port of its own"),
        (
            _table(2, 2, _second_server(server_id=ONE)),
            Family.A2,
            True,
            "must be unique",
        ),
        (
            _table(2, 2, _second_server(host_ip="node-2")),
            Family.A2,
            None,
            "host_ip of server",
        ),
        (
            _table(4, 2, _all(_set(0, 1, rank_id="2"), _set(1, 0, rank_id="1"))),
            Family.A2,
            True,
            "interleaved",
        ),
        (
            _table(
                2, 2, _all(_pods([ONE, TWO]), lambda raw: _device(raw, 1).pop("super_device_id"))
            ),
            Family.A3,
            None,
            "super_device_id of rank 1 is None",
        ),
        *(
            (
                _table(2, 2, _all(_pods([ONE, TWO]), _set(1, 0, super_device_id=text))),
                Family.A3,
                None,
                "super_device_id of rank 1 is .*decimal number",
            )
            for text in ("0x1", "-1", "1.0", " 1", "\u0661", "one")
        ),
        (
            _table(2, 2, _all(_pods([ONE, TWO]), _set(1, 0, super_device_id="0"))),
            Family.A3,
            None,
            "given 2 times",
        ),
        (_table(2, 2, _pods([ONE])), Family.A3, None, "in no entry of super_pod_list"),
    ],
)
def test_tables_that_hccl_would_refuse(
    table: RankTable, family: Family, roce: bool | None, message: str
) -> None:
    with pytest.raises(LinkError, match=message):
        check(table, 0, 0, family, roce)


# -- numbers of devices --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "rank", "physical"),
    [
        (_table(2, 2, _set(0, 0, device_id="15")), 0, 15),
        (_table(2, 2, _set(1, 0, device_id="15")), 0, 0),
        (_table(2, 2, _set(1, 0, device_id="7")), 1, 7),
        (_table(2, 2, _all(_set(0, 0, device_id="3"), _set(1, 0, device_id="3"))), 1, 3),
        (
            _table(
                2,
                1,
                _all(
                    _set(0, 0, device_id="5", device_port="16666"),
                    _set(0, 1, device_id="5", device_port="16667"),
                ),
            ),
            1,
            5,
        ),
    ],
)
def test_numbers_of_devices_that_can_be_used(table: RankTable, rank: int, physical: int) -> None:
    check(table, rank, physical, Family.A2, True)


@pytest.mark.parametrize(
    ("table", "rank", "physical", "message"),
    [
        (
            _table(2, 2, _set(0, 0, device_id="16")),
            0,
            16,
            "device_id of rank 0 is 16, it must be at most 15",
        ),
        (
            _table(2, 2, _set(1, 0, device_id="4294967295")),
            0,
            0,
            "device_id of rank 1 is 4294967295, it must be at most 15",
        ),
        (
            _table(2, 1, _set(0, 1, device_id="0")),
            0,
            0,
            "ranks 0 and 1 use device 0 of server 10.0.0.1: give each a device_port of its own",
        ),
        (
            _table(
                2,
                1,
                _all(
                    _set(0, 0, device_port="16666"),
                    _set(0, 1, device_id="0", device_port="16666"),
                ),
            ),
            0,
            0,
            "ranks 0 and 1 use device 0 of server 10.0.0.1",
        ),
        (
            _table(4, 1, _all(_set(0, 1, device_id="9"), _set(0, 3, device_id="9"))),
            0,
            0,
            "ranks 1 and 3 use device 9 of server 10.0.0.1",
        ),
    ],
)
def test_numbers_of_devices_that_hccl_would_refuse(
    table: RankTable, rank: int, physical: int, message: str
) -> None:
    with pytest.raises(LinkError) as error:
        check(table, rank, physical, Family.A2, True)
    assert message in str(error.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_number_of_the_own_device_is_the_physical_one(rank: int) -> None:
    """Logical numbers count the devices that a process sees; here device 0 is the physical 4 or 6."""
    table = _table(2, 1, _all(_set(0, 0, device_id="4"), _set(0, 1, device_id="6")))
    check(table, rank, (4, 6)[rank], Family.A2, True)
    for other in (0, (6, 4)[rank]):
        with pytest.raises(LinkError) as error:
            check(table, rank, other, Family.A2, True)
        assert str(error.value) == (
            f"device_id of rank {rank}, which is this engine, is {(4, 6)[rank]}, but the engine runs "
            f"on physical device {other}: correct the table or device_id of the configuration"
        )


@pytest.mark.parametrize(
    "number",
    ["x", "", "-1", "+1", "1.0", "0x1", "1_0", "\uff11", "4294967296", -1, 1.5, True, None, [1]],
)
def test_what_is_no_number_of_a_device(number: object) -> None:
    with pytest.raises(RankTableError, match=r"server_list\[1\]\.device\[0\]\.device_id: expected"):
        _table(2, 2, lambda raw: _device(raw, 1).update(device_id=number))


def test_families_of_chips() -> None:
    assert {
        name: family_of(name) for name in ("Ascend910B3", "Ascend910B4-1", "Ascend910_9391")
    } == {
        "Ascend910B3": Family.A2,
        "Ascend910B4-1": Family.A2,
        "Ascend910_9391": Family.A3,
    }
    for name in ("", "Ascend310P3", "Ascend910A", "Ascend910ProB", "Ascend910_9589", "Ascend950"):
        assert family_of(name) is None


@pytest.mark.parametrize(
    ("table", "family", "roce", "rdma"),
    [
        (_table(2, 2), Family.A2, False, True),
        (_table(2, 1), Family.A2, False, False),
        (_table(2, 1), Family.A2, True, True),
        (_table(2, 2), Family.A3, False, False),
        (_table(2, 2), Family.A3, True, True),
        (_table(2, 2, _pods([ONE, TWO])), Family.A3, False, False),
        (_table(2, 2, _pods([ONE], [TWO])), Family.A3, False, True),
    ],
)
def test_the_connection_of_a_pair(table: RankTable, family: Family, roce: bool, rdma: bool) -> None:
    assert uses_rdma(family, roce, table.device(0), table.device(1)) is rdma
