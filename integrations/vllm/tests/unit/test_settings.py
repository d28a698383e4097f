"""What `kv_connector_extra_config` may say."""

from __future__ import annotations

from typing import Any

import pytest
from datadist_vllm.settings import Settings
from datadist_vllm.versions import check_vllm_version


def test_nothing_need_be_given() -> None:
    assert Settings.parse({}) == Settings()


def test_seconds_may_be_integers() -> None:
    assert Settings.parse({"lease_seconds": 5}).lease_seconds == 5.0


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"lease_second": 5}, "'lease_second' is unknown, is 'lease_seconds' meant?"),
        ({"x": 5}, "'x' is unknown; known are backend"),
        ({"lease_seconds": "5"}, "'lease_seconds' is '5', expected a float"),
        ({"lease_seconds": 0}, "expected 0.1 to 86400"),
        ({"pool": 1}, "'pool' is 1, expected a bool"),
        ({"peer_tensor_parallel_size": True}, "expected a int"),
        ({"peer_tensor_parallel_size": -1}, "expected 0 to 1024"),
        (
            {"listen_host": "0.0.0.0"},
            "'listen_host' is '0.0.0.0', expected an IPv4 address of this",
        ),
        ({"listen_host": "here"}, "'listen_host' is 'here', expected an IPv4 address"),
        ({"keep_seconds": -1}, "expected 0 to 86400"),
    ],
)
def test_what_is_wrong_is_refused_by_name(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text.replace("?", r"\?")):
        Settings.parse(given)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.32"])
def test_versions_of_the_supported_range_pass(version: str) -> None:
    check_vllm_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.32.0", "dev"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(RuntimeError, match=f"vLLM {version} is installed"):
        check_vllm_version(version)
