"""Strict parsing of IP addresses in options, rank tables, the environment and commands.

`inet_aton` and name look-ups read ``010.0.0.1`` as 8.0.0.1 and ``127.1`` as 127.0.0.1, and ignore
text after a space. Here an IPv4 address is four decimal numbers without leading zeros. An IPv6
address may have a scope: the name of the interface, as in ``fe80::1%eth0``. White space is not
removed.
"""

from __future__ import annotations

import ipaddress
import re

from datadist.base.callers import pass_on

__all__ = [
    "Address", "canonical", "is_address", "looks_numeric", "parse_address", "parse_ipv4",
]  # fmt: skip

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_SCOPE = re.compile(r"[^\s/%]{1,15}")
"""Name or number of a network interface."""
_NUMERIC = re.compile(r"(?:.*\.)?(?:[0-9]+|0[xX][0-9a-fA-F]*)\.?", re.DOTALL)
"""Text that ends in a number. It cannot be a host name (RFC 3696); resolvers read it as an address."""


def parse_address(text: str) -> Address:
    """An IPv4 or IPv6 address; an IPv4-mapped one stays IPv6. Raises ``ValueError``."""
    try:
        address = ipaddress.ip_address(str(text))
    except ValueError as error:
        pass_on(error)
        raise ValueError(
            f"{text!r} does not appear to be an IPv4 or IPv6 address{_hint(text)}"
        ) from None
    scope = address.scope_id if isinstance(address, ipaddress.IPv6Address) else None
    if scope is not None and not _SCOPE.fullmatch(scope):
        raise ValueError(
            f"{text!r} does not appear to be an IPv6 address: no interface is called {scope!r}"
        )
    return address


def parse_ipv4(text: str) -> ipaddress.IPv4Address:
    """An IPv4 address. Raises ``ValueError``."""
    try:
        return ipaddress.IPv4Address(str(text))
    except ValueError as error:
        pass_on(error)
        raise ValueError(f"{text!r} is not an IPv4 address such as 10.0.0.1{_hint(text)}") from None


def canonical(text: str) -> str:
    """One text per address, however it is written: an IPv4-mapped one is IPv4, no interface is named.

    Raises ``ValueError`` for what is no address.
    """
    address = parse_address(text)
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(address).partition("%")[0]
    return str(address)


def is_address(text: str | None) -> bool:
    """Whether the text is an IPv4 or IPv6 address."""
    try:
        parse_address(text or "")
    except ValueError as error:
        pass_on(error)
        return False
    return True


def looks_numeric(host: str) -> bool:
    """Whether a resolver would read the text as a number and not as a name.

    Full-width digits and dots count too, since IDNA converts them to ASCII.
    """
    try:
        ascii_text = host.encode("idna").decode("ascii")
    except UnicodeError as error:
        pass_on(error)
        ascii_text = host
    return _NUMERIC.fullmatch(ascii_text) is not None


def _hint(text: str) -> str:
    if not looks_numeric(text) or ":" in text:
        return ""
    return ": write four decimal numbers from 0 to 255 without leading zeros"
