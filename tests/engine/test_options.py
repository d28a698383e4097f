"""The options of init: typed values, and the documented order and kind of every refusal."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datadist.api.config import _EMITTERS, LLMConfig, _Emit
from datadist.engine.options import EngineOptions
from datadist.status import LLMException, LLMStatusCode
from datadist.transports.option_keys import DOCUMENTED
from datadist.types import LLMRole

ON = {"llm.EnableCacheManager": "1"}


def parse(options: Any, environ: dict[str, str] | None = None) -> EngineOptions:
    return EngineOptions.parse(options, LLMRole.MIX, environ or {})


def parse_on(key: str, value: str, environ: dict[str, str] | None = None) -> EngineOptions:
    """Parse one option beside cache-manager mode."""
    return parse({**ON, key: value}, environ)


def refused(options: dict[str, Any]) -> str:
    """The text of the LLM_PARAM_INVALID that options give."""
    with pytest.raises(LLMException) as caught:
        parse(options)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    return str(caught.value)


# -- what is understood --------------------------------------------------------------------------


def test_defaults() -> None:
    assert parse(ON) == EngineOptions()
    options = parse(ON)
    assert (options.device_id, options.device_pool, options.host_pool) == (0, None, None)
    assert (options.remote_accessible, options.backend, options.hixl) == (False, None, False)
    assert (options.sync_timeout, options.link_total_time, options.link_retry_count) == (1, 120, 1)
    assert (options.listen_ip, options.listen_port) == (None, None)


def test_unknown_options_are_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    config = LLMConfig()
    config.enable_cache_manager = True
    known = {
        "llm.Role": "Mix", "llm.RefInputFoo": "1", "other.thing": "1", "datadist.shm.threads": "1",
        "datadist.checksum": "0", "datadist.check_types": "0",
    }  # fmt: skip
    parse({**config.generate_options(), **known})
    assert not caplog.records
    wrong = {"llm.Nope": "1", "llm.ListenIpInfo": "x"}
    assert parse({**ON, **wrong}) == EngineOptions()
    assert [record.getMessage() for record in caplog.records] == [
        "there is no option 'llm.Nope', it has no effect",
        "there is no option 'llm.ListenIpInfo', it has no effect; did you mean llm.listenIpInfo?",
    ]


def test_every_property_of_the_configuration_is_known() -> None:
    emitted = {emitter._key for emitter in _EMITTERS.values() if isinstance(emitter, _Emit)}
    assert emitted <= set(DOCUMENTED)


def test_the_documented_example_is_understood() -> None:
    options = {
        "ge.exec.deviceId": "0",
        "llm.MemPoolConfig": '{"memory_size": 1073741824}',
    }
    config = LLMConfig()
    config.enable_cache_manager = True
    options.update(config.generate_options())
    before = dict(options)
    parsed = parse(options)
    assert options == before
    assert parsed.device_pool is not None
    assert parsed.device_pool.memory_size == 1 << 30
    assert parsed.device_pool.page_size == 65536
    assert parsed.host_pool is None


def test_every_option_arrives_typed() -> None:
    config = LLMConfig()
    config.device_id = 7
    config.sync_kv_timeout = "1500"
    config.listen_ip_info = "10.0.0.1:26000"
    config.enable_cache_manager = True
    config.enable_remote_cache_accessible = True
    config.host_mem_pool_cfg = '{"memory_size": 4096, "page_shift": 10, "other": 1}'
    config.rdma_traffic_class = 132
    config.rdma_service_level = 4
    config.transfer_backend = "shm"
    config.link_total_time = 1080
    config.link_retry_count = 80
    parsed = parse(config.generate_options(), {"DATADIST_AUTH_KEY": "secret"})
    assert parsed.device_id == 7
    assert parsed.sync_timeout == 1.5
    assert (parsed.listen_ip, parsed.listen_port) == ("10.0.0.1", 26000)
    assert parsed.remote_accessible
    assert parsed.host_pool is not None
    assert (parsed.host_pool.memory_size, parsed.host_pool.page_size) == (4096, 1024)
    assert (parsed.traffic_class, parsed.service_level) == (132, 4)
    assert (parsed.backend, parsed.hixl) == ("shm", False)
    assert (parsed.link_total_time, parsed.link_retry_count) == (1080, 80)
    assert parsed.auth_key == b"secret"
    assert "secret" not in repr(parsed)


def test_free_options_are_sorted_by_backend() -> None:
    given = {
        **ON,
        "datadist.shm.populate": "0",
        "datadist.shm.a.b": "1",
        "datadist.rdma.x": "2",
        "unknown": "",
    }
    assert parse(given).extra == {"shm": {"populate": "0", "a.b": "1"}, "rdma": {"x": "2"}}


def test_options_of_the_first_version_are_ignored() -> None:
    config = LLMConfig()
    config.enable_cache_manager = True
    config.enable_switch_role = True
    config.output_max_size = 1
    config.buf_pool_cfg = "x"
    config.deploy_res_path = "y"
    assert parse(config.generate_options()) == EngineOptions()


def test_local_comm_res_switches_both_modes_on_even_when_empty() -> None:
    parsed = parse({"llm.LocalCommRes": ""})
    assert parsed.remote_accessible
    assert parsed.local_comm_res == ""
    assert not parse(
        {"llm.LocalCommRes": "", "llm.EnableRemoteCacheAccessible": "0"}
    ).remote_accessible
    assert "EnableCacheManager" in refused({"llm.LocalCommRes": "", "llm.EnableCacheManager": "0"})


def test_listening_may_also_be_given_in_parts() -> None:
    parsed = parse({**ON, "llm.ListenIp": "127.0.0.1", "llm.ListenPort": "26000"})
    assert (parsed.listen_ip, parsed.listen_port) == ("127.0.0.1", 26000)
    assert parse_on("llm.ListenIp", "127.0.0.1").listen_port is None
    assert "llm.ListenIp" in refused({**ON, "llm.ListenPort": "26000"})
    assert parse_on("llm.listenIpInfo", "127.0.0.1:0").listen_port == 0


# -- backends ------------------------------------------------------------------------------------


def test_the_name_of_a_transport_has_no_conditions() -> None:
    parsed = parse_on("llm.TransferBackend", "auto")
    assert (parsed.backend, parsed.hixl, parsed.remote_accessible) == ("auto", False, False)


def test_hixl_has_conditions_in_order_and_selects_as_auto() -> None:
    given = {"llm.TransferBackend": "hixl"}
    assert "EnableCacheManager" in refused(given)
    given |= ON
    off = {"llm.EnableRemoteCacheAccessible": "0"}
    assert "EnableRemoteCacheAccessible" in refused({**given, **off})
    assert "listenIpInfo" in refused(given)
    parsed = parse({**given, "llm.listenIpInfo": "127.0.0.1:26000"})
    assert (parsed.backend, parsed.hixl, parsed.remote_accessible) == ("auto", True, True)


def test_an_empty_backend_is_refused() -> None:
    assert "llm.TransferBackend" in refused({**ON, "llm.TransferBackend": ""})


# -- refusals ------------------------------------------------------------------------------------


def test_options_must_be_a_dict_of_text() -> None:
    with pytest.raises(TypeError, match="options is a list"):
        parse([])
    with pytest.raises(AttributeError, match="options is None"):
        parse(None)
    with pytest.raises(TypeError, match=r"option ge.exec.deviceId is a int"):
        parse({**ON, "ge.exec.deviceId": 0})
    with pytest.raises(TypeError, match="option x is a NoneType"):
        parse({**ON, "x": None})
    with pytest.raises(TypeError, match="option key 1"):
        parse({**ON, 1: "x"})
    with pytest.raises(TypeError, match=r"llm.ListenIp is a int"):
        parse({**ON, "llm.ListenIp": 1, "llm.ListenPort": "1"})


def test_a_role_of_none_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="LLMRole"):
        EngineOptions.parse(ON, None, {})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [None, "0", "true", ""])
def test_without_cache_manager_mode_a_module_is_missing(value: str | None) -> None:
    given = {} if value is None else {"llm.EnableCacheManager": value}
    with pytest.raises(ModuleNotFoundError, match="enable_cache_manager") as caught:
        parse(given)
    assert caught.value.name == "llm_datadist_v1"


@pytest.mark.parametrize("value", ["1,2", "x", "", "-1"])
def test_the_size_of_flow_graphs_must_be_digits(value: str) -> None:
    assert "ge.flowGraphMemMaxSize" in refused({"ge.flowGraphMemMaxSize": value})
    with pytest.raises(TypeError):
        parse({"ge.flowGraphMemMaxSize": 1})


@pytest.mark.parametrize("value", ["10.0.0.1", "::1:5", "1:2:3", ""])
def test_listen_info_needs_one_colon(value: str) -> None:
    assert "listenIpInfo" in refused({**ON, "llm.listenIpInfo": value})


def test_listen_info_needs_an_address_and_a_port() -> None:
    with pytest.raises(ValueError, match=r"listenIpInfo.*'x' is not a number"):
        parse_on("llm.listenIpInfo", "10.0.0.1:x")
    assert "IPv4" in refused({**ON, "llm.listenIpInfo": "localhost:1"})
    assert "[0, 65535]" in refused({**ON, "llm.listenIpInfo": "10.0.0.1:65536"})
    assert "[0, 65535]" in refused({**ON, "llm.listenIpInfo": "10.0.0.1:-1"})


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("llm.EnableRemoteCacheAccessible", ["", "2", "true"]),
        ("ge.exec.deviceId", ["", "0;1", "x", "-1", "2147483648", "True"]),
        ("llm.RdmaTrafficClass", ["x", "-1", "4294967296"]),
        ("llm.RdmaServiceLevel", ["x", "1.0"]),
        ("llm.LinkTotalTime", ["x", "-1", "2147483648", "9" * 5000]),
        ("llm.LinkRetryCount", ["0", "101", ""]),
        ("llm.SyncKvCacheWaitTime", ["0", "1s", "2147483648", "٣"]),
    ],
)
def test_a_wrong_number_names_its_option(key: str, values: list[str]) -> None:
    for value in values:
        assert key in refused({**ON, key: value})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "JSON"),
        ("{", "JSON"),
        ("[]", "object"),
        ("{}", "memory_size: Field required"),
        ('{"memory_size": 0}', "memory_size: Input should be greater than 0"),
        ('{"memory_size": -1}', "memory_size"),
        ('{"memory_size": 1.0}', "memory_size"),
        ('{"memory_size": "1"}', "memory_size"),
        ('{"memory_size": true}', "memory_size"),
        ('{"memory_size": 1, "page_shift": 9}', "page_shift"),
        ('{"memory_size": 1, "page_shift": 31}', "page_shift"),
        ('{"memory_size": 1, "page_shift": null}', "page_shift"),
        ('{"memory_size": 4398046510080, "page_shift": 10}', "too many pages"),
        ('{"memory_size": 1,}', "JSON"),
    ],
)
def test_a_wrong_pool_names_its_field(text: str, problem: str) -> None:
    for key in ("llm.MemPoolConfig", "llm.HostMemPoolConfig"):
        said = refused({**ON, key: text})
        assert key in said
        assert problem in said


def test_a_pool_of_the_most_pages_is_fine() -> None:
    size = ((1 << 32) - 1 << 10) - 1
    text = json.dumps({"memory_size": size, "page_shift": 10})
    pool = parse_on("llm.MemPoolConfig", text).device_pool
    assert pool is not None
    assert pool.memory_size == size


# Each is wrong by itself; of any two, the earlier one is reported.
ORDERED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"ge.flowGraphMemMaxSize": "x"}, LLMException, "flowGraphMemMaxSize"),
    ({"llm.TransferBackend": ""}, LLMException, "TransferBackend"),
    ({"llm.listenIpInfo": "x"}, LLMException, "listenIpInfo"),
    ({"y": 1}, TypeError, "option y"),
    ({"llm.EnableRemoteCacheAccessible": "2"}, LLMException, "EnableRemoteCacheAccessible"),
    ({"ge.exec.deviceId": "x"}, LLMException, "deviceId"),
    ({"llm.RdmaTrafficClass": "x"}, LLMException, "RdmaTrafficClass"),
    ({"llm.LinkTotalTime": "x"}, LLMException, "LinkTotalTime"),
    ({"llm.LinkRetryCount": "x"}, LLMException, "LinkRetryCount"),
    ({"llm.SyncKvCacheWaitTime": "x"}, LLMException, "SyncKvCacheWaitTime"),
    ({"llm.MemPoolConfig": "x"}, LLMException, "llm.MemPoolConfig"),
    ({"llm.HostMemPoolConfig": "x"}, LLMException, "llm.HostMemPoolConfig"),
]


@pytest.mark.parametrize("first", range(len(ORDERED)))
def test_the_first_problem_in_the_documented_order_is_reported(first: int) -> None:
    wrong, kind, text = ORDERED[first]
    given = dict(ON)
    for later, _, _ in ORDERED[first:]:
        given.update(later)
    assert given | wrong == given
    with pytest.raises(kind, match=text):
        parse(given)


# -- environment ---------------------------------------------------------------------------------


def test_the_connect_timeout_holds_where_no_total_time_is_given() -> None:
    environ = {"HCCL_CONNECT_TIMEOUT": "600"}
    assert parse(ON, environ).link_total_time == 600
    assert parse_on("llm.LinkTotalTime", "0", environ).link_total_time == 600
    assert parse_on("llm.LinkTotalTime", "5", environ).link_total_time == 5


@pytest.mark.parametrize("value", ["", "119", "7201", "x", "9" * 5000])
def test_a_wrong_connect_timeout_is_warned_of(value: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "datadist"):
        assert parse(ON, {"HCCL_CONNECT_TIMEOUT": value}).link_total_time == 120
    assert "HCCL_CONNECT_TIMEOUT" in caplog.text


def test_the_key_is_taken_byte_by_byte() -> None:
    assert parse(ON, {"DATADIST_AUTH_KEY": "\udcff"}).auth_key == b"\xff"
    assert parse(ON, {"DATADIST_AUTH_KEY": ""}).auth_key is None


@given(
    st.dictionaries(
        st.sampled_from(
            [
                "ge.exec.deviceId",
                "llm.listenIpInfo",
                "llm.LinkTotalTime",
                "llm.LinkRetryCount",
                "llm.MemPoolConfig",
                "llm.SyncKvCacheWaitTime",
                "llm.TransferBackend",
                "llm.ListenIp",
                "llm.ListenPort",
            ]
        ),
        st.text(max_size=12),
    )
)
def test_any_text_gives_options_or_a_documented_error(options: dict[str, str]) -> None:
    error = outcome({**ON, **options})
    if isinstance(error, LLMException):
        assert error.status_code is LLMStatusCode.LLM_PARAM_INVALID
    else:
        assert error is None or "port" in str(error)


def outcome(options: dict[str, str]) -> LLMException | ValueError | None:
    """What parsing raises."""
    try:
        parse(options)
    except (LLMException, ValueError) as error:
        return error
    return None
