"""`datadist bench`: its arithmetic, its verification, its output, and quick runs of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datadist.bench import measure
from datadist.bench.plot import plot
from datadist.bench.report import problems, report
from datadist.bench.results import (
    BesideLarge,
    Grants,
    Latency,
    LinkTime,
    Parallel,
    Result,
    ScalePoint,
    Series,
    ThreadSpeed,
    Throughput,
    percentiles,
    ratio,
)
from datadist.bench.shapes import SHAPES, Shape, content, fill, verify
from datadist.cli import main

SMALL = Shape("small", "for tests", 3, 16, 64, 4)


def _throughput(wrong: list[str]) -> Throughput:
    return Throughput(
        "paged", "a title", 10**9, 1000, Series([0.25, 0.2]), Series([0.125, 0.1]),
        Series([0.1, 0.2, 0.125]), Series([1e-5]), Series([0.1]),
        {"memcpy": Series([0.1, 0.1, 0.1]), "native copy": Series([0.1, 0.2, 0.1]),
         "process_vm_readv": Series([0.2, 0.4, 0.25])},
        dict.fromkeys(["memcpy", "native copy", "process_vm_readv"], Series([0.1, 0.2, 0.125])),
        ["native copy", "process_vm_readv"], 0.09, 0.0, wrong,
    )  # fmt: skip


RESULTS: list[Result] = [
    _throughput([]),
    Latency("latency", [1e-5, 2e-5], [4e-6], [1e-6], []),
    LinkTime("link", 64 << 20, Series([0.003]), Series([0.004]), Series([1e-5]), 0.02),
    ScalePoint("segment-bytes", 512, Series([0.02]), 1 << 24, Series([0.01]), Series([1e-4])),
    ScalePoint("domains", 8, Series([0.05])),
    ThreadSpeed("beside", [100.0, 200.0], [95.0, 180.0]),
    Parallel("parallel", 1 << 20, Series([0.2, 0.2]), Series([0.1, 0.12]), [5e-6, 6e-6], [7e-6],
             Series([0.1]), []),
    Grants("grants", 1 << 20, 1000, Series([2e-5]), Series([3e-5]), Series([4e-5]), Series([5e-5]),
           Series([6e-5]), Series([7e-5]), 2e-5, 1e-5, 2048.0),
    BesideLarge("small", 1 << 30, 5000.0, [[1e-5], [2e-5]], [[1e-4], [3e-4]], [[1e-4], [0.004]], [0.2]),
]  # fmt: skip


def test_the_workloads_are_what_they_are_named_for() -> None:
    assert SHAPES["contiguous"].nbytes == 256 << 20
    assert (SHAPES["paged-gqa"].segments, SHAPES["paged-gqa"].nbytes) == (16384, 512 << 20)
    assert (SHAPES["paged-mla"].segments, SHAPES["paged-mla"].block_bytes) == (1952, 147456)
    for shape in SHAPES.values():
        small = shape.quick()
        assert small.nbytes < shape.nbytes
        source, target = shape.lists(1)
        assert len(set(source)) == len(set(target)) == shape.count
        assert shape.blocks > max(*source, *target)
        assert shape.contiguous or shape.lists(2) != (source, target)


def test_no_two_words_are_equal() -> None:
    blocks = np.arange(SMALL.blocks)
    words = np.concatenate([content(SMALL, t, blocks).ravel() for t in range(SMALL.tensors)])
    assert len(np.unique(words)) == len(words)
    assert words.min() == 1


def _pulled() -> tuple[list[np.ndarray[Any, Any]], list[int], list[int]]:
    size = (SMALL.blocks, SMALL.block_bytes)
    owner = [np.zeros(size, np.uint8) for _ in range(SMALL.tensors)]
    fill(SMALL, owner)
    target = [np.zeros(size, np.uint8) for _ in range(SMALL.tensors)]
    source, places = SMALL.lists(0)
    for here, there in zip(target, owner, strict=True):
        here[places] = there[source]
    return target, source, places


def test_verification_finds_what_is_wrong() -> None:
    arrays, source, places = _pulled()
    assert verify(SMALL, arrays, source, places) == []
    arrays[1][places[2], 5] ^= 1
    assert verify(SMALL, arrays, source, places) == [
        "tensor 1: 1 wrong words, 0 words changed beside the blocks"
    ]
    arrays, source, places = _pulled()
    beside = next(b for b in range(16) if b not in places and {b - 1, b + 1} & set(places))
    arrays[0][beside, 63] = 1
    assert "0 wrong words, 1 words changed" in verify(SMALL, arrays, source, places)[0]
    arrays, source, places = _pulled()
    assert len(verify(SMALL, arrays, source[::-1], places)) == SMALL.tensors


def test_ratios_are_taken_pair_by_pair() -> None:
    assert ratio(Series([1.0, 10.0, 2.0]), Series([2.0, 10.0, 2.0])) == 1.0
    result = _throughput([])
    assert result.ratios() == {"memcpy": 0.8, "native copy": 1.0, "process_vm_readv": 2.0}
    assert result.rate(result.warm.median) == 8.0
    assert result.to_json()["cold_over_second"] == 2.0


def test_the_limit_is_the_fastest_one_that_can_move_the_memory() -> None:
    result = _throughput([])
    result.limits["memcpy"] = Series([0.01, 0.01, 0.01])
    assert result.limit == "native copy"
    assert (result.to_json()["limit"], result.to_json()["of_limit"]) == ("native copy", 1.0)
    result.applicable = ["process_vm_readv"]
    assert (result.limit, result.to_json()["of_limit"]) == ("process_vm_readv", 2.0)


def test_percentiles() -> None:
    marks = percentiles([float(n) for n in range(101)])
    assert marks == {"p1": 1, "p10": 10, "p50": 50, "p90": 90, "p99": 99, "max": 100}


def test_the_report_has_every_result() -> None:
    text = report(RESULTS)
    for part in (
        "paged",
        "8.00",
        "5.00-10.00",
        "0.80",
        "whole call",
        "64",
        "segment-bytes",
        "92%",
        "4 ms",
    ):
        assert part in text
    assert problems(RESULTS) == []
    assert problems([_throughput(["tensor 1: ..."])]) == ["paged: tensor 1: ..."]
    assert report([]) == ""
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("width", [40, 60, 80])
def test_the_report_fits_a_narrow_terminal(width: int) -> None:
    assert max(map(len, report(RESULTS, width).splitlines())) <= width


def test_results_are_json() -> None:
    kinds = [json.loads(json.dumps(result.to_json()))["kind"] for result in RESULTS]
    assert kinds == [
        "throughput",
        "latency",
        "link",
        "scale",
        "scale",
        "beside",
        "parallel",
        "grants",
        "small",
    ]


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib (extra bench) is not installed")
    plot(RESULTS, tmp_path / "all.png", "title")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    plot(RESULTS[1:2], tmp_path / "one.SVG", "title")
    assert "Latency of a block of 4 KiB" in (tmp_path / "one.SVG").read_text()


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (
            ["latency", "--plot", "out.txt"],
            "--plot is out.txt: expected a name that ends in .",
        ),
        (["latency", "--plot", "out"], "--plot is out: expected a name that ends in"),
        (
            ["link", "beside", "--plot", "out.png"],
            "draws nothing of link, beside: add one of contig",
        ),
        (["latency", "--plot", "no/out.png"], "--plot is no/out.png, which cannot be written"),
        (["latency", "--json", "no/out.json"], "--json is no/out.json, which cannot be written"),
        (["latency", "--json", "."], "--json is ., which cannot be written"),
    ],
)
def test_files_are_checked_before_anything_is_measured(
    args: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("matplotlib", reason="matplotlib (extra bench) is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "latency", None)
    monkeypatch.setattr(measure, "link_time", None)
    assert main(["bench", *args]) == 2
    assert text in capsys.readouterr().err


def test_a_plot_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(measure, "latency", None)
    assert main(["bench", "latency", "--plot", "out.png"]) == 2
    assert "pip install 'datadist[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["nonsense"], "there is no workload nonsense"),
        (["latency", "--option", "x"], "expected KEY=VALUE"),
        (["latency", "--backend", "nowhere"], "nowhere"),
        (["latency", "--option", "datadist.shm.threads=x"], "datadist.shm.threads"),
    ],
)
def test_what_cannot_be_measured(
    args: list[str], text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--quick", *args]) == 2
    said = capfd.readouterr().err
    assert text in said
    assert "Traceback" not in said  # nor from the process of the peer


@pytest.mark.parametrize(
    ("memory", "direction"), [("pool", "pull"), ("registered", "pull"), ("pool", "push")]
)
def test_a_quick_run(
    memory: str, direction: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    args = ["paged-mla", "latency", "--quick", "--repeat", "2", "--json", str(out)]
    args += ["--memory", memory, "--direction", direction, "--backend", "auto"]
    assert main(["bench", *args]) == 0
    shown = capsys.readouterr()
    assert "paged-mla: round 2 of 2" in shown.err
    assert "paged-mla" in shown.out
    assert "backend shm" in shown.out
    large, small = json.loads(out.read_text())["results"]
    assert large["problems"] == small["problems"] == []
    assert len(large["warm"]["seconds"]) == 2 * len(large["limits"])
    assert all(len(series["seconds"]) == 2 for series in large["beside"].values())
    assert set(large["limits"]) >= {"memcpy", "native copy"}
    assert len(small["seconds"]) == 1000


def test_a_quick_run_of_grants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    args = ["grants", "--quick", "--repeat", "2", "--json", str(out), "--backend", "shm"]
    assert main(["bench", *args]) == 0
    assert "grants: 1000 live grants" in capsys.readouterr().err
    (result,) = json.loads(out.read_text())["results"]
    assert result["problems"] == []
    for name in ("open", "by_token", "by_key", "request", "revoke"):
        assert len(result[name]["seconds"]) == 2
        assert min(result[name]["seconds"]) > 0
    assert 0 < result["bytes_each"] < 100_000
