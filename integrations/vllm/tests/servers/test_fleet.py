"""Two prefillers and two decoders come and go under load: each answer is right, no link is left."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from datadist_vllm.proxy import OUT_SECONDS
from harness.models import make_model, prompt
from harness.pair import MODELS, SOURCES
from harness.resources import Resources, resources
from harness.servers import Server, ask, datadist_config, proxy_server, vllm_server

AT_ONCE = 3
SETTLE_SECONDS = 60
SLOW_SECONDS = 10.0
"""Between the requests of a thread while a server starts: at full load, on two processors, the other
three servers leave it none for minutes."""


class Load:
    """Requests through the proxy, from the begin to the end of a ``with`` block."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(AT_ONCE)]
        self.pause = 0.0
        """Seconds between the requests of a thread."""
        self.answers: list[tuple[str, str]] = []
        """Prompts, and what was answered."""

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def wait_for_more(self, count: int) -> None:
        """Until so many requests more were answered."""
        wanted = len(self.answers) + count
        while len(self.answers) < wanted and any(thread.is_alive() for thread in self._threads):
            time.sleep(0.1)

    def _run(self, seed: int) -> None:
        generator = random.Random(seed)
        while not self._over.wait(self.pause):
            words = prompt(generator, generator.choice([5, 60, 200, 350]))
            self.answers.append((words, _text(self._url, words)))


def _text(url: str, words: str) -> str:
    answer = ask(url, {"prompt": words, "max_tokens": 12})
    return str(answer["choices"][0]["text"]) if "choices" in answer else f"error: {answer}"


class Fleet:
    """The servers."""

    def __init__(self, directory: Path) -> None:
        model = make_model("gqa", MODELS)
        config = datadist_config(lease_seconds=8.0)
        names = ("prefill-0", "prefill-1", "decode-0", "decode-1")
        servers = [
            vllm_server(name, model, directory, config, ("--num-gpu-blocks-override", "128"))
            for name in names
        ]
        self.prefill, self.decode = servers[:2], servers[2:]
        self.proxy = proxy_server(directory, self.prefill, self.decode)


@pytest.fixture(scope="module")
def fleet(directory: Path) -> Iterator[Fleet]:
    """All run."""
    fleet = Fleet(directory)
    with ExitStack() as stack:
        for server in (*fleet.prefill, *fleet.decode, fleet.proxy):
            stack.callback(server.stop)
            server.start()
        for server in (*fleet.prefill, *fleet.decode, fleet.proxy):
            server.wait_until_ready()
        yield fleet


def _replace(server: Server, end: Callable[[], None], load: Load) -> None:
    """End it under load, and start it again; requests go on meanwhile and afterwards."""
    load.wait_for_more(6)
    end()
    load.wait_for_more(12)
    load.pause = SLOW_SECONDS
    server.start()
    server.wait_until_ready()
    load.pause = 0.0
    time.sleep(OUT_SECONDS)
    load.wait_for_more(12)


def _worker(server: Server) -> Resources:
    """Of the process that is linked; another one has connections of clients."""
    (found,) = [each for name, each in resources(server).items() if name.startswith("VLLM::Worker")]
    return found


def _check_no_more(server: Server, before: Resources) -> None:
    """Links with instances that ended are given up by a step some time later."""
    until = time.monotonic() + SETTLE_SECONDS
    while True:
        ask(server.url, {"prompt": "w1", "max_tokens": 1})
        now = _worker(server)
        more = now.descriptors - before.descriptors, now.mappings - before.mappings
        if more[0] <= 1 and more[1] <= 0:
            return
        assert time.monotonic() < until, (server.name, before, now)
        time.sleep(0.5)


def _come_and_go(fleet: Fleet, server: Server, end: Callable[[], None], stays: Server) -> None:
    with Load(fleet.proxy.url) as load:
        load.wait_for_more(16)  # all are linked
        before = _worker(stays)
        _replace(server, end, load)
    _check_no_more(stays, before)
    for decode in fleet.decode:
        assert decode.metric(SOURCES, source="external_kv_transfer") > 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        wanted = list(
            pool.map(
                lambda each: _text(fleet.prefill[1].url, each), [words for words, _ in load.answers]
            )
        )
    assert [got for _, got in load.answers] == wanted


def test_a_prefiller_is_killed_and_comes_back(fleet: Fleet) -> None:
    server = fleet.prefill[0]
    _come_and_go(fleet, server, server.kill, stays=fleet.decode[1])


def test_a_decoder_is_stopped_and_comes_back(fleet: Fleet) -> None:
    server = fleet.decode[0]
    _come_and_go(fleet, server, server.stop, stays=fleet.prefill[1])
