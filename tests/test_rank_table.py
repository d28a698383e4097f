"""Rank tables: what is accepted, what is said of the rest, and their normal form."""

from __future__ import annotations

import copy
import json
import random
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datadist.rank_table import RankTableError, parse_rank_table
from tests.upstream import CONTRACT_TABLE


def device(rank: int, **fields: Any) -> dict[str, Any]:
    return {"device_id": "0", "rank_id": str(rank), **fields}


def table(*servers: dict[str, Any], **fields: Any) -> dict[str, Any]:
    listed = list(servers) or [
        {"server_id": "a", "device": [device(0)]},
        {"server_id": "b", "device": [device(1)]},
    ]
    return {
        "version": "1.0",
        "status": "completed",
        "server_count": str(len(listed)),
        "server_list": listed,
        **fields,
    }


def full_table() -> dict[str, Any]:
    """Version 1.2 with every documented field."""
    server = {
        "server_id": "node_0",
        "host_ip": "10.0.0.1",
        "device": [
            device(
                0,
                device_ip="192.168.0.1",
                device_port="16666",
                host_port="60000",
                super_device_id="5",
                backup_device_ip="192.168.1.1",
                backup_device_port="16667",
            )
        ],
    }
    other = {"server_id": "node_1", "device": [device(1, super_device_id="6")]}
    pods = [
        {"super_pod_id": "p0", "server_list": [{"server_id": "node_0"}]},
        {"super_pod_id": "p1", "server_list": [{"server_id": "node_1"}]},
    ]
    return table(server, other, version="1.2", super_pod_list=pods)


def problems(raw: object) -> list[str]:
    with pytest.raises(RankTableError) as caught:
        parse_rank_table(raw if isinstance(raw, str) else json.dumps(raw))
    assert str(caught.value) == "; ".join(caught.value.problems)
    return caught.value.problems


# -- what is accepted ----------------------------------------------------------------------------


def test_the_documented_example_is_accepted_with_its_trailing_commas() -> None:
    parsed = parse_rank_table(CONTRACT_TABLE)
    assert parsed.version == "1.0"
    assert parsed.ranks == (0, 1)
    assert [d.server for d in parsed.devices] == [0, 1]
    for each in parsed.devices:
        assert (each.server_id, each.device_id, each.device_ip) == ("xxxx", 0, "x.x.x.x")


def test_every_documented_field_of_1_2_is_read() -> None:
    parsed = parse_rank_table(json.dumps(full_table()))
    first = parsed.device(0)
    assert (first.server_id, first.host_ip, first.super_pod_id) == ("node_0", "10.0.0.1", "p0")
    assert (first.device_ip, first.device_port, first.host_port) == ("192.168.0.1", 16666, 60000)
    assert first.super_device_id == "5"
    assert (first.backup_device_ip, first.backup_device_port) == ("192.168.1.1", 16667)
    assert parsed.device(1).super_pod_id == "p1"
    with pytest.raises(KeyError):
        parsed.device(2)


def test_1_2_needs_neither_count_nor_super_pods() -> None:
    raw = table(version="1.2")
    del raw["server_count"]
    assert parse_rank_table(json.dumps(raw)).ranks == (0, 1)


def test_numbers_may_be_plain() -> None:
    raw = full_table()
    raw["server_count"] = 2
    raw["server_list"][0]["device"][0].update(
        rank_id=0, device_id=0, device_port=16666, super_device_id=5
    )
    assert parse_rank_table(json.dumps(raw)) == parse_rank_table(json.dumps(full_table()))


def test_unknown_fields_do_not_matter() -> None:
    raw = table(comment="x")
    raw["server_list"][0]["device"][0]["comment"] = "y"
    assert parse_rank_table(json.dumps(raw)) == parse_rank_table(json.dumps(table()))


# -- what is not ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        (("version",), "2.0", "version: expected '1.0' or '1.2', got '2.0'"),
        (("version",), None, "version: is required"),
        (("status",), None, "status: is required"),
        (("status",), "initializing", "status: expected 'completed'"),
        (("server_count",), None, "server_count: is required in version 1.0"),
        (("server_count",), "3", "server_count: expected 2"),
        (("server_list",), None, "server_list: is required"),
        (("server_list", 1, "device"), "x", "server_list[1].device: expected a valid list"),
        (("server_list",), {}, "server_list: expected a valid list"),
        (("server_list", 1), "x", "server_list[1]: expected a JSON object, got 'x'"),
        (("server_list", 1, "server_id"), None, "server_list[1].server_id: is required"),
        (("server_list", 1, "server_id"), "x" * 65, "server_list[1].server_id: string should"),
        (("server_list", 1, "device"), [], "server_list[1].device: list should"),
        (("server_list", 1, "device", 0, "rank_id"), None, "device[0].rank_id: is required"),
        (
            ("server_list", 1, "device", 0, "rank_id"),
            "one",
            "server_list[1].device[0].rank_id: expected a number as text, such as \"0\", got 'one'",
        ),
        (("server_list", 1, "device", 0, "rank_id"), True, "device[0].rank_id: expected a number"),
        (("server_list", 1, "device", 0, "rank_id"), "-1", "device[0].rank_id: expected a number"),
        (("server_list", 1, "device", 0, "rank_id"), "9" * 5000, "rank_id: expected a number"),
        (("server_list", 1, "device", 0, "rank_id"), 1.5, "device[0].rank_id: expected"),
        (("server_list", 1, "device", 0, "rank_id"), "0", "rank_id: expected a rank of its own"),
        (("server_list", 1, "device", 0, "rank_id"), "2", "expected the ranks 0 to 1"),
        (("server_list", 1, "device", 0, "device_id"), None, "device[0].device_id: is required"),
        (("server_list", 1, "device", 0, "device_port"), "0", "device_port: expected"),
        (("server_list", 1, "device", 0, "host_port"), "65536", "host_port: expected"),
        (("server_list", 1, "device", 0, "super_device_id"), "", "super_device_id: string should"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected(
    path: tuple[str | int, ...], value: object, text: str
) -> None:
    raw: Any = table()
    parent = raw
    for part in path[:-1]:
        parent = parent[part]
    if value is None:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    (found,) = problems(raw)
    assert text in found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is empty"),
        (
            "/etc/hccn/ranks.json",
            "'/etc/hccn/ranks.json' is the name of a file, give the text that",
        ),
        ("ranks.json", "open(path).read()"),
        ("{'version': '1.0'}", "json.dumps(...) of a dict"),
        ('{"version": "1.0" "x"}', "delimiter: line 1 column 19 (char 18), near "),
        ('"{}"', "it is a JSON string in which the table is"),
    ],
)
def test_text_that_is_no_table_says_what_it_is(text: str, said: str) -> None:
    with pytest.raises(RankTableError) as caught:
        parse_rank_table(text)
    (problem,) = caught.value.problems
    assert said in problem


def test_all_problems_are_reported_at_once() -> None:
    found = problems(
        {
            "version": "1.0",
            "status": "initializing",
            "server_count": "7",
            "server_list": [
                {"server_id": "a", "device": [device(0), device(0), {}]},
                {"device": [device(5, device_port="x")]},
            ],
            "super_pod_list": [{"super_pod_id": "p", "server_list": [{"server_id": "z"}]}],
        }
    )
    expected = [
        "status: ",
        "server_list[0].device[2].device_id: is required",
        "server_list[0].device[2].rank_id: is required",
        "server_list[1].server_id: is required",
        "server_list[1].device[0].device_port: ",
        "server_list[0].device[1].rank_id: expected a rank of its own",
        "server_count: expected 2",
        "super_pod_list[0].server_list[0].server_id: expected the server_id of a server",
    ]
    assert len(found) == len(expected)
    for problem, start in zip(found, expected, strict=True):
        assert problem.startswith(start)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", '{"a": 1,,}', '{"a', '{"a\\', "[" * 100_000, f'{{"a": {"1" * 5000}}}'],
)
def test_text_that_is_no_json_object_is_refused(text: str) -> None:
    (problem,) = problems(text)
    assert "JSON" in problem


def test_positions_in_json_errors_are_those_of_the_text() -> None:
    (problem,) = problems('{"a": [1,],\n "b": x}')
    assert "line 2 column 7" in problem


def test_a_huge_text_is_refused() -> None:
    assert "characters" in problems(" " * (2**20 + 1))[0]


@pytest.mark.parametrize(
    "text", ['\\"' * 500_000, '"\\' * 300_000, ", " * 500_000, '"' + "a" * 10**6]
)
def test_hostile_text_is_refused_quickly(text: str) -> None:
    began = time.monotonic()
    problems(text)
    assert time.monotonic() - began < 20, "what grows with the square takes minutes"


def test_empty_devices_as_in_stubs_are_problems_and_nothing_worse() -> None:
    assert len(problems({"server_list": [{"device": [{}]}]})) == 5


# -- normal form ---------------------------------------------------------------------------------

texts = st.text(min_size=1, max_size=12)
ports = st.one_of(st.none(), st.integers(1, 65535))
optional_texts = st.one_of(st.none(), texts)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    """Valid tables, with repeated ids and up to nine ranks spread over up to three servers."""
    version = draw(st.sampled_from(["1.0", "1.2"]))
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    ranks = draw(st.permutations(range(sum(sizes))))
    servers: list[dict[str, Any]] = []
    for size in sizes:
        devices: list[dict[str, Any]] = []
        for _ in range(size):
            entry: dict[str, Any] = {
                "device_id": str(draw(st.integers(0, 15))),
                "rank_id": str(ranks[sum(len(s["device"]) for s in servers) + len(devices)]),
            }
            for name in ("device_ip", "super_device_id", "backup_device_ip"):
                entry[name] = draw(optional_texts)
            for name in ("device_port", "host_port", "backup_device_port"):
                port = draw(ports)
                entry[name] = port if port is None else str(port)
            devices.append({name: value for name, value in entry.items() if value is not None})
        servers.append({"server_id": draw(texts), "device": devices})
        if (host := draw(optional_texts)) is not None:
            servers[-1]["host_ip"] = host
    raw = table(*servers, version=version)
    if draw(st.booleans()):
        raw["super_pod_list"] = [
            {"super_pod_id": draw(texts), "server_list": [{"server_id": s["server_id"]}]}
            for s in servers
        ]
    return raw


@given(tables())
def test_the_canonical_text_is_strict_json_that_means_the_same(raw: dict[str, Any]) -> None:
    parsed = parse_rank_table(json.dumps(raw))
    json.loads(parsed.canonical)
    again = parse_rank_table(parsed.canonical)
    assert again == parsed
    assert again.canonical == parsed.canonical


@given(tables(), st.randoms(use_true_random=False))
def test_order_layout_and_count_do_not_matter(raw: dict[str, Any], shuffle: random.Random) -> None:
    parsed = parse_rank_table(json.dumps(raw))
    other = copy.deepcopy(raw)
    if other["version"] == "1.2":
        del other["server_count"]
    for each in other["server_list"]:
        shuffle.shuffle(each["device"])
        for entry in each["device"]:
            entry["rank_id"] = int(entry["rank_id"])
    shuffle.shuffle(other["server_list"])
    shuffle.shuffle(other.get("super_pod_list", []))
    reordered = dict(reversed(other.items()))
    same = parse_rank_table(json.dumps(reordered, indent=3, ensure_ascii=False))
    assert same == parsed
    assert same.canonical == parsed.canonical
    assert parsed.differences(same, "here", "there") == []


@given(st.text(alphabet='a"\\,[]{} \n', min_size=1, max_size=20))
def test_commas_inside_strings_are_left_alone(name: str) -> None:
    raw = table()
    raw["server_list"][0]["server_id"] = name
    text = json.dumps(raw)
    for closing in ("}", "]"):
        text = text[: text.rindex(closing)] + " ,\n " + text[text.rindex(closing) :]
    assert parse_rank_table(text).device(0).server_id == name


def test_what_version_1_0_does_not_use_makes_no_difference() -> None:
    raw = full_table()
    raw["version"] = "1.0"
    bare = copy.deepcopy(raw)
    del bare["super_pod_list"]
    for server in bare["server_list"]:
        for name in ("super_device_id", "backup_device_ip", "backup_device_port"):
            server["device"][0].pop(name, None)
    assert parse_rank_table(json.dumps(raw)) == parse_rank_table(json.dumps(bare))


# -- comparison ----------------------------------------------------------------------------------


def test_the_ranks_of_a_mapping_must_be_those_of_the_table() -> None:
    parsed = parse_rank_table(CONTRACT_TABLE)
    assert parsed.check_ranks([1, 0]) == []
    found = parsed.check_ranks([0, 0, 7])
    assert len(found) == 3
    assert "rank 0 is given to 2 clusters" in found[0]
    assert "names rank 7, which no device" in found[1]
    assert "rank_id 1, which cluster_rank_info does not name" in found[2]


@pytest.mark.parametrize(
    ("ports", "shared"),
    [
        ([None, None, None], True),
        ([None, 1, 2], True),
        ([1, None, 2], True),
        ([1, 2, None], True),
        ([1, 2, 1], True),
        ([1, 2, 3], False),
        ([None], False),
        ([1], False),
    ],
)
def test_all_ranks_of_a_device_need_ports_that_differ(
    ports: list[int | None], shared: bool
) -> None:
    devices = [
        device(rank, device_id="5", **({} if port is None else {"device_port": str(port)}))
        for rank, port in enumerate(ports)
    ]
    alone = device(len(ports), device_id="6")
    found = parse_rank_table(json.dumps(table({"server_id": "a", "device": [*devices, alone]})))
    said = "ranks 0, 1 and 2 use device 5 of server a: give each a device_port of its own"
    assert found.shared_devices() == ([said] if shared else [])


def test_differences_name_the_field_the_rank_and_both_values() -> None:
    mine = parse_rank_table(json.dumps(table()))
    raw = table(version="1.2")
    raw["server_list"][1]["server_id"] = "c"
    raw["server_list"][1]["device"].append(device(2))
    found = mine.differences(parse_rank_table(json.dumps(raw)), "at cluster 1", "at cluster 2")
    assert found == [
        "rank table version is 1.0 at cluster 1 and 1.2 at cluster 2",
        "server_id of rank 1 in the rank table is 'b' at cluster 1 and 'c' at cluster 2",
        "the rank table has no rank 2 at cluster 1",
    ]


def test_one_server_with_two_devices_differs_from_two_servers() -> None:
    one = table({"server_id": "a", "device": [device(0), device(1)]})
    two = table(
        {"server_id": "a", "device": [device(0)]}, {"server_id": "a", "device": [device(1)]}
    )
    mine, theirs = (parse_rank_table(json.dumps(raw)) for raw in (one, two))
    assert mine.canonical != theirs.canonical
    assert len(mine.differences(theirs, "here", "there")) == 1


@pytest.mark.parametrize("item", ["{}", "[]", "0", '{"device":[0,0,0]}', '{"device":[{},{},{}]}'])
def test_of_problems_in_great_numbers_some_are_named(item: str) -> None:
    """Noting them all takes a thousand times the memory of the table."""
    count = 2**20 // (len(item) + 1) - 100
    text = f'{{"version":"1.0","status":"completed","server_list":[{",".join([item] * count)}]}}'
    tracemalloc.start()
    found = problems(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 100 <= len(found) <= 101
    assert "server_list[0]" in "; ".join(found[:2])
    assert len("; ".join(found)) < 100_000
    assert peak < 400 * len(text)


def test_ranks_with_gaps_in_great_numbers_are_named_in_part() -> None:
    servers = [{"server_id": str(n), "device": [device(2 * n)]} for n in range(1000)]
    (found,) = problems(table(*servers, server_count="1000"))
    assert "got 0, 2, 4" in found
    assert found.endswith(", ...")
    assert len(found) < 400
