"""Addresses with a port as people write them."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datadist.base.addresses import is_address
from datadist.control.hostport import HostPort

PORTS = st.integers(1, 65535)


@given(st.ip_addresses(), PORTS)
def test_what_is_written_is_read_back(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int
) -> None:
    place = HostPort(str(address), port)
    assert HostPort.parse(str(place)) == place
    family, resolved = place.resolve()[0]
    assert resolved[1] == port
    assert ipaddress.ip_address(resolved[0].partition("%")[0]) == address
    assert family.name == ("AF_INET" if address.version == 4 else "AF_INET6")


@given(st.text())
def test_nonsense_is_a_value_error(text: str) -> None:
    try:
        place = HostPort.parse(text)
    except ValueError:
        return
    assert place.host
    assert 1 <= place.port <= 65535


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "expected host:port"),
        ("host", "expected host:port"),
        (":7000", "expected host:port"),
        ("a host:7000", "expected host:port"),
        ("host:", "is not a number"),
        ("host:-1", "is not a number"),
        ("host:\uff17", "is not a number"),
        ("host:100000", "is not a number"),
        ("host:0", r"in \[1, 65535\]"),
        ("host:65536", r"in \[1, 65535\]"),
        ("fd00::1:7000", r"\[address\]:port"),
        ("[fd00::1]", "expected|address"),
        ("[10.0.0.1]:7000", "in the brackets"),
        ("[host]:7000", "in the brackets"),
    ],
)
def test_what_is_wrong_is_said(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        HostPort.parse(text)


@pytest.mark.parametrize("host", ["no-such-name.invalid", "a" * 64 + ".example", "..", "\udcff"])
def test_a_name_that_is_none_is_an_os_error(host: str) -> None:
    with pytest.raises(OSError, match=r"."):
        HostPort(host, 1).resolve()


def test_addresses_and_names() -> None:
    assert is_address("10.0.0.1")
    assert is_address("fd00::1")
    assert not is_address("host")
    assert not is_address("")
    assert not is_address(None)
