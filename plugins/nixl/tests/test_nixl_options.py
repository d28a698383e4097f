"""Options, and what may listen where."""

from __future__ import annotations

import pytest
from datadist_nixl.options import parse

from datadist.transport import OptionError, TransportOptions


def test_by_default_nothing_leaves_the_host() -> None:
    options = parse(TransportOptions())
    assert (options.device, options.transports, options.listen) == ("lo", "tcp", None)


def test_a_loopback_address_needs_no_key() -> None:
    options = parse(TransportOptions(listen_address="127.0.0.1"))
    assert (options.device, options.listen) == ("lo", "127.0.0.1")


def test_the_address_of_the_device_is_listened_on(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"eth0": ["192.0.2.7", "fd00::7"], "eth1": ["192.0.2.8"]}
    monkeypatch.setattr("datadist_nixl.options._addresses", lambda name: found.get(name, []))
    for device, listen in (("eth0", "192.0.2.7"), ("lo,eth1", "192.0.2.8"), ("mlx5_0:1", None)):
        options = parse(TransportOptions(extra={"device": device}, auth_key=b"k"))
        assert options.listen == listen


def test_beyond_loopback_a_key_is_needed() -> None:
    for given in ({"device": "eth0"}, {"device": "mlx5_0:1", "transports": "rc,tcp"}):
        with pytest.raises(OptionError, match="DATADIST_AUTH_KEY"):
            parse(TransportOptions(extra=given))
        assert parse(TransportOptions(extra=given, auth_key=b"k")).device == given["device"]


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"nonsense": "1"}, r"unknown option datadist\.nixl\.nonsense"),
        ({"transports": "all", "device": "eth0"}, "it must be"),
        ({"device": ""}, "must name an interface"),
        ({"device": "eth0 lo"}, "must name an interface"),
        ({"device": "lo"}, "nobody reaches from other hosts"),
    ],
)
def test_wrong_options_are_refused(extra: dict[str, str], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        parse(TransportOptions(extra=extra, listen_address="192.0.2.1", auth_key=b"k"))


@pytest.mark.parametrize("address", ["192.0.2.1", "0.0.0.0", "::", "host"])
def test_an_address_that_no_interface_has_is_refused(address: str) -> None:
    with pytest.raises(OptionError, match=address):
        parse(TransportOptions(listen_address=address, auth_key=b"k"))
