"""The options of `init`: text by documented keys in, typed values out."""

from __future__ import annotations

import base64
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from datadist.base import checks
from datadist.base.addresses import parse_ipv4
from datadist.base.callers import pass_on
from datadist.base.digits import is_digits, parse_digits
from datadist.base.texts import in_seconds, short_repr
from datadist.caches.pool_config import PoolConfig, parse_pool
from datadist.control.hostport import HostPort
from datadist.control.job import job_name
from datadist.control.messages import MAX_METADATA
from datadist.status import param_invalid
from datadist.transports.option_keys import check_keys, meant_by, not_text, where, wrong
from datadist.types import LLMRole

log = logging.getLogger("datadist.options")

DEFAULT_LINK_SECONDS = 120.0
CONNECT_RANGE = (120, 7200)
DEFAULT_PEER_SECONDS = 10.0
PEER_RANGE = (2, 600)
DEFAULT_BACKGROUND_THREADS = 8
BACKGROUND_RANGE = (2, 64)


@dataclass(frozen=True)
class EngineOptions:
    """What an engine needs to know; made by :meth:`parse`.

    Keys, limits and defaults: LLM-DataDist API, initialisation options.
    """

    device_id: int = 0
    device_pool: PoolConfig | None = None
    host_pool: PoolConfig | None = None
    remote_accessible: bool = False
    sync_timeout: float = 1.0
    """Seconds that one pull or push may take."""
    listen_ip: str | None = None
    listen_port: int | None = None
    """0: an address is given, but nothing listens on it."""
    backend: str | None = None
    """Name of a transport or "auto"; None where nothing was chosen."""
    hixl: bool = False
    """Whether the backend was asked for as "hixl", which knows no :meth:`LLMDataDist.link`."""
    link_total_time: float = DEFAULT_LINK_SECONDS
    """Seconds."""
    link_retry_count: int = 1
    traffic_class: int | None = None
    service_level: int | None = None
    local_comm_res: str | None = None
    auth_key: bytes | None = field(default=None, repr=False)
    job: str = ""
    """Engines of other jobs are never met."""
    rendezvous: HostPort | None = None
    """Where rank 0 listens; None: where the rank table says."""
    peer_timeout: float = DEFAULT_PEER_SECONDS
    """Seconds of silence after which a peer's host counts as dead."""
    checksum: bool = False
    """Whether both ends compare checksums after each transfer that this engine begins."""
    check_types: bool = False
    """Whether transfers between caches of different element types are errors."""
    background_threads: int = DEFAULT_BACKGROUND_THREADS
    """Threads for transfers in the background, at most."""
    link_metadata: bytes = b""
    """What peers are given where a call that links names nothing else."""
    extra: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Options ``datadist.<backend>.<name>``, by backend and name."""

    @classmethod
    def parse(
        cls, options: dict[str, str], role: LLMRole, environ: Mapping[str, str]
    ) -> EngineOptions:
        """Check and convert, in the documented order (LLM-DataDist API, init; options).

        ``options`` are left as they are. ``environ`` gives HCCL_CONNECT_TIMEOUT (seconds, used
        where the total time is 0), DATADIST_AUTH_KEY, DATADIST_JOB,
        DATADIST_RENDEZVOUS and DATADIST_PEER_TIMEOUT.

        Raises ``TypeError``, ``AttributeError`` for what is no dict of text, ``ValueError`` for a
        port that is no number, ``KeyError`` for a role of None, ``ModuleNotFoundError`` where
        cache-manager mode is off, LLMException (LLM_PARAM_INVALID) for wrong values.
        """
        given = _completed(options, role)
        check_keys(given)
        backend = given.get("llm.TransferBackend")
        return cls(
            # Keyword arguments are evaluated in this order, which is that of the checks.
            backend="auto" if backend == "hixl" else backend,
            hixl=backend == "hixl",
            remote_accessible=_flag(given, "llm.EnableRemoteCacheAccessible"),
            device_id=_device_id(given),
            traffic_class=_number(given, "llm.RdmaTrafficClass", 0, 2**32 - 1),
            service_level=_number(given, "llm.RdmaServiceLevel", 0, 2**32 - 1),
            link_total_time=_link_time(given, environ),
            link_retry_count=_number(given, "llm.LinkRetryCount", 1, 100) or 1,
            listen_ip=_listen_ip(given),
            listen_port=_listen_port(given),
            sync_timeout=(_number(given, "llm.SyncKvCacheWaitTime", 1, 2**31 - 1) or 1000) / 1000,
            device_pool=parse_pool(given, "llm.MemPoolConfig"),
            host_pool=parse_pool(given, "llm.HostMemPoolConfig"),
            local_comm_res=given.get("llm.LocalCommRes"),
            auth_key=os.fsencode(environ.get("DATADIST_AUTH_KEY", "")) or None,
            job=_job(environ),
            rendezvous=_rendezvous(environ),
            peer_timeout=_peer_timeout(environ),
            checksum=_flag(given, "datadist.checksum"),
            check_types=_flag(given, "datadist.check_types"),
            background_threads=_number(given, "datadist.background_threads", *BACKGROUND_RANGE)
            or DEFAULT_BACKGROUND_THREADS,
            link_metadata=_metadata(given),
            extra=_extra(given),
        )


def check_is_options(name: str, options: object) -> None:
    """Raise for what is no dict of options: ``AttributeError`` for None, else ``TypeError``."""
    how = "give config.generate_options(), where config is an LLMConfig"
    if options is None:
        raise AttributeError(f"{name} is None, only support dict: {how}")
    if isinstance(options, dict):
        return
    if callable(options):
        how = "call it, generate_options() returns the dict"
    kind = type(options).__name__
    raise TypeError(f"{name} is a {kind} ({short_repr(options)}), only support dict: {how}")


def _completed(options: dict[str, str], role: LLMRole) -> dict[str, str]:
    """A copy with what some options mean for others; all of it text."""
    check_is_options("options", options)
    _check_flow_graph_size(options)
    given = dict(options)
    if role is None:
        raise KeyError("role is None: construct LLMDataDist with a member of LLMRole")
    _apply_local_comm_res(given)
    _apply_transfer_backend(given)
    _apply_listen_info(given)
    _require_cache_manager(given)
    for key, value in given.items():
        checks.check_isinstance(f"the option key {short_repr(key)}", key, str, allow_none=False)
        if not isinstance(value, str):
            raise TypeError(not_text(key, value))
    return given


def _check_flow_graph_size(options: dict[str, str]) -> None:
    key = "ge.flowGraphMemMaxSize"
    size = options.get(key)
    if size is None:
        return
    checks.check_isinstance(f"option {key}", size, str)
    if not is_digits(size):
        raise wrong(key, size, expected="one number")


def _apply_local_comm_res(given: dict[str, str]) -> None:
    if "llm.LocalCommRes" not in given:
        return
    given.setdefault("llm.EnableCacheManager", "1")
    given.setdefault("llm.EnableRemoteCacheAccessible", "1")
    _require(given, "llm.EnableCacheManager", "llm.LocalCommRes (LLMConfig.local_comm_res)")


def _require(given: dict[str, str], key: str, what: str) -> None:
    """Raise LLM_PARAM_INVALID unless the option that ``what`` needs is on."""
    value = given.get(key)
    if value != "1":
        state = "not set" if value is None else short_repr(value)
        raise param_invalid(f'{what} needs option {key} to be "1", it is {state}{where(key)}')


def _apply_transfer_backend(given: dict[str, str]) -> None:
    """Conditions of the value "hixl"; the name of a transport has none."""
    backend = given.get("llm.TransferBackend")
    if backend == "":
        raise wrong("llm.TransferBackend", backend, "it is empty")
    if backend != "hixl":
        return
    what = 'transfer_backend "hixl"'
    _require(given, "llm.EnableCacheManager", what)
    given.setdefault("llm.EnableRemoteCacheAccessible", "1")
    _require(given, "llm.EnableRemoteCacheAccessible", what)
    if "llm.listenIpInfo" not in given:
        raise param_invalid(f"{what} needs llm.listenIpInfo (LLMConfig.listen_ip_info)")


def _apply_listen_info(given: dict[str, str]) -> None:
    """Split llm.listenIpInfo into llm.ListenIp and llm.ListenPort, which may be given as well."""
    info = given.get("llm.listenIpInfo")
    if info is None or given.get("llm.EnableCacheManager") != "1":
        return
    given["llm.ListenIp"], given["llm.ListenPort"] = _split_listen_info(info)


def parse_listen_info(options: dict[str, str]) -> tuple[str, int] | None:
    """Address and port of ``llm.listenIpInfo`` in options of `switch_role`; None without it.

    Raises ``TypeError``, ``ValueError`` for a port that is no number, LLM_PARAM_INVALID.
    """
    check_keys(options)
    info = options.get("llm.listenIpInfo")
    if info is None:
        return None
    ip, port = _split_listen_info(info)
    parts = {"llm.ListenIp": ip, "llm.ListenPort": port}
    checked_ip, checked_port = _listen_ip(parts), _listen_port(parts)
    assert checked_ip is not None
    assert checked_port is not None
    return checked_ip, checked_port


def _split_listen_info(info: str) -> tuple[str, str]:
    """Address and port as text, of which the port is a number; neither is checked further."""
    key = "llm.listenIpInfo"
    if not isinstance(info, str):
        raise TypeError(not_text(key, info))
    if info.count(":") != 1:
        raise wrong(key, info)
    ip, port = info.split(":")
    if not is_digits(port.removeprefix("-")):  # a negative one is a number, but none of a port
        raise ValueError(
            f"option {key} is {short_repr(info)}: the port {short_repr(port)} is not a number{where(key)}"
        )
    return ip, port


def _listen_ip(given: dict[str, str]) -> str | None:
    """The address to listen on; None where no port is given."""
    if "llm.ListenPort" not in given:
        return None
    ip = given.get("llm.ListenIp", "")
    try:
        return str(parse_ipv4(ip))
    except ValueError as error:
        pass_on(error)
        raise param_invalid(
            "the listen address (option llm.listenIpInfo, LLMConfig.listen_ip_info; or llm.ListenIp) "
            f"is {short_repr(ip)}, expected an IPv4 address such as 10.0.0.1"
        ) from None


def _listen_port(given: dict[str, str]) -> int | None:
    return _number(given, "llm.ListenPort", 0, 65535)


def _require_cache_manager(given: dict[str, str]) -> None:
    if given.get("llm.EnableCacheManager") == "1":
        return
    raise ModuleNotFoundError(
        f"cache-manager mode is off: {_why_off(given)}. Set enable_cache_manager = True of an "
        "LLMConfig and give its generate_options(), or set the option llm.EnableCacheManager to the "
        'text "1". Without it upstream uses the separate package llm_datadist_v1, which does not exist '
        "here",
        name="llm_datadist_v1",
    )


def _why_off(given: dict[str, str]) -> str:
    key = "llm.EnableCacheManager"
    if key in given:
        return f'option {key} is {short_repr(given[key])}, not the text "1"'
    for each in given:
        if isinstance(each, str) and meant_by(each) == key:
            return f"there is no option {short_repr(each)}, {key} is meant"
    return f"option {key} is not given" if given else "the options are empty"


def _flag(given: dict[str, str], key: str) -> bool:
    value = given.get(key, "0")
    if value not in ("0", "1"):
        raise wrong(key, value)
    return value == "1"


def _metadata(given: dict[str, str]) -> bytes:
    key = "datadist.link_metadata"
    text = given.get(key, "")
    try:
        metadata = base64.b64decode(text, validate=True)
    except ValueError as error:
        pass_on(error)
        raise wrong(key, text) from None
    if len(metadata) > MAX_METADATA:
        raise wrong(key, text, f"it has {len(metadata)} bytes")
    return metadata


def _device_id(given: dict[str, str]) -> int:
    value = given.get("ge.exec.deviceId", "0")
    if ";" in value:
        raise wrong("ge.exec.deviceId", value, "only one device is possible")
    return _number(given, "ge.exec.deviceId", 0, 2**31 - 1) or 0


def _number(given: dict[str, str], key: str, low: int, high: int) -> int | None:
    value = given.get(key)
    if value is None:
        return None
    number = parse_digits(value)
    if number is None or not low <= number <= high:
        raise wrong(key, value)
    return number


def _link_time(given: dict[str, str], environ: Mapping[str, str]) -> float:
    """Seconds: the option unless it is 0, else HCCL_CONNECT_TIMEOUT, else 120."""
    chosen = _number(given, "llm.LinkTotalTime", 0, 2**31 - 1)
    if chosen:
        return float(chosen)
    text = environ.get("HCCL_CONNECT_TIMEOUT")
    if text is None:
        return DEFAULT_LINK_SECONDS
    low, high = CONNECT_RANGE
    seconds = parse_digits(text)
    if seconds is None or not low <= seconds <= high:
        log.warning(
            "HCCL_CONNECT_TIMEOUT is %r, it must be a number in [%d, %d]: using %s",
            text, low, high, in_seconds(DEFAULT_LINK_SECONDS),
        )  # fmt: skip
        return DEFAULT_LINK_SECONDS
    return float(seconds)


def _job(environ: Mapping[str, str]) -> str:
    try:
        return job_name(environ)
    except ValueError as error:
        raise param_invalid(str(error)) from None


def _rendezvous(environ: Mapping[str, str]) -> HostPort | None:
    text = environ.get("DATADIST_RENDEZVOUS", "")
    try:
        return HostPort.parse(text) if text else None
    except ValueError as error:
        raise param_invalid(f"DATADIST_RENDEZVOUS is {error}") from None


def _peer_timeout(environ: Mapping[str, str]) -> float:
    text = environ.get("DATADIST_PEER_TIMEOUT", "")
    if not text:
        return DEFAULT_PEER_SECONDS
    low, high = PEER_RANGE
    seconds = parse_digits(text)
    if seconds is None or not low <= seconds <= high:
        raise param_invalid(
            f"DATADIST_PEER_TIMEOUT is {short_repr(text)}, "
            f"it must be a number of seconds in [{low}, {high}]"
        )
    return float(seconds)


def _extra(given: dict[str, str]) -> dict[str, dict[str, str]]:
    extra: dict[str, dict[str, str]] = {}
    for key, value in given.items():
        parts = key.split(".", 2)
        if len(parts) == 3 and parts[0] == "datadist":
            extra.setdefault(parts[1], {})[parts[2]] = value
    return extra
