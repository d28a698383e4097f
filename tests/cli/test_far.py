"""`--far` of the commands: how it is written, and `datadist bench` between two hosts."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from datadist.bench.measured_engine import PEER, BenchError, MeasuredEngine, Settings, table
from datadist.bench.places import Places
from datadist.bench.report import report
from datadist.bench.results import Latency, ScalePoint, Series
from datadist.bench.stream_limit import StreamLimit
from datadist.cli import main
from datadist.cli.far import add_far, add_hosts
from datadist.testing import installed
from datadist.transports.loader import choose_backend
from tests import hosts

FAR = [pytest.param("--far=namespaces", marks=hosts.needed), "--far=directories"]


@pytest.fixture(autouse=True)
def _transports() -> Iterator[None]:
    with installed({"tcp": "tests.tcp_pair_engine:TcpPairTransport"}):
        yield


def _parse(*args: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("words", nargs="*")
    add_far(parser)
    add_hosts(parser)
    return parser.parse_args(args)


@pytest.mark.parametrize(
    ("args", "far", "words"),
    [
        ([], None, []),
        (["--far", "paged"], "automatic", ["paged"]),
        (["paged", "--far"], "automatic", ["paged"]),
        (["--far=namespaces", "paged"], "namespaces", ["paged"]),
        (["--far=directories"], "directories", []),
    ],
)
def test_the_value_is_optional(args: list[str], far: str | None, words: list[str]) -> None:
    """What follows it is never its value."""
    parsed = _parse(*args)
    assert (parsed.far, parsed.words, parsed.hosts) == (far, words, 4)


def test_another_value_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert _parse("--hosts", "2").hosts == 2
    with pytest.raises(SystemExit):
        main(["bench", "--far=nowhere", "latency"])
    assert "--far" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["conformance", "shm", "--far", "--hosts", "5"])
    assert "invalid choice: 5" in capsys.readouterr().err


@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("direction", ["pull", "push"])
def test_a_quick_run(
    far: str, direction: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engines are on two hosts, and what is compared with them is their network."""
    out, before = tmp_path / "out.json", _surroundings()
    args = ["paged-mla", "latency", "--quick", "--repeat", "2", "--backend", "tcp", far]
    args += ["--json", str(out), "--direction", direction]
    args += ["--option", "datadist.tcp.device={device}", "--placement", "host"]
    assert main(["bench", *args]) == 0
    shown = capsys.readouterr().out
    device, where = ("eth0", "network namespaces") if "names" in far else ("lo", "on loopback")
    title = shown.splitlines()[0]
    assert where in title
    assert f"device {device}" in title
    assert "(HOST)" in title
    assert "TCP stream" in shown
    assert "TCP request and answer" in shown
    for local in ("memcpy", "native copy", "process_vm_readv"):
        assert local not in shown
    large, small = json.loads(out.read_text())["results"]
    assert large["problems"] == small["problems"] == []
    assert list(large["limits"]) == ["TCP stream"]
    assert len(large["limits"]["TCP stream"]["seconds"]) == len(large["warm"]["seconds"]) == 2
    assert small["limit_name"] == "TCP request and answer"
    assert _surroundings() == before


def _surroundings() -> tuple[str | None, ...]:
    names = ("DATADIST_RUNTIME_DIR", "DATADIST_AUTH_KEY")
    return os.readlink("/proc/self/ns/net"), *(os.environ.get(name) for name in names)


def test_what_stays_on_its_host_is_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "latency", "--quick", "--backend", "shm", "--far"]) == 2
    assert "shm links processes of one host only" in capsys.readouterr().err


def test_without_namespaces_it_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["bench", "latency", "--quick", "--backend", "tcp", "--far=namespaces"]) == 2
    said = capsys.readouterr().err
    assert "cannot measure: the command ip is not installed" in said
    assert "--far=directories" in said


def test_an_error_gives_back_the_surroundings() -> None:
    before = _surroundings()
    places, inside = Places("automatic"), []

    def measure() -> None:
        with places:
            inside.append(_surroundings())
            raise BenchError("measured nothing")

    with pytest.raises(BenchError, match="measured nothing"):
        measure()
    assert inside != [before]
    assert _surroundings() == before
    assert not any(Path(host.directory).exists() for host in places.hosts)


def test_tables_have_a_server_for_each_host() -> None:
    assert len(json.loads(table(3))["server_list"]) == 1
    with Places("directories") as places:
        for clusters in (2, 4):
            found = json.loads(table(clusters, places.hosts))
            assert [s["server_id"] for s in found["server_list"]] == [
                host.address for host in places.hosts[:clusters]
            ]
            ranks = [d["rank_id"] for s in found["server_list"] for d in s["device"]]
            assert ranks == [str(rank) for rank in range(clusters)]


class _Here:
    """What the process of the other end would do, in this one."""

    def __init__(self, settings: Settings) -> None:
        self._engine = MeasuredEngine(PEER, settings)

    def call(self, method: str, *args: object) -> object:
        return getattr(self._engine, method)(*args)


@pytest.mark.parametrize("pull", [True, False])
def test_the_stream_moves_what_was_asked_for(pull: bool) -> None:
    """More than its memory holds, and twice over one connection."""
    backend = choose_backend("tcp", {}).name
    limit = StreamLimit(_Here(Settings(backend)), 3_000_001, pull=pull)  # type: ignore[arg-type]
    try:
        assert limit.measure(limit.compared, 0) > 0
        assert limit.measure(limit.compared, 1) > 0
    finally:
        limit.close()
    with pytest.raises(BenchError, match="TCP stream broke"):
        limit.measure(limit.compared, 2)


def test_the_limit_of_a_curve_is_named() -> None:
    near = ScalePoint("segment-bytes", 512, Series([0.02]), 1 << 24, Series([0.01]), Series([1e-4]))
    far = ScalePoint(
        "segment-bytes", 512, Series([0.02]), 1 << 24, Series([0.01]), Series([1e-4]), "TCP stream"
    )
    assert "/ LIMIT: speed as part of that of the native copy" in report([near])
    assert "/ LIMIT: speed as part of that of the TCP stream" in report([far])
    trip = Latency("latency", [1e-5], [4e-6], [1e-6], [], "TCP request and answer")
    assert "TCP request and answer" in report([trip])
