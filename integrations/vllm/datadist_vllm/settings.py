"""What ``kv_connector_extra_config`` may say."""

from __future__ import annotations

import difflib
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Settings:
    """The settings of one instance; each field is a key of ``kv_connector_extra_config``."""

    backend: str = ""
    """Transport of datadist; empty for the one that datadist chooses."""
    listen_host: str = "127.0.0.1"
    """IPv4 address at which other instances find the workers. Other hosts need DATADIST_AUTH_KEY too."""
    pool: bool = True
    """On CPUs, place vLLM's KV cache in a pool of datadist; else its memory is registered."""
    lease_seconds: float = 30.0
    """How long a prefiller keeps blocks that nobody reads or renews."""
    link_seconds: float = 5.0
    """Longest time to make a link."""
    pull_seconds: float = 30.0
    """Longest time of one transfer."""
    peer_tensor_parallel_size: int = 0
    """Of the instances that read here, where it is larger than this one's; 0: it is not."""
    keep_seconds: float = 0.0
    """How long a decoder keeps the blocks of a request for the next turn; 0: not at all."""

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Settings:
        """Raise ``ValueError`` for an unknown key, a value of another type, or a number out of range."""
        known = {field.name: field for field in fields(cls)}
        for key in given:
            if key not in known:
                raise ValueError(
                    f"kv_connector_extra_config: {key!r} is unknown{_meant(key, known)}"
                )
        settings = cls(
            **{key: _checked(key, known[key].default, value) for key, value in given.items()}
        )
        for key in ("lease_seconds", "link_seconds", "pull_seconds"):
            _check_range(key, getattr(settings, key), 0.1, 86_400)
        _check_range("keep_seconds", settings.keep_seconds, 0, 86_400)
        _check_range("peer_tensor_parallel_size", settings.peer_tensor_parallel_size, 0, 1024)
        _check_address("listen_host", settings.listen_host)
        return settings


def _meant(key: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    return f", is {near[0]!r} meant?" if near else f"; known are {', '.join(sorted(known))}"


def _checked(key: str, default: object, value: Any) -> Any:
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise ValueError(
            f"kv_connector_extra_config: {key!r} is {value!r}, expected a {type(default).__name__}"
        )
    return value


def _check_range(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(
            f"kv_connector_extra_config: {key!r} is {value}, expected {low:g} to {high:g}"
        )


def _check_address(key: str, value: str) -> None:
    """Others are told this address: one that stands for all addresses leads them nowhere."""
    try:
        usable = not ipaddress.IPv4Address(value).is_unspecified
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(
            f"kv_connector_extra_config: {key!r} is {value!r}, expected an IPv4 address of this host, at "
            "which other instances find it"
        )
