"""The documented configuration class, which turns properties into options for `init`."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

from datadist.base import checks
from datadist.base.digits import is_digits
from datadist.base.keywords import named_keywords
from datadist.base.names import CheckedAttributes
from datadist.status import param_invalid
from datadist.types import ipv4_number

__all__ = ["LLMConfig", "LlmConfig"]

MAX_METADATA = 8 << 10
"""Bytes that the peers of a link are given."""


@named_keywords
class LLMConfig(CheckedAttributes):
    """Options of an engine as properties; :meth:`generate_options` gives the dict for `init`.

    The dict is one object per configuration: keys are added and overwritten, never removed. All
    values are text. Setters raise ``TypeError``, ``ValueError``, and LLMException
    (LLM_PARAM_INVALID), as documented (LLM-DataDist API, LLMConfig).
    """

    def __init__(self) -> None:
        self._options: dict[str, str] = {}
        self._ge_options: dict[str, str] = {}
        self._set: dict[str, Any] = {}

    def generate_options(self) -> dict[str, str]:
        """The options: the same dict at every call."""
        self._options.update(self._ge_options)
        for name, emit in _EMITTERS.items():
            emit(self._options, self._set.get(name), name in self._set)
        return self._options

    def gen_options(self) -> dict[str, str]:
        """The same as :meth:`generate_options`."""
        return self.generate_options()

    @property
    def options(self) -> dict[str, str]:
        """The same as :meth:`generate_options`."""
        return self.generate_options()

    def _get(self, name: str, default: Any) -> Any:
        return self._set.get(name, default)

    @property
    def device_id(self) -> int | list[int] | tuple[int, ...] | None:
        """Logical device; a list is accepted, but `init` takes one id only."""
        return self._get("device_id", None)  # type: ignore[no-any-return]

    @device_id.setter
    def device_id(self, value: int | list[int] | tuple[int, ...]) -> None:
        checks.check_isinstance("device_id", value, (int, list, tuple), allow_none=False)
        ids = value if isinstance(value, (list, tuple)) else (value,)
        checks.check_sequence_of("device_id", ids, int)
        for each in ids:
            if each < 0:
                raise param_invalid(f"device_id is {each}, it must not be negative")
        for each in ids:
            checks.check_int32("device_id", each)
        self._set["device_id"] = value

    @property
    def sync_kv_timeout(self) -> int | str | None:
        """Milliseconds that a pull or push may take; default 1000."""
        return self._get("sync_kv_timeout", None)  # type: ignore[no-any-return]

    @sync_kv_timeout.setter
    def sync_kv_timeout(self, value: int | str) -> None:
        checks.check_isinstance("sync_kv_timeout", value, (int, str), allow_none=False)
        if isinstance(value, str) and not is_digits(value):
            raise param_invalid(f"sync_kv_timeout is {value!r}, it must be digits (milliseconds)")
        if int(value) <= 0:
            raise param_invalid(f"sync_kv_timeout is {value}, it must be positive (milliseconds)")
        checks.check_int32("sync_kv_timeout", int(value))
        self._set["sync_kv_timeout"] = value

    @property
    def ge_options(self) -> dict[str, str]:
        """Options that are merged as they are, before all others."""
        return self._ge_options

    @ge_options.setter
    def ge_options(self, value: dict[str, str]) -> None:
        checks.check_dict("ge_options", value, str, str)
        self._ge_options = value

    @property
    def listen_ip_info(self) -> str:
        """``IPv4:port`` on which this engine serves `link_clusters`."""
        return self._get("listen_ip_info", "") or ""

    @listen_ip_info.setter
    def listen_ip_info(self, value: str | None) -> None:
        checks.check_isinstance("listen_ip_info", value, str)
        self._set["listen_ip_info"] = value

    @property
    def enable_cache_manager(self) -> bool:
        """Cache-manager mode; it must be on, since there is no other mode."""
        return bool(self._get("enable_cache_manager", False))

    @enable_cache_manager.setter
    def enable_cache_manager(self, value: bool | None) -> None:
        checks.check_isinstance("enable_cache_manager", value, bool)
        self._set["enable_cache_manager"] = value

    @property
    def enable_remote_cache_accessible(self) -> bool:
        """One-sided mode: peers may push; must be equal at both ends of a link."""
        return bool(self._get("enable_remote_cache_accessible", False))

    @enable_remote_cache_accessible.setter
    def enable_remote_cache_accessible(self, value: bool | None) -> None:
        checks.check_isinstance("enable_remote_cache_accessible", value, bool)
        self._set["enable_remote_cache_accessible"] = value

    @property
    def mem_pool_cfg(self) -> str:
        """JSON of the device pool: ``{"memory_size": bytes, "page_shift": 16}``."""
        return self._get("mem_pool_cfg", "") or ""

    @mem_pool_cfg.setter
    def mem_pool_cfg(self, value: str | None) -> None:
        checks.check_json("mem_pool_cfg", value)
        self._set["mem_pool_cfg"] = value

    @property
    def host_mem_pool_cfg(self) -> str:
        """JSON of the host pool, as :attr:`mem_pool_cfg`."""
        return self._get("host_mem_pool_cfg", "") or ""

    @host_mem_pool_cfg.setter
    def host_mem_pool_cfg(self, value: str | None) -> None:
        checks.check_json("host_mem_pool_cfg", value)
        self._set["host_mem_pool_cfg"] = value

    @property
    def rdma_traffic_class(self) -> int | None:
        """RDMA traffic class."""
        return self._get("rdma_traffic_class", None)  # type: ignore[no-any-return]

    @rdma_traffic_class.setter
    def rdma_traffic_class(self, value: int) -> None:
        checks.check_uint32("rdma_traffic_class", value)
        self._set["rdma_traffic_class"] = value

    @property
    def rdma_service_level(self) -> int | None:
        """RDMA service level."""
        return self._get("rdma_service_level", None)  # type: ignore[no-any-return]

    @rdma_service_level.setter
    def rdma_service_level(self, value: int) -> None:
        checks.check_uint32("rdma_service_level", value)
        self._set["rdma_service_level"] = value

    @property
    def local_comm_res(self) -> str:
        """Communication resources as JSON; setting it, even to "", turns one-sided mode on."""
        return self._get("local_comm_res", "") or ""

    @local_comm_res.setter
    def local_comm_res(self, value: str | None) -> None:
        checks.check_json("local_comm_res", value)
        self._set["local_comm_res"] = value

    @property
    def transfer_backend(self) -> str:
        """Name of the transport as `datadist backends` lists it, its ``module:Class``, or "auto"."""
        return self._get("transfer_backend", "") or ""

    @transfer_backend.setter
    def transfer_backend(self, value: str | None) -> None:
        checks.check_isinstance("transfer_backend", value, str)
        self._set["transfer_backend"] = value

    @property
    def global_resource_config(self) -> str:
        """Passed through; no transport here uses it."""
        return self._get("global_resource_config", "") or ""

    @global_resource_config.setter
    def global_resource_config(self, value: str | None) -> None:
        checks.check_json("global_resource_config", value)
        self._set["global_resource_config"] = value

    @property
    def link_total_time(self) -> int:
        """Seconds that linking may take; 0 means HCCL_CONNECT_TIMEOUT, else 120."""
        return int(self._get("link_total_time", 0))

    @link_total_time.setter
    def link_total_time(self, value: int) -> None:
        checks.check_isinstance("link_total_time", value, int, allow_none=False)
        if not 0 <= value <= 2**32 - 1:
            raise param_invalid(f"link_total_time is {value}, it must be in [0, {2**32 - 1}] (s)")
        self._set["link_total_time"] = value

    @property
    def link_retry_count(self) -> int:
        """Attempts within :attr:`link_total_time`, of transports that retry."""
        return int(self._get("link_retry_count", 1))

    @link_retry_count.setter
    def link_retry_count(self, value: int) -> None:
        checks.check_isinstance("link_retry_count", value, int, allow_none=False)
        if not 1 <= value <= 100:
            raise param_invalid(f"link_retry_count is {value}, it must be in [1, 100]")
        self._set["link_retry_count"] = value

    @property
    def link_metadata(self) -> bytes:
        """What the peers of every link are given (an extension); at most 8192 bytes."""
        return self._get("link_metadata", b"") or b""

    @link_metadata.setter
    def link_metadata(self, value: bytes | None) -> None:
        checks.check_isinstance("link_metadata", value, bytes)
        if value is not None and len(value) > MAX_METADATA:
            raise param_invalid(
                f"link_metadata has {len(value)} bytes, at most {MAX_METADATA} are possible"
            )
        self._set["link_metadata"] = value

    @property
    def enable_switch_role(self) -> bool:
        """Without effect here: roles can always be switched."""
        return bool(self._get("enable_switch_role", False))

    @enable_switch_role.setter
    def enable_switch_role(self, value: bool | None) -> None:
        checks.check_isinstance("enable_switch_role", value, bool)
        self._set["enable_switch_role"] = value

    @property
    def deploy_res_path(self) -> str:
        """Of the first version of the API; ignored by `init`."""
        return self._get("deploy_res_path", "") or ""

    @deploy_res_path.setter
    def deploy_res_path(self, value: str | None) -> None:
        checks.check_isinstance("deploy_res_path", value, str)
        self._set["deploy_res_path"] = value

    @property
    def buf_pool_cfg(self) -> str:
        """Of the first version of the API; ignored by `init`."""
        return self._get("buf_pool_cfg", "") or ""

    @buf_pool_cfg.setter
    def buf_pool_cfg(self, value: str | None) -> None:
        checks.check_json("buf_pool_cfg", value)
        self._set["buf_pool_cfg"] = value

    @property
    def cluster_info(self) -> str:
        """Of the first version of the API; JSON text, ignored by `init`.

        Setting raises also ``json.JSONDecodeError``, and ``RuntimeError`` for an ``ip`` in its
        ``listen_ip_info`` that is no IPv4 address.
        """
        return self._get("cluster_info", "") or ""

    @cluster_info.setter
    def cluster_info(self, value: str) -> None:
        checks.check_json("cluster_info", value, allow_none=False)
        self._set["cluster_info"] = json.dumps(_with_numeric_ips(json.loads(value)))

    @property
    def output_max_size(self) -> int | None:
        """Of the first version of the API; ignored by `init`."""
        return self._get("output_max_size", None)  # type: ignore[no-any-return]

    @output_max_size.setter
    def output_max_size(self, value: int | None) -> None:
        checks.check_isinstance("output_max_size", value, int)
        self._set["output_max_size"] = value

    @property
    def mem_utilization(self) -> float:
        """Of the first version of the API; ignored by `init`."""
        return float(self._get("mem_utilization", 0.95))

    @mem_utilization.setter
    def mem_utilization(self, value: float) -> None:
        checks.check_isinstance("mem_utilization", value, float, allow_none=False)
        if not 0 <= value <= 1:
            raise param_invalid(f"mem_utilization is {value}, it must be in [0, 1]")
        self._set["mem_utilization"] = value

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self._set.items())
        return f"LLMConfig({shown})"


LlmConfig = LLMConfig


def _with_numeric_ips(info: Any) -> Any:
    """Dotted addresses in ``listen_ip_info`` become integers, first octet least significant."""
    listed = info.get("listen_ip_info") if isinstance(info, dict) else None
    for item in listed if isinstance(listed, list) else ():
        if isinstance(item, dict) and isinstance(item.get("ip"), str):
            item["ip"] = ipv4_number(item["ip"])
    return info


# -- how each property becomes options ---------------------------------------------------------


def _device(options: dict[str, str], value: Any, present: bool) -> None:
    if present:
        ids = value if isinstance(value, (list, tuple)) else (value,)
        options["ge.exec.deviceId"] = ";".join(str(each) for each in ids)
        options["ge.session_device_id"] = str(ids[0])


def _metadata(options: dict[str, str], value: Any, _present: bool) -> None:
    if value is not None:
        options["datadist.link_metadata"] = base64.b64encode(value).decode()


class _Emit:
    """Writes one property under ``key``; ``when`` is "set" (even if empty) or "truthy"."""

    def __init__(self, key: str, when: str = "set") -> None:
        self._key = key
        self._when = when

    def __call__(self, options: dict[str, str], value: Any, present: bool) -> None:
        if value is None or not present or (self._when == "truthy" and not value):
            return
        options[self._key] = str(int(value)) if isinstance(value, bool) else str(value)


def _utilization(options: dict[str, str], value: Any, _present: bool) -> None:
    options["llm.MemoryUtilization"] = str(0.95 if value is None else value)


_EMITTERS: dict[str, Callable[[dict[str, str], Any, bool], None]] = {
    "device_id": _device,
    "sync_kv_timeout": _Emit("llm.SyncKvCacheWaitTime"),
    "listen_ip_info": _Emit("llm.listenIpInfo", "truthy"),
    "enable_cache_manager": _Emit("llm.EnableCacheManager"),
    "enable_remote_cache_accessible": _Emit("llm.EnableRemoteCacheAccessible"),
    "mem_pool_cfg": _Emit("llm.MemPoolConfig", "truthy"),
    "host_mem_pool_cfg": _Emit("llm.HostMemPoolConfig", "truthy"),
    "rdma_traffic_class": _Emit("llm.RdmaTrafficClass"),
    "rdma_service_level": _Emit("llm.RdmaServiceLevel"),
    "local_comm_res": _Emit("llm.LocalCommRes"),
    "transfer_backend": _Emit("llm.TransferBackend"),
    "global_resource_config": _Emit("llm.GlobalResourceConfig"),
    "link_total_time": _Emit("llm.LinkTotalTime"),
    "link_retry_count": _Emit("llm.LinkRetryCount"),
    "link_metadata": _metadata,
    "enable_switch_role": _Emit("llm.EnableSwitchRole", "truthy"),
    "deploy_res_path": _Emit("llm.deployResPath", "truthy"),
    "buf_pool_cfg": _Emit("llm.BufPoolCfg", "truthy"),
    "cluster_info": _Emit("llm.ClusterInfo", "truthy"),
    "output_max_size": _Emit("llm.OutputMaxSize"),
    "mem_utilization": _utilization,
}
