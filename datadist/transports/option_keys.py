"""The keys of `init`'s options: their values, their names in other languages, and unknown keys."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from datadist.base.texts import nearest, short_repr, suggestion
from datadist.status import LLMException, param_invalid
from datadist.transports.loader import KNOWN as TRANSPORTS
from datadist.transports.loader import list_backends

__all__ = ["DOCUMENTED", "Option", "check_keys", "meant_by", "not_text", "where", "wrong"]

log = logging.getLogger("datadist.options")


@dataclass(frozen=True)
class Option:
    """What an option takes, and the property of LLMConfig that writes it, if there is one."""

    expected: str = "text"
    attribute: str | None = None


_POOL = 'JSON such as {"memory_size": 1073741824}, in bytes, or no such option for no pool'
DOCUMENTED = {
    "ge.exec.deviceId": Option('the number of one device, such as "0"', "device_id"),
    "llm.BufPoolCfg": Option(attribute="buf_pool_cfg"),
    "llm.ClusterInfo": Option(attribute="cluster_info"),
    "llm.EnableCacheManager": Option('"1"', "enable_cache_manager"),
    "llm.EnableRemoteCacheAccessible": Option('"0" or "1"', "enable_remote_cache_accessible"),
    "llm.EnableSwitchRole": Option('"0" or "1"', "enable_switch_role"),
    "llm.GlobalResourceConfig": Option(attribute="global_resource_config"),
    "llm.HostMemPoolConfig": Option(_POOL, "host_mem_pool_cfg"),
    "llm.LinkRetryCount": Option("a number in [1, 100]", "link_retry_count"),
    "llm.LinkTotalTime": Option(f"a number of seconds in [0, {2**31 - 1}]", "link_total_time"),
    "llm.ListenIp": Option("an IPv4 address such as 10.0.0.1"),
    "llm.ListenPort": Option("a number in [0, 65535]"),
    "llm.LocalCommRes": Option('JSON, or ""', "local_comm_res"),
    "llm.MemPoolConfig": Option(_POOL, "mem_pool_cfg"),
    "llm.MemoryUtilization": Option(attribute="mem_utilization"),
    "llm.OutputMaxSize": Option(attribute="output_max_size"),
    "llm.RdmaServiceLevel": Option(f"a number in [0, {2**32 - 1}]", "rdma_service_level"),
    "llm.RdmaTrafficClass": Option(f"a number in [0, {2**32 - 1}]", "rdma_traffic_class"),
    "llm.Role": Option(),
    "llm.SyncKvCacheWaitTime": Option(
        f"a number of milliseconds in [1, {2**31 - 1}]", "sync_kv_timeout"
    ),
    "llm.TransferBackend": Option('the name of a transport, or "auto"', "transfer_backend"),
    "llm.deployResPath": Option(attribute="deploy_res_path"),
    "llm.listenIpInfo": Option("IPv4:port such as 10.0.0.1:26000", "listen_ip_info"),
    "datadist.background_threads": Option("a number in [2, 64]"),
    "datadist.check_types": Option('"0" or "1"'),
    "datadist.checksum": Option('"0" or "1"'),
    "datadist.link_metadata": Option("base64 of at most 8192 bytes", "link_metadata"),
}
"""Documented options (LLM-DataDist API, initialisation options), including those without effect here."""

_OTHER_NAMES = {"llm.deviceid": "ge.exec.deviceId"}
"""Names of options in upstream's other languages, in small letters."""


def where(key: str) -> str:
    """`` (LLMConfig.device_id)``: the property that writes an option; empty if there is none."""
    attribute = DOCUMENTED.get(key, Option()).attribute
    return f" (LLMConfig.{attribute})" if attribute else ""


def wrong(key: str, value: str, problem: str = "", expected: str = "") -> LLMException:
    """LLM_PARAM_INVALID for the value of an option; ``problem`` says what is wrong with it."""
    what = f": {problem}; expected" if problem else ", it must be"
    expected = expected or DOCUMENTED[key].expected
    return param_invalid(f"option {key} is {short_repr(value)}{what} {expected}{where(key)}")


def not_text(key: str, value: object) -> str:
    """The error text for a value that is not text."""
    expected = DOCUMENTED.get(key, Option()).expected
    return (
        f"option {key} is a {type(value).__name__} ({short_repr(value)}), only support str: "
        f"give {'' if expected == 'text' else 'text, '}{expected}{where(key)}"
    )


def meant_by(key: str) -> str | None:
    """The documented option that a key probably means; None if none is similar."""
    if _plain(key) in _OTHER_NAMES:
        return _OTHER_NAMES[_plain(key)]
    prefix, _, name = key.rpartition(".")
    if name and prefix.lower() in ("", "llm", "llmconfig"):
        for each, option in DOCUMENTED.items():
            if _plain(name) in (_plain(each.rpartition(".")[2]), _plain(option.attribute or "")):
                return each
    if prefix == "llm":
        return nearest(key, DOCUMENTED, cutoff=0.8)
    return "ge.exec.deviceId" if _plain(key) == "ge.exec.deviceid" else None


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def check_keys(keys: Iterable[object]) -> None:
    """Warn of unknown keys of the API, and refuse unknown keys of this project.

    A newer version of the API may have the ``llm.`` key, so it is only a warning. Keys with other
    prefixes are ignored.

    Raises LLM_PARAM_INVALID for a key of ``datadist.``.
    """
    for key in keys:
        if not isinstance(key, str) or key in DOCUMENTED or key.startswith("llm.RefInput"):
            continue
        if key.startswith("datadist."):
            _check_own(key)
            continue
        meant = meant_by(key)
        if meant or key.startswith("llm."):
            hint = f"; did you mean {meant}?" if meant else ""
            log.warning("there is no option %s, it has no effect%s", short_repr(key), hint)


def _check_own(key: str) -> None:
    own = [each for each in DOCUMENTED if each.startswith("datadist.")]
    _, backend, *name = key.split(".", 2)
    if name and backend in TRANSPORTS:
        return
    backends = sorted({*TRANSPORTS, *(each.name for each in list_backends())})
    if name and backend in backends:
        return
    options = [f"datadist.{each}.{name[0]}" for each in backends] if name else own
    hint = suggestion(key, options, 0.8)
    raise param_invalid(
        f"there is no option {short_repr(key)}{hint or ':'} There are {', '.join(own)}, and "
        f"datadist.<backend>.<name> for the backends {', '.join(backends)}"
    )
