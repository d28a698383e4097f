"""Options: where they come from, their limits, what is said about wrong ones."""

from __future__ import annotations

import pytest
from datadist_rdma import verify
from datadist_rdma.options import parse

from datadist.transport import TransportError, TransportOptions


def test_defaults_give_a_silent_peer_half_a_second() -> None:
    options = parse(TransportOptions(), {})
    assert (options.traffic_class, options.service_level) == (0, 0)
    assert (options.timeout, options.retry_count) == (14, 6)
    assert options.queue_pairs == 4
    assert 0.4 < options.peer_lost_seconds < 0.5
    assert options.retry_count < 7  # 7 retries never end on soft-RoCE


def test_the_configuration_comes_before_the_environment() -> None:
    environ = {
        "HCCL_RDMA_TC": "132", "HCCL_RDMA_SL": "4", "HCCL_RDMA_TIMEOUT": "18",
        "HCCL_RDMA_RETRY_CNT": "5",
    }  # fmt: skip
    options = parse(TransportOptions(), environ)
    assert (options.traffic_class, options.service_level) == (132, 4)
    assert (options.timeout, options.retry_count) == (18, 5)
    extra = {"timeout": "10", "retry_count": "0", "device": "mlx5_2", "port": "2", "gid_index": "0"}
    given = TransportOptions(traffic_class=0, service_level=1, extra=extra)
    options = parse(given, environ)
    assert (options.traffic_class, options.service_level) == (0, 1)
    assert (options.timeout, options.retry_count) == (10, 0)
    assert (options.gid_filter.device, options.gid_filter.port, options.gid_filter.gid_index) == (
        "mlx5_2",
        2,
        0,
    )


@pytest.mark.parametrize(
    ("given", "environ", "text"),
    [
        (TransportOptions(traffic_class=256), {}, "rdma_traffic_class is '256'"),
        (TransportOptions(service_level=8), {}, "rdma_service_level is '8'"),
        (TransportOptions(), {"HCCL_RDMA_TC": "x"}, "HCCL_RDMA_TC is 'x'"),
        (TransportOptions(), {"HCCL_RDMA_TIMEOUT": "0"}, "[1, 31]"),
        (TransportOptions(extra={"port": "0"}), {}, "datadist.rdma.port is '0'"),
        (TransportOptions(extra={"retry_count": "-1"}), {}, "[0, 7]"),
        (TransportOptions(extra={"queue_pairs": "0"}), {}, "datadist.rdma.queue_pairs is '0'"),
        (TransportOptions(extra={"queue_pairs": "65"}), {}, "[1, 64]"),
        (TransportOptions(extra={"speed": "1"}), {}, "unknown option datadist.rdma.speed; there"),
    ],
)
def test_wrong_values_are_named(
    given: TransportOptions, environ: dict[str, str], text: str
) -> None:
    with pytest.raises(TransportError) as caught:
        parse(given, environ)
    assert text in str(caught.value)


@pytest.mark.parametrize("name", ["--rank", "--size", "--traffic-class", "--service-level"])
@pytest.mark.parametrize("text", [" 1", "0_1", "+1", "\u0661", "-1", "1.0", "x", ""])
def test_numbers_of_verify(name: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert vars(verify._parse([name, "1"]))[name[2:].replace("-", "_")] == 1
    with pytest.raises(SystemExit):
        verify._parse([f"{name}={text}"])
    assert f"argument {name}: {text!r} is not a number in [" in capsys.readouterr().err
