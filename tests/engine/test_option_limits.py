"""The largest and the smallest value that each numeric option takes, and the first that it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from datadist_rdma.options import parse as parse_rdma
from datadist_shm import _native
from datadist_shm.options import Options as ShmOptions

from datadist.api.config import LLMConfig
from datadist.engine.options import EngineOptions, parse_listen_info
from datadist.status import LLMException, LLMStatusCode
from datadist.transport import OptionError, TransportOptions
from tests.engine.test_options import ON, parse, parse_on, refused

INT32, UINT32 = 2**31 - 1, 2**32 - 1
Value = Callable[[EngineOptions], Any]

# key, smallest, largest, what is kept of it
OPTIONS: list[tuple[str, int, int, Value]] = [
    ("ge.exec.deviceId", 0, INT32, lambda o: o.device_id),
    ("llm.RdmaTrafficClass", 0, UINT32, lambda o: o.traffic_class),
    ("llm.RdmaServiceLevel", 0, UINT32, lambda o: o.service_level),
    ("llm.LinkTotalTime", 1, INT32, lambda o: o.link_total_time),
    ("llm.LinkRetryCount", 1, 100, lambda o: o.link_retry_count),
    ("llm.SyncKvCacheWaitTime", 1, INT32, lambda o: round(o.sync_timeout * 1000)),
]


@pytest.mark.parametrize(("key", "low", "high", "value"), OPTIONS)
def test_numbers_of_init(key: str, low: int, high: int, value: Value) -> None:
    for number in (low, high):
        assert value(parse_on(key, str(number))) == number
    if key == "llm.LinkTotalTime":
        low = 0  # which means another limit
        assert parse_on(key, "0").link_total_time == 120
    for number in (low - 1, high + 1):
        text = refused({**ON, key: str(number)})
        assert f"option {key} is '{number}'" in text


def test_numbers_have_at_most_20_digits() -> None:
    assert parse_on("llm.LinkRetryCount", "100".zfill(20)).link_retry_count == 100
    assert "llm.LinkRetryCount" in refused({**ON, "llm.LinkRetryCount": "100".zfill(21)})


def test_ports_to_listen_on() -> None:
    for port in (0, 65535):
        info = f"127.0.0.1:{port}"
        assert parse_on("llm.listenIpInfo", info).listen_port == port
        assert parse_listen_info({"llm.listenIpInfo": info}) == ("127.0.0.1", port)
        given = {**ON, "llm.ListenIp": "127.0.0.1", "llm.ListenPort": str(port)}
        assert parse(given).listen_port == port
    for port in (-1, 65536):
        wrong = {"llm.listenIpInfo": f"127.0.0.1:{port}"}
        parts = {"llm.ListenIp": "127.0.0.1", "llm.ListenPort": str(port)}
        for given in (wrong, parts):
            assert "llm.ListenPort" in refused({**ON, **given})
        with pytest.raises(LLMException, match=r"\[0, 65535\]"):
            parse_listen_info(wrong)


@pytest.mark.parametrize("key", ["llm.MemPoolConfig", "llm.HostMemPoolConfig"])
@pytest.mark.parametrize("shift", [10, 30])
def test_pools(key: str, shift: int) -> None:
    most = (UINT32 << shift) - 1  # the last page would be one too many
    for size in (1, most):
        parsed = parse_on(key, json.dumps({"memory_size": size, "page_shift": shift}))
        pool = parsed.device_pool or parsed.host_pool
        assert pool is not None
        assert (pool.memory_size, pool.page_size) == (size, 1 << shift)
    for size in (0, most + 1):
        assert key in refused({**ON, key: json.dumps({"memory_size": size, "page_shift": shift})})
    beyond = 9 if shift == 10 else 31
    text = refused({**ON, key: json.dumps({"memory_size": 1, "page_shift": beyond})})
    assert "page_shift" in text


def test_seconds_of_the_environment(caplog: pytest.LogCaptureFixture) -> None:
    for seconds in (120, 7200):
        assert parse(ON, {"HCCL_CONNECT_TIMEOUT": str(seconds)}).link_total_time == seconds
    assert not caplog.records
    for seconds in (2, 600):
        assert parse(ON, {"DATADIST_PEER_TIMEOUT": str(seconds)}).peer_timeout == seconds
    for text in ("1", "601", "2.5", "-2", "x"):
        with pytest.raises(LLMException, match=r"DATADIST_PEER_TIMEOUT is .*\[2, 600\]") as caught:
            parse(ON, {"DATADIST_PEER_TIMEOUT": text})
        assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert parse(ON, {"DATADIST_PEER_TIMEOUT": ""}).peer_timeout == 10


def test_ports_of_the_environment() -> None:
    for port in (1, 65535):
        place = parse(ON, {"DATADIST_RENDEZVOUS": f"host:{port}"}).rendezvous
        assert place is not None
        assert place.port == port
    for port in (0, 65536):
        with pytest.raises(LLMException, match=r"DATADIST_RENDEZVOUS is .*\[1, 65535\]"):
            parse(ON, {"DATADIST_RENDEZVOUS": f"host:{port}"})


PROPERTIES: list[tuple[str, Any, Any, Any, Any]] = [
    ("device_id", 0, INT32, -1, INT32 + 1),
    ("sync_kv_timeout", 1, INT32, 0, INT32 + 1),
    ("rdma_traffic_class", 0, UINT32, -1, UINT32 + 1),
    ("rdma_service_level", 0, UINT32, -1, UINT32 + 1),
    ("link_total_time", 0, UINT32, -1, UINT32 + 1),
    ("link_retry_count", 1, 100, 0, 101),
    ("mem_utilization", 0.0, 1.0, -0.1, 1.1),
]


@pytest.mark.parametrize(("name", "low", "high", "below", "above"), PROPERTIES)
def test_numbers_of_the_configuration(
    name: str, low: Any, high: Any, below: Any, above: Any
) -> None:
    config = LLMConfig()
    for value in (low, high):
        setattr(config, name, value)
        assert getattr(config, name) == value
    for value in (below, above):
        with pytest.raises((LLMException, ValueError)):
            setattr(config, name, value)
        assert getattr(config, name) == high


# -- of transports -----------------------------------------------------------------------------

RDMA: list[tuple[str, int, int, Callable[[Any], Any]]] = [
    ("port", 1, 255, lambda o: o.gid_filter.port),
    ("gid_index", 0, 255, lambda o: o.gid_filter.gid_index),
    ("timeout", 1, 31, lambda o: o.timeout),
    ("retry_count", 0, 7, lambda o: o.retry_count),
    ("queue_pairs", 1, 64, lambda o: o.queue_pairs),
]


@pytest.mark.parametrize(("name", "low", "high", "value"), RDMA)
def test_numbers_of_rdma(name: str, low: int, high: int, value: Callable[[Any], Any]) -> None:
    for number in (low, high):
        given = TransportOptions(extra={name: str(number)})
        assert value(parse_rdma(given, {})) == number
    for number in (low - 1, high + 1):
        with pytest.raises(OptionError, match=rf"datadist\.rdma\.{name} is '{number}'"):
            parse_rdma(TransportOptions(extra={name: str(number)}), {})


def test_marks_of_rdma() -> None:
    most = parse_rdma(TransportOptions(traffic_class=255, service_level=7), {})
    assert (most.traffic_class, most.service_level) == (255, 7)
    most = parse_rdma(TransportOptions(), {"HCCL_RDMA_TC": "255", "HCCL_RDMA_SL": "7"})
    assert (most.traffic_class, most.service_level) == (255, 7)
    for given in (TransportOptions(traffic_class=256), TransportOptions(service_level=8)):
        with pytest.raises(OptionError, match=r"llm\.Rdma"):
            parse_rdma(given, {})
    for name, value in (("HCCL_RDMA_TC", "256"), ("HCCL_RDMA_SL", "8")):
        with pytest.raises(OptionError, match=f"{name} is '{value}'"):
            parse_rdma(TransportOptions(), {name: value})


def test_threads_of_shm() -> None:
    most = _native.MAX_THREADS
    assert ShmOptions.parse({"threads": "1"}).threads == 1
    assert 1 <= ShmOptions.parse({"threads": str(most)}).threads <= most
    for number in (0, most + 1):
        with pytest.raises(OptionError, match=rf"threads is '{number}'.*\[1, {most}\]"):
            ShmOptions.parse({"threads": str(number)})
