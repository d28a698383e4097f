"""What users read of wrong options: the key, the property, the value and what is expected."""

from __future__ import annotations

from typing import Any

import pytest

from datadist import LLMConfig, LLMDataDist, LLMException, LLMRole, LLMStatusCode
from datadist.engine.options import EngineOptions, parse_listen_info
from datadist.transports.option_keys import DOCUMENTED
from tests.engine.test_options import ON, parse, refused


def said(kind: type[Exception], options: Any) -> str:
    with pytest.raises(kind) as caught:
        parse(options)
    return str(caught.value)


def test_documented_options_name_properties_that_exist() -> None:
    for option in DOCUMENTED.values():
        assert option.attribute is None or hasattr(LLMConfig, option.attribute)


@pytest.mark.parametrize("key", [key for key in DOCUMENTED if key != "llm.EnableCacheManager"])
@pytest.mark.parametrize("value", [None, 7, True, b"1", {"a": 1}])
def test_every_value_that_is_no_text_is_shown_with_what_is_expected(key: str, value: Any) -> None:
    text = said(TypeError, {**ON, key: value} if value is not None else {**ON, key: 0.5})
    option = DOCUMENTED[key]
    assert text.startswith(f"option {key} is a ")
    assert option.expected in text
    assert option.attribute is None or f"LLMConfig.{option.attribute}" in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llm.EnableRemoteCacheAccessible", "true"),
        ("ge.exec.deviceId", "npu:0"),
        ("llm.RdmaTrafficClass", "x"),
        ("llm.RdmaServiceLevel", "-1"),
        ("llm.LinkTotalTime", "60s"),
        ("llm.LinkRetryCount", "1000"),
        ("llm.SyncKvCacheWaitTime", "1.5"),
        ("llm.MemPoolConfig", "1GB"),
        ("llm.HostMemPoolConfig", "x" * 5000),
        ("llm.TransferBackend", ""),
        ("llm.listenIpInfo", "here"),
    ],
)
def test_every_wrong_text_is_shown_with_what_is_expected(key: str, value: str) -> None:
    text = refused({**ON, key: value})
    option = DOCUMENTED[key]
    assert text.startswith(f"option {key} is {value[:50]!r}"[:60])
    assert option.expected in text
    assert f"(LLMConfig.{option.attribute})" in text
    assert len(text) < 700


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "the options are empty"),
        ({"llm.SyncKvCacheWaitTime": "1"}, "option llm.EnableCacheManager is not given"),
        (
            {"llm.EnableCacheManager": True},
            'option llm.EnableCacheManager is True, not the text "1"',
        ),
        ({"llm.EnableCacheManager": 1}, 'is 1, not the text "1"'),
        ({"llm.EnableCacheManager": "true"}, "is 'true', not the text"),
        (
            {"llm.enableCacheManager": "1"},
            "no option 'llm.enableCacheManager', llm.EnableCacheManager",
        ),
        ({"enable_cache_manager": "1"}, "no option 'enable_cache_manager', llm.EnableCacheManager"),
    ],
)
def test_why_cache_manager_mode_is_off(options: dict[str, Any], why: str) -> None:
    text = said(ModuleNotFoundError, options)
    assert text.startswith("cache-manager mode is off: ")
    assert why in text
    assert "generate_options()" in text


def test_what_are_no_options_says_what_are() -> None:
    config = LLMConfig()
    assert "config.generate_options()" in said(AttributeError, None)
    for wrong in (config, "x", [("a", "b")]):
        assert "config.generate_options()" in said(TypeError, wrong)
    assert "call it" in said(TypeError, config.generate_options)


def test_init_says_so_too() -> None:
    engine = LLMDataDist(LLMRole.MIX, 1)
    with pytest.raises(TypeError, match=r"options is a LLMConfig .*config.generate_options\(\)"):
        engine.init(LLMConfig())  # type: ignore[arg-type]
    with pytest.raises(ModuleNotFoundError, match="the options are empty"):
        engine.init({})


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("llm.MemPoolConfg", "; did you mean llm.MemPoolConfig?"),
        ("llm.DeviceId", "; did you mean ge.exec.deviceId?"),
        ("llm.FromTheFuture", ""),
        ("LLM.MemPoolConfig", "; did you mean llm.MemPoolConfig?"),
        ("MemPoolConfig", "; did you mean llm.MemPoolConfig?"),
        ("sync_kv_timeout", "; did you mean llm.SyncKvCacheWaitTime?"),
        ("ge.exec.device_id", "; did you mean ge.exec.deviceId?"),
    ],
)
def test_a_key_without_effect_is_warned_of(
    key: str, hint: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert parse({**ON, key: "1"}) == EngineOptions()
    assert caplog.messages == [f"there is no option {key!r}, it has no effect{hint}"]
    caplog.clear()
    assert parse_listen_info({key: "1"}) is None
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    "key", ["vllm.role", "ge.exec.rankId", "x", "a.b.c", "llm.RefInputFoo", ""]
)
def test_keys_of_others_are_left_alone(key: str, caplog: pytest.LogCaptureFixture) -> None:
    assert parse({**ON, key: "1"}) == EngineOptions()
    assert not caplog.messages


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("datadist.cheksum", "did you mean 'datadist.checksum'?"),
        ("datadist.check_type", "did you mean 'datadist.check_types'?"),
        ("datadist.shmm.threads", "did you mean 'datadist.shm.threads'?"),
        ("datadist.threads", "datadist.<backend>.<name> for the backends hccl, nixl, rdma, shm"),
        ("datadist.", "datadist.<backend>.<name>"),
    ],
)
def test_a_key_of_ours_that_does_not_exist_is_refused(key: str, hint: str) -> None:
    text = refused({**ON, key: "1"})
    assert text.startswith(f"there is no option {key!r}")
    assert hint in text


def test_options_of_a_role_switch_must_be_options() -> None:
    with pytest.raises(TypeError, match=r"llm.listenIpInfo is a tuple.*only support str"):
        parse_listen_info({"llm.listenIpInfo": ("10.0.0.1", 1)})  # type: ignore[dict-item]
    with pytest.raises(LLMException) as caught:
        parse_listen_info({"datadist.cheksum": "1"})
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
