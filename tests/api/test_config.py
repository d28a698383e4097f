"""The configuration class: what its properties accept, and the options they become."""

from __future__ import annotations

import json
from typing import Any

import pytest

from datadist.api.config import LLMConfig, LlmConfig
from datadist.status import LLMException, LLMStatusCode

ALWAYS = {"llm.MemoryUtilization": "0.95"}


def emitted(**values: object) -> dict[str, str]:
    """The options of a configuration with these properties, without what is always there."""
    config = LLMConfig()
    for name, value in values.items():
        setattr(config, name, value)
    options = config.generate_options()
    return {k: v for k, v in options.items() if (k, v) not in ALWAYS.items()}


def test_both_names_are_one_class() -> None:
    assert LlmConfig is LLMConfig


def test_the_options_are_one_dict_that_keys_are_only_added_to() -> None:
    config = LLMConfig()
    options = config.generate_options()
    assert options == ALWAYS
    config.listen_ip_info = "1.2.3.4:5"
    assert config.gen_options() is options
    assert config.options is options
    config.listen_ip_info = ""
    config.generate_options()
    assert options == {**ALWAYS, "llm.listenIpInfo": "1.2.3.4:5"}


def test_properties_have_the_documented_defaults() -> None:
    config = LLMConfig()
    for name in ("device_id", "sync_kv_timeout", "rdma_traffic_class", "rdma_service_level"):
        assert getattr(config, name) is None
    for name in (
        "listen_ip_info",
        "mem_pool_cfg",
        "host_mem_pool_cfg",
        "local_comm_res",
        "transfer_backend",
        "global_resource_config",
        "deploy_res_path",
        "buf_pool_cfg",
        "cluster_info",
    ):
        assert getattr(config, name) == ""
    assert config.enable_cache_manager is False
    assert config.enable_remote_cache_accessible is False
    assert config.enable_switch_role is False
    assert (config.link_total_time, config.link_retry_count) == (0, 1)
    assert (config.ge_options, config.output_max_size, config.mem_utilization) == ({}, None, 0.95)


@pytest.mark.parametrize(
    ("name", "value", "options"),
    [
        ("device_id", 3, {"ge.exec.deviceId": "3", "ge.session_device_id": "3"}),
        ("device_id", (4, 5), {"ge.exec.deviceId": "4;5", "ge.session_device_id": "4"}),
        ("sync_kv_timeout", 5000, {"llm.SyncKvCacheWaitTime": "5000"}),
        ("sync_kv_timeout", "3000", {"llm.SyncKvCacheWaitTime": "3000"}),
        ("ge_options", {"a": "b"}, {"a": "b"}),
        ("listen_ip_info", "1.2.3.4:5", {"llm.listenIpInfo": "1.2.3.4:5"}),
        ("listen_ip_info", None, {}),
        ("enable_cache_manager", True, {"llm.EnableCacheManager": "1"}),
        ("enable_cache_manager", False, {"llm.EnableCacheManager": "0"}),
        ("enable_remote_cache_accessible", True, {"llm.EnableRemoteCacheAccessible": "1"}),
        ("enable_remote_cache_accessible", False, {"llm.EnableRemoteCacheAccessible": "0"}),
        ("mem_pool_cfg", '{"memory_size": 1}', {"llm.MemPoolConfig": '{"memory_size": 1}'}),
        ("mem_pool_cfg", "", {}),
        ("host_mem_pool_cfg", "{}", {"llm.HostMemPoolConfig": "{}"}),
        ("rdma_traffic_class", 100, {"llm.RdmaTrafficClass": "100"}),
        ("rdma_service_level", 100, {"llm.RdmaServiceLevel": "100"}),
        ("local_comm_res", "", {"llm.LocalCommRes": ""}),
        ("local_comm_res", None, {}),
        ("transfer_backend", "shm", {"llm.TransferBackend": "shm"}),
        ("transfer_backend", "", {"llm.TransferBackend": ""}),
        ("global_resource_config", "", {"llm.GlobalResourceConfig": ""}),
        ("link_total_time", 0, {"llm.LinkTotalTime": "0"}),
        ("link_total_time", 2**32 - 1, {"llm.LinkTotalTime": "4294967295"}),
        ("link_retry_count", 80, {"llm.LinkRetryCount": "80"}),
        ("enable_switch_role", True, {"llm.EnableSwitchRole": "1"}),
        ("enable_switch_role", False, {}),
        ("deploy_res_path", "/a", {"llm.deployResPath": "/a"}),
        ("buf_pool_cfg", "x", {"llm.BufPoolCfg": "x"}),
        ("output_max_size", 0, {"llm.OutputMaxSize": "0"}),
        ("mem_utilization", 0.5, {"llm.MemoryUtilization": "0.5"}),
    ],
)
def test_a_property_becomes_options(name: str, value: object, options: dict[str, str]) -> None:
    assert emitted(**{name: value}) == options


TEXTS = (
    "listen_ip_info",
    "mem_pool_cfg",
    "host_mem_pool_cfg",
    "local_comm_res",
    "transfer_backend",
    "global_resource_config",
    "deploy_res_path",
    "buf_pool_cfg",
)
FLAGS = ("enable_cache_manager", "enable_remote_cache_accessible", "enable_switch_role")
WRONG: list[tuple[str, Any, type[Exception]]] = [
    *((name, 1, TypeError) for name in (*TEXTS, *FLAGS)),
    ("device_id", None, TypeError),
    ("device_id", "0", TypeError),
    ("device_id", [0, "1"], TypeError),
    ("device_id", -1, LLMException),
    ("device_id", [0, -1], LLMException),
    ("device_id", 2**31, ValueError),
    ("sync_kv_timeout", None, TypeError),
    ("sync_kv_timeout", 1.0, TypeError),
    ("sync_kv_timeout", "1s", LLMException),
    ("sync_kv_timeout", "", LLMException),
    ("sync_kv_timeout", "0", LLMException),
    ("sync_kv_timeout", -1, LLMException),
    ("sync_kv_timeout", 2**31, ValueError),
    ("ge_options", None, AttributeError),
    ("ge_options", [], TypeError),
    ("ge_options", {"a": 1}, TypeError),
    ("rdma_traffic_class", None, TypeError),
    ("rdma_traffic_class", 2**32, ValueError),
    ("rdma_service_level", -1, ValueError),
    ("link_total_time", None, TypeError),
    ("link_total_time", "1", TypeError),
    ("link_total_time", -1, LLMException),
    ("link_total_time", 2**32, LLMException),
    ("link_retry_count", 0, LLMException),
    ("link_retry_count", 101, LLMException),
    ("link_retry_count", None, TypeError),
    ("cluster_info", None, TypeError),
    ("cluster_info", "{", json.JSONDecodeError),
    ("cluster_info", '{"listen_ip_info": [{"ip": "x"}]}', RuntimeError),
    ("output_max_size", "1", TypeError),
    ("mem_utilization", 1, TypeError),
    ("mem_utilization", None, TypeError),
    ("mem_utilization", 1.1, LLMException),
]


@pytest.mark.parametrize(("name", "value", "kind"), WRONG)
def test_a_wrong_value_is_refused_and_the_old_one_kept(
    name: str, value: Any, kind: type[Exception]
) -> None:
    config = LLMConfig()
    before = getattr(config, name)
    with pytest.raises(kind) as caught:
        setattr(config, name, value)
    if isinstance(caught.value, LLMException):
        assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
        assert name in str(caught.value)
    assert getattr(config, name) == before


def test_ge_options_come_first_and_can_be_overwritten() -> None:
    assert emitted(ge_options={"ge.exec.deviceId": "9", "x": "y"}, device_id=1) == {
        "ge.exec.deviceId": "1",
        "ge.session_device_id": "1",
        "x": "y",
    }


def test_an_empty_list_of_devices_fails_when_options_are_generated() -> None:
    config = LLMConfig()
    config.device_id = []
    with pytest.raises(IndexError):
        config.generate_options()


def test_addresses_in_cluster_info_become_numbers() -> None:
    config = LLMConfig()
    config.cluster_info = '{"listen_ip_info": [{"ip": "1.2.3.4", "port": 5}, {"ip": 6}], "x": 1}'
    assert json.loads(config.generate_options()["llm.ClusterInfo"]) == {
        "listen_ip_info": [{"ip": 67305985, "port": 5}, {"ip": 6}],
        "x": 1,
    }
    config.cluster_info = '{"listen_ip_info": 3}'
    assert config.cluster_info == '{"listen_ip_info": 3}'


def test_the_repr_shows_what_was_set() -> None:
    config = LLMConfig()
    config.device_id = 1
    config.transfer_backend = "shm"
    assert repr(config) == "LLMConfig(device_id=1, transfer_backend='shm')"
