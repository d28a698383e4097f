"""Local communication resources: given, found, and merged into a rank table."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from datadist_hccl.resource import Resource, address_of, given, merge
from datadist_hccl.table import Family, check
from hypothesis import given as given_any
from hypothesis import settings
from hypothesis import strategies as st

from datadist.transport import LinkError

DEVICE = {"device_id": "3", "device_ip": "192.168.1.3"}
GIVEN: dict[str, Any] = {
    "version": "1.0",
    "server_list": [{"server_id": "10.0.0.1", "device": [DEVICE]}],
}


def _resource(server: str, device: int, version: Any = "1.0", **fields: Any) -> Resource:
    ip = f"192.168.{device}.{len(server)}"
    return Resource(version=version, server_id=server, device_id=device, device_ip=ip, **fields)


def test_what_the_user_gives() -> None:
    expected = Resource(version="1.0", server_id="10.0.0.1", device_id=3, device_ip="192.168.1.3")
    assert given(json.dumps(GIVEN), 3) == expected
    complete = GIVEN | {"status": "completed", "server_count": "1"}
    complete["server_list"][0]["device"][0]["rank_id"] = "5"
    assert given(json.dumps(complete), 3) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "EOF while parsing"),
        ("[" * 60_000, "recursion limit"),
        ('{"server_list":' * 4000, "recursion limit"),
        (json.dumps(GIVEN | {"server_list": [[]]}), "exactly one device"),
        (
            json.dumps(GIVEN | {"server_list": [{"server_id": "a", "device": [3]}]}),
            "exactly one dev",
        ),
        ("[]", "exactly one server"),
        (json.dumps(GIVEN | {"server_list": []}), "exactly one server"),
        (
            json.dumps(GIVEN | {"server_list": [{"server_id": "a", "device": []}]}),
            "exactly one device",
        ),
        (json.dumps(GIVEN | {"version": "1.3"}), "version"),
        (json.dumps(GIVEN | {"version": "1.2"}), "needs super_device_id"),
        (" " * 65537, "more than 65536"),
    ],
)
def test_what_cannot_be_used(text: str, reason: str) -> None:
    with pytest.raises(LinkError, match=f"local_comm_res.*{reason}"):
        given(text, 3)


def test_a_resource_of_another_device() -> None:
    with pytest.raises(LinkError, match="device_id is 3, this engine runs on physical device 0"):
        given(json.dumps(GIVEN), 0)


texts = st.text(min_size=1, max_size=8) | st.sampled_from(["a", "b", "10.0.0.1", "1", "-1", "\x00"])
resources = st.builds(
    Resource, version=st.sampled_from(["1.0", "1.2"]), server_id=texts,
    device_id=st.integers(0, 15), device_ip=st.none() | texts,
    device_port=st.none() | st.integers(1, 65535), super_device_id=st.none() | texts,
    super_pod_id=st.none() | texts,
)  # fmt: skip


@settings(deadline=None)
@given_any(st.lists(resources, min_size=1, max_size=4))
def test_whatever_peers_send_makes_a_table_or_none(sent: list[Resource]) -> None:
    try:
        table = merge(dict(enumerate(sent)))
    except LinkError:
        return
    for rank, device in enumerate(table.devices):
        assert device.server_id == sent[rank].server_id
        with contextlib.suppress(LinkError):
            check(table, rank, device.device_id, Family.A2, True)


@pytest.mark.parametrize("servers", [("b", "a"), ("a", "a")])
def test_all_ranks_make_the_same_table(servers: tuple[str, str]) -> None:
    resources = {rank: _resource(server, rank) for rank, server in enumerate(servers)}
    table = merge(resources)
    assert merge(dict(reversed(list(resources.items())))).canonical == table.canonical
    assert [device.server_id for device in table.devices] == list(servers)
    check(table, 1, 1, Family.A2, True)


def test_super_nodes_are_kept_and_the_older_version_wins() -> None:
    one = _resource("a", 0, "1.2", super_device_id="4", super_pod_id="1")
    two = _resource("b", 1, "1.2", super_device_id="5", super_pod_id="2")
    table = merge({0: one, 1: two})
    assert [(d.super_pod_id, d.super_device_id) for d in table.devices] == [("1", "4"), ("2", "5")]
    check(table, 0, 0, Family.A3, None)
    older = merge({0: one, 1: _resource("b", 1)})
    assert older.version == "1.0"
    assert "super_pod_list" not in json.loads(older.canonical)


def test_the_address_of_a_device_comes_from_the_machines_configuration(tmp_path: Path) -> None:
    path = tmp_path / "hccn.conf"
    assert address_of(1, path) is None
    path.write_text(
        "address_0=10.1.1.1\nnetmask_1=255.0.0.0\naddress_1=10.1.1.2\naddress_10=10.1.1.9\n"
    )
    assert [address_of(number, path) for number in (0, 1, 10, 2)] == [
        "10.1.1.1",
        "10.1.1.2",
        "10.1.1.9",
        None,
    ]
