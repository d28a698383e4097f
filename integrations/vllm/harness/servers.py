"""vLLM's OpenAI servers and the proxy as processes: started, asked, killed."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

START_SECONDS = 300
STOP_SECONDS = 60
ASK_SECONDS = 300


@dataclass(frozen=True)
class Place:
    """Where a server runs; by default on this host."""

    host: str = "127.0.0.1"
    """Address at which it is asked."""
    enter: tuple[str, ...] = ()
    """What its command begins with, to enter another network namespace."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the connector."""
    runtime: str = "run"
    """Name of its runtime directory: engines that share one are on one host."""


HERE = Place()


class Process:
    """A server process with its children, and its log."""

    def __init__(self, name: str, command: list[str], log: Path, env: dict[str, str]) -> None:
        self.name = name
        self.log = log
        self._command = command
        self._env = {**os.environ, **env}
        self._process: subprocess.Popen[bytes] | None = None

    def set_env(self, name: str, value: str) -> None:
        """For the next start."""
        self._env[name] = value

    def start(self) -> None:
        """Start; `wait_until_ready` waits."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env=self._env, start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """Of the first process; its children are in its process group."""
        assert self._process is not None
        return self._process.pid

    def signal(self, number: int) -> None:
        """To all its processes."""
        os.killpg(self.pid, number)

    def kill(self) -> None:
        """As a crash: all at once."""
        self.signal(signal.SIGKILL)
        self._ended(STOP_SECONDS)

    def stop(self) -> None:
        """As an operator does; those that do not end are killed."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._ended(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def _ended(self, seconds: float) -> None:
        assert self._process is not None
        self._process.wait(seconds)
        self._process = None

    def alive(self) -> bool:
        """Whether the first process lives."""
        return self._process is not None and self._process.poll() is None

    def tail(self, lines: int = 40) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class Server(Process):
    """A process that speaks HTTP at a free port."""

    def __init__(
        self,
        name: str,
        command: list[str],
        log: Path,
        env: dict[str, str],
        port: int,
        host: str = HERE.host,
    ) -> None:
        super().__init__(name, command, log, env)
        self.port = port
        self.url = f"http://{host}:{port}"

    def wait_until_ready(self, path: str = "/health") -> None:
        """Raise ``RuntimeError`` with the end of the log where it does not come."""
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if not self.alive():
                raise RuntimeError(f"{self.name} has ended:\n{self.tail()}")
            try:
                urllib.request.urlopen(self.url + path, timeout=5).close()
                return
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(f"{self.name} is not ready after {START_SECONDS} s:\n{self.tail()}")

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric over what has these labels."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=ASK_SECONDS) as answer:
            lines = answer.read().decode().splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        found = [line for line in lines if line.startswith((name + "{", name + " "))]
        return sum(
            float(line.split()[-1]) for line in found if all(each in line for each in wanted)
        )


def ask(url: str, body: dict[str, Any], path: str = "/v1/completions") -> dict[str, Any]:
    """A request and its answer; an HTTP error is an answer, too, with its ``status``."""
    data = json.dumps({"model": "m", "temperature": 0, "ignore_eos": True, **body}).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=ASK_SECONDS) as answer:
            value: dict[str, Any] = json.load(answer)
            return value
    except urllib.error.HTTPError as error:
        return {"status": error.code, "text": error.read().decode(errors="replace")}


def abandon(url: str, body: dict[str, Any], after: float) -> None:
    """A client that leaves after some seconds."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=ASK_SECONDS)
    connection.request(
        "POST", "/v1/completions",
        json.dumps({"model": "m", "temperature": 0, "ignore_eos": True, **body}),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    time.sleep(after)
    assert connection.sock is not None
    with suppress(OSError):  # the server may have ended
        connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()


def vllm_server(
    name: str,
    model: Path,
    directory: Path,
    transfer: dict[str, Any] | None = None,
    arguments: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
    cache_gib: int = 1,
    place: Place = HERE,
) -> Server:
    """A server that is not started yet. ``transfer`` is its ``--kv-transfer-config``, if it has one."""
    port = free_port()
    command = [
        *place.enter, sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(model), "--served-model-name", "m", "--host", place.host,
        "--port", str(port), "--enforce-eager", "--dtype", "float32", "--max-model-len", "4096",
        "--max-num-batched-tokens", "512", "--max-num-seqs", "16", *arguments,
    ]  # fmt: skip
    if transfer is not None:
        command += ["--kv-transfer-config", json.dumps(transfer)]
    environment = {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(cache_gib),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "DATADIST_RUNTIME_DIR": str(directory / place.runtime),
        **(env or {}),
    }
    return Server(name, command, directory / f"{name}.log", environment, port, place.host)


def datadist_config(
    role: str = "kv_both", policy: str = "recompute", **extra: Any
) -> dict[str, Any]:
    """A ``--kv-transfer-config`` of this connector."""
    return {
        "kv_connector": "DataDistConnector",
        "kv_role": role,
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": extra,
    }


def proxy_server(
    directory: Path, prefill: list[Server], decode: list[Server], name: str = "proxy"
) -> Server:
    """The proxy of this package."""
    port = free_port()
    command = [sys.executable, "-m", "datadist_vllm.proxy", "--port", str(port)]
    for each in prefill:
        command += ["--prefill", each.url]
    for each in decode:
        command += ["--decode", each.url]
    return Server(name, command, directory / f"{name}.log", {}, port)


def free_port() -> int:
    """A port that nobody had a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
