"""Numbers that users write (digits.py): ASCII digits and nothing else, wherever text is read."""

from __future__ import annotations

import importlib
import json
from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datadist import LLMConfig, LLMException, LLMRole, LLMStatusCode
from datadist.base.digits import number_argument, parse_digits
from datadist.cli import main
from datadist.control.hostport import HostPort
from datadist.engine.options import EngineOptions, parse_listen_info
from datadist.rank_table import RankTableError, parse_rank_table

LAX = [
    " 3",
    "3 ",
    "3\n",
    "\t3",
    "+3",
    "0_3",
    "3_0",
    "\u0663",
    "\uff13",
    "3\u00a0",
    "0x3",
    "3.0",
    "1e1",
]
"""What `int` or `float` reads, or may seem to read, as a number."""
PI = LLMStatusCode.LLM_PARAM_INVALID
ON = {"llm.EnableCacheManager": "1"}


@given(st.integers(0, 10**20 - 1))
def test_what_is_written_is_read_back(number: int) -> None:
    assert parse_digits(str(number)) == number
    assert parse_digits(f"{number:020}") == number


@given(st.text() | st.sampled_from(LAX))
def test_anything_else_is_no_number(text: str) -> None:
    good = 0 < len(text) <= 20 and set(text) <= set("0123456789")
    assert (parse_digits(text) is not None) == good
    assert parse_digits("0" * 21) is None


@pytest.mark.parametrize("port", LAX)
@pytest.mark.parametrize("text", ["{}", "26{}", "2{}6"])
def test_ports_of_listen_addresses(port: str, text: str) -> None:
    info = f"127.0.0.1:{text.format(port)}"
    for options in ({**ON, "llm.listenIpInfo": info}, {"llm.listenIpInfo": info}):
        parse = parse_listen_info if len(options) == 1 else _parse
        with pytest.raises(ValueError, match=r"listenIpInfo.*is not a number"):
            parse(options)
    with pytest.raises(LLMException, match="ListenPort") as caught:
        _parse({**ON, "llm.ListenIp": "127.0.0.1", "llm.ListenPort": text.format(port)})
    assert caught.value.status_code is PI


def _parse(options: dict[str, str], environ: dict[str, str] | None = None) -> EngineOptions:
    return EngineOptions.parse(options, LLMRole.MIX, environ or {})


@pytest.mark.parametrize("port", ["-1", "65536", "9" * 30, "9" * 5000])
def test_ports_that_are_numbers_out_of_range(port: str) -> None:
    with pytest.raises(LLMException, match=r"\[0, 65535\]") as caught:
        _parse({**ON, "llm.listenIpInfo": f"127.0.0.1:{port}"})
    assert caught.value.status_code is PI
    with pytest.raises(LLMException, match=r"\[0, 65535\]"):
        parse_listen_info({"llm.listenIpInfo": f"127.0.0.1:{port}"})


@pytest.mark.parametrize("port", LAX)
@pytest.mark.parametrize("host", ["host", "10.0.0.1", "[fd00::1]"])
def test_ports_of_other_addresses(host: str, port: str) -> None:
    with pytest.raises(ValueError, match="is not a number"):
        HostPort.parse(f"{host}:{port}")
    with pytest.raises(ValueError, match=r"expected|write an IPv6"):
        HostPort.parse(f" {host}:3")
    with pytest.raises(LLMException, match="DATADIST_RENDEZVOUS") as caught:
        _parse(ON, {"DATADIST_RENDEZVOUS": f"{host}:{port}"})
    assert caught.value.status_code is PI


@pytest.mark.parametrize("text", LAX)
def test_numbers_of_the_configuration(text: str) -> None:
    with pytest.raises(LLMException, match="must be digits") as caught:
        LLMConfig().sync_kv_timeout = text
    assert caught.value.status_code is PI
    with pytest.raises(LLMException, match="DATADIST_PEER_TIMEOUT"):
        _parse(ON, {"DATADIST_PEER_TIMEOUT": text})
    with pytest.raises(LLMException, match="flowGraphMemMaxSize"):
        _parse({**ON, "ge.flowGraphMemMaxSize": text})


@pytest.mark.parametrize("value", [*LAX, 3.0, True])
@pytest.mark.parametrize("name", ["rank_id", "device_id", "device_port", "host_port"])
def test_numbers_of_rank_tables(name: str, value: Any) -> None:
    device = {"device_id": "0", "rank_id": "0", name: value}
    table: dict[str, Any] = {
        "version": "1.0", "status": "completed", "server_count": "1",
        "server_list": [{"server_id": "here", "device": [device]}],
    }  # fmt: skip
    with pytest.raises(RankTableError, match=rf"device\[0\]\.{name}: expected a number as text"):
        parse_rank_table(json.dumps(table))
    device[name] = "0" if name.endswith("id") else "1"
    table["server_count"] = value
    with pytest.raises(RankTableError, match="server_count: expected a number as text"):
        parse_rank_table(json.dumps(table))


@pytest.mark.parametrize("text", [*LAX, "-1", "", "x"])
def test_clusters_of_a_mapping(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    devices = [{"device_id": str(n), "rank_id": str(n)} for n in (0, 1)]
    path = tmp_path / "table.json"
    path.write_text(json.dumps({
        "version": "1.0", "status": "completed", "server_count": "1",
        "server_list": [{"server_id": "here", "device": devices}],
    }))  # fmt: skip
    assert main(["check", str(path), "--mapping", json.dumps({text: 0, "9": 1})]) == 1
    assert f"--mapping: {text!r} is not a cluster id in [0, 2^64)" in capsys.readouterr().err


OPTIONS = [
    (["demo", "--clusters"], "2"),
    (["demo", "--tokens"], "7"),
    (["bench", "--repeat"], "7"),
    (["bench", "--threads"], "7"),
]


@pytest.mark.parametrize("text", [*LAX, "0", "-1", ""])
@pytest.mark.parametrize(("command", "good"), OPTIONS)
def test_options_of_commands(
    command: list[str], good: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = ArgumentParser()
    importlib.import_module(f"datadist.cli.{command[0]}").add_arguments(parser)
    assert int(good) in vars(parser.parse_args([command[1], good])).values()
    with pytest.raises(SystemExit):
        parser.parse_args([f"{command[1]}={text}"])
    assert f"argument {command[1]}: {text!r} is not a number in [" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["nan", "inf", "1_0", " 1", "\u0663", "+1", "1e400", "0", "0.0", ""]
)
def test_the_factor_of_times(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    from datadist.cli.conformance import _factor

    assert (_factor("2"), _factor("0.5")) == (2, 0.5)
    with pytest.raises(ArgumentTypeError, match="is not a positive number"):
        _factor(text)


def test_numbers_of_options_have_bounds() -> None:
    parse = number_argument(2, 4)
    assert [parse(text) for text in ("2", "03", "4")] == [2, 3, 4]
    for text in ("1", "5", "9" * 5000):
        with pytest.raises(ArgumentTypeError, match=r"is not a number in \[2, 4\]") as caught:
            parse(text)
        assert len(str(caught.value)) < 300
