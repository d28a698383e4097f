"""IP addresses as text: what is one, what only looks like one, and every place that takes one."""

from __future__ import annotations

import ipaddress
import json
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from datadist import LLMClusterInfo, LLMConfig, LLMException, LLMRole, LLMStatusCode
from datadist.base.addresses import canonical, is_address, looks_numeric, parse_address, parse_ipv4
from datadist.cli import main
from datadist.control.hostport import HostPort
from datadist.engine.options import EngineOptions, parse_listen_info
from datadist.links import rendezvous
from datadist.rank_table import parse_rank_table
from tests.nodes import table_for

ON = {"llm.EnableCacheManager": "1"}
NUMERIC = [
    "010.0.0.1", "10.0.0.010", "00.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f.1", "0x7f000001",
    "017700000001", "1.0x2", "127.0.0.0x1", "256.0.0.1", "1.2.3.4.5", "1.2.3", "10.0.0.1.", "0x",
    "\uff11\uff10.0.0.1", "127\u30020\uff0e0\uff611",
]  # fmt: skip
"""What resolvers read as a number, or might: no strict address, and no name either."""
TRAILING = [
    "127.0.0.1 and more",
    "127.0.0.1 ",
    " 127.0.0.1",
    "127.0.0.1\n",
    "127.0.0.1\x00",
    "127.0.0.1/8",
]
OTHER = [
    "",
    "1.2.3.x",
    "x.x.x.x",
    "host",
    "+1.2.3.4",
    "-1.2.3.4",
    "1_0.0.0.1",
    "1.2..4",
    "\u0661.0.0.1",
]
IPV6 = ["::1", "FD00::1", "fd00::1", "::ffff:10.0.0.1", "fe80::1%eth0", "0:0:0:0:0:0:0:1"]
NOT_IPV6 = [
    "fe80::1%", "fe80::1%eth0 and more", "fe80::1%a/b", "fe80::1%a%b", "::ffff:010.0.0.1",
    ":::", "1::2::3", "::1 ", "[::1]", "fd00::12345", "::ffff:127.1",
]  # fmt: skip


@given(st.ip_addresses(v=4))
def test_every_address_is_read_as_it_is_written(address: ipaddress.IPv4Address) -> None:
    info = LLMClusterInfo()
    info.append_local_ip_info(str(address), 7)
    assert parse_ipv4(str(address)) == parse_address(str(address)) == address
    assert info.local_ip_info_list == [(int.from_bytes(address.packed, "little"), 7)]


@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(st.from_regex(r"[0-9xXa-f.]{1,20}", fullmatch=True))
def test_what_the_c_library_reads_otherwise_is_neither_address_nor_name(text: str) -> None:
    try:
        loose = socket.inet_aton(text)
    except OSError:
        assume(False)
    if is_address(text):
        assert parse_ipv4(text).packed == loose == socket.inet_pton(socket.AF_INET, text)
        return
    assert looks_numeric(text)
    with pytest.raises(ValueError, match="neither a name nor an IPv4 address"):
        HostPort.parse(f"{text}:7000")


@pytest.mark.parametrize("text", [*NUMERIC, *TRAILING, *OTHER, *IPV6, *NOT_IPV6])
def test_no_ipv4_address(text: str) -> None:
    with pytest.raises(ValueError, match="is not an IPv4 address such as"):
        parse_ipv4(text)
    info, config = LLMClusterInfo(), LLMConfig()
    for append in (info.append_local_ip_info, info.append_remote_ip_info):
        with pytest.raises(RuntimeError, match="is not an IPv4 address") as caught:
            append(text, 1)
        assert type(caught.value) is RuntimeError
    assert not info.local_ip_info_list
    assert not info.remote_ip_info_list
    with pytest.raises(RuntimeError, match="is not an IPv4 address"):
        config.cluster_info = json.dumps({"listen_ip_info": [{"ip": text, "port": 1}]})
    options = {**ON, "llm.ListenIp": text, "llm.ListenPort": "26000"}
    read: list[Callable[[], object]] = [lambda: EngineOptions.parse(options, LLMRole.MIX, {})]
    if ":" not in text:
        info_options = {**ON, "llm.listenIpInfo": f"{text}:26000"}
        read += [
            lambda: EngineOptions.parse(info_options, LLMRole.MIX, {}),
            lambda: parse_listen_info(info_options),
        ]
    for each in read:
        with pytest.raises(LLMException, match="expected an IPv4") as refused:
            each()
        assert refused.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.parametrize("text", IPV6)
def test_ipv6_addresses(text: str) -> None:
    assert parse_address(text).version == 6
    assert HostPort.parse(f"[{text}]:7000") == (text, 7000)


@pytest.mark.parametrize("text", [*NUMERIC, *TRAILING, *OTHER, *NOT_IPV6])
def test_no_address(text: str) -> None:
    assert not is_address(text)
    with pytest.raises(ValueError, match="does not appear to be an IPv"):
        parse_address(text)
    with pytest.raises(ValueError, match=r"."):
        HostPort.parse(f"[{text}]:7000")


@pytest.mark.parametrize("text", NUMERIC)
def test_a_number_is_never_looked_up_as_a_name(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*arguments: object, **_options: object) -> None:
        raise AssertionError(arguments)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(ValueError, match="four decimal numbers from 0 to 255"):
        HostPort.parse(f"{text}:7000")
    with pytest.raises(OSError, match="neither a host name nor an address"):
        HostPort(text, 7000).resolve()
    with pytest.raises(
        LLMException, match=r"DATADIST_RENDEZVOUS is .* is neither a name"
    ) as caught:
        EngineOptions.parse(ON, LLMRole.MIX, {"DATADIST_RENDEZVOUS": f"{text}:7000"})
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.parametrize(
    "name", ["host1", "1host", "node-0", "10.0.0.1.example", "0x7f.host", "a.b1", "x.x.x.x"]
)
def test_names_with_digits_are_names(name: str) -> None:
    assert HostPort.parse(f"{name}:7000") == (name, 7000)


def test_numbers_are_stored_as_given() -> None:
    info = LLMClusterInfo()
    for number in (0, 0x04030201, 1 << 40, -1):
        info.append_remote_ip_info(number, 1)
    assert info.remote_ip_info_list == [(n, 1) for n in (0, 67305985, 1 << 40, -1)]


# -- rank tables ----------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["server_id", "host_ip", "device_ip"])
@pytest.mark.parametrize(
    ("value", "good"),
    [
        ("010.0.0.1", False),
        ("10.0.0.256", False),
        ("10.0.0.1", True),
        ("x.x.x.x", True),
        ("fd00::1", True),
    ],
)
def test_check_names_what_is_no_address_in_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str, value: str, good: bool
) -> None:
    table = json.loads(table_for({1: 0, 2: 1}))
    server = table["server_list"][0]
    (server["device"][0] if field == "device_ip" else server)[field] = value
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    assert main(["check", str(path)]) == (0 if good else 1)
    if not good:
        assert f"{field} of rank 0 is '{value}', which is no IP address" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host_ip", "expected"),
    [
        ("10.0.0.5", HostPort("10.0.0.5", 26500)),
        ("fd00::5", HostPort("fd00::5", 26500)),
        ("010.0.0.5", "host_ip of rank 0 is '010.0.0.5' in the rank table, which is no IP address"),
        ("x.x.x.x", HostPort("10.0.0.9", 26500)),
        (None, HostPort("10.0.0.9", 26500)),
    ],
)
def test_rank_0_is_found_at_no_other_address_than_its_host_ip(
    host_ip: str | None, expected: HostPort | str
) -> None:
    table = json.loads(table_for({1: 0, 2: 1}))
    table["server_list"][0] |= {"server_id": "10.0.0.9", "host_ip": host_ip}
    domain: Any = SimpleNamespace(table=parse_rank_table(json.dumps(table)), ranks={1: 0, 2: 1})
    place = rendezvous._place(domain, None)
    assert place == expected if isinstance(expected, HostPort) else expected in str(place)


@pytest.mark.parametrize(
    ("written", "one"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("FE80:0::1%eth0", "fe80::1"),
        ("fd77:0:0::0001", "fd77::1"),
    ],
)
def test_an_address_has_one_text(written: str, one: str) -> None:
    assert canonical(written) == canonical(one) == one


def test_what_is_no_address_has_none() -> None:
    with pytest.raises(ValueError, match="does not appear to be"):
        canonical("a name")
