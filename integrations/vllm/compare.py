"""Times of this connector beside NixlConnector: the same machine and run, in turns.

    python compare.py [--repeats 15] [--sizes 1 16 64]

A pair of servers of each connector runs, and requests go to the one and the other in turn. Measured are,
for prompts of so many MiB of KV cache, the time from the prefiller's answer to the decoder's first token;
then requests per second, 8 at once. NIXL must be installed: `pip install nixl==1.5.1`.

Prefillers run on one half of the processors, decoders on the other one, of both connectors: NixlConnector
binds its worker to the last processor of the machine, which would be the same one for both instances.
While one pair is measured the other one is stopped: threads of NIXL poll without anything to do.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from harness.pair import Pair, Prompt
from harness.resources import processes_of
from harness.servers import ASK_SECONDS, Server, datadist_config, free_port

TOKENS_PER_MIB = 32
SIZES = (1, 16, 64)
ARGUMENTS = ("--block-size", "32", "--no-enable-prefix-caching", "--max-num-batched-tokens", "4096")
WARM_UPS = 2
REQUESTS, AT_ONCE, ROUNDS = 32, 8, 3
Found = dict[tuple[str, str], list[float]]


def nixl_config(policy: str = "recompute", **extra: Any) -> dict[str, Any]:
    """A ``--kv-transfer-config`` of NixlConnector."""
    return {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": extra,
    }


def pair_of(connector: str, directory: Path, nixl_threads: int) -> Pair:
    """A pair that is not started."""
    if connector == "datadist":
        return Pair("wide", directory, arguments=ARGUMENTS, transfer=datadist_config)
    extra = {"num_threads": nixl_threads}
    pair = Pair("wide", directory, extra=extra, arguments=ARGUMENTS, transfer=nixl_config)
    for server in (pair.prefill, pair.decode):
        server.set_env("VLLM_NIXL_SIDE_CHANNEL_PORT", str(free_port()))
    return pair


@contextmanager
def running(
    connectors: Sequence[str], directory: Path, nixl_threads: int
) -> Iterator[dict[str, Pair]]:
    """A pair of each connector, all of them at once."""
    with ExitStack() as stack:
        pairs = {}
        for connector in connectors:
            place = directory / connector
            place.mkdir(parents=True)
            pair = stack.enter_context(pair_of(connector, place, nixl_threads))
            split_processors(pair)
            pairs[connector] = pair
        yield pairs


def split_processors(pair: Pair) -> None:
    """The first half to the prefiller, the second one to the decoder; one that is alone to both."""
    processors = sorted(os.sched_getaffinity(0))
    half = (len(processors) + 1) // 2
    _bind(pair.prefill, processors[:half])
    _bind(pair.decode, processors[half:] or processors)


def _bind(server: Server, processors: list[int]) -> None:
    """All threads of its processes."""
    for process in processes_of(server):
        for thread in os.listdir(f"/proc/{process}/task"):
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), processors)


@contextmanager
def alone(pairs: dict[str, Pair], name: str) -> Iterator[Pair]:
    """This pair; the others are stopped meanwhile."""
    others = [
        server
        for other in pairs
        if other != name
        for server in (pairs[other].prefill, pairs[other].decode)
    ]
    for server in others:
        server.signal(signal.SIGSTOP)
    try:
        yield pairs[name]
    finally:
        for server in others:
            server.signal(signal.SIGCONT)


def first_token_seconds(pair: Pair, tokens: list[int]) -> float:
    """From the prefiller's answer to the first bytes of the decoder's stream."""
    params = pair.prefilled(tokens)
    body = {
        "model": "m", "prompt": tokens, "max_tokens": 2, "temperature": 0, "ignore_eos": True,
        "stream": True, "kv_transfer_params": params,
    }  # fmt: skip
    request = urllib.request.Request(
        pair.decode.url + "/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    began = time.monotonic()
    with urllib.request.urlopen(request, timeout=ASK_SECONDS) as answer:
        answer.readline()
        seconds = time.monotonic() - began
        answer.read()
    return seconds


def measure_first_tokens(
    pairs: dict[str, Pair], sizes: Sequence[int], repeats: int, found: Found
) -> None:
    """In turns, request by request; who is first changes."""
    generator = random.Random(7)
    for repeat in range(WARM_UPS + repeats):
        names = list(pairs)
        for size in sizes:
            for name in names if repeat % 2 else reversed(names):
                tokens = _tokens(generator, size * TOKENS_PER_MIB)
                with alone(pairs, name) as pair:
                    seconds = first_token_seconds(pair, tokens)
                if repeat >= WARM_UPS:
                    found[f"{size} MiB, ms", name].append(seconds * 1000)


def measure_rates(pairs: dict[str, Pair], found: Found) -> None:
    """Requests of 256 to 1024 tokens through the proxy, 16 tokens each; the same for each connector."""
    for number in range(ROUNDS):
        for name in pairs:
            with alone(pairs, name) as pair:
                found["requests per second", name].append(_rate(pair, number))


def _rate(pair: Pair, seed: int) -> float:
    generator = random.Random(seed)
    prompts: list[Prompt] = [
        _tokens(generator, generator.choice([256, 512, 1024])) for _ in range(REQUESTS)
    ]
    began = time.monotonic()
    answers = pair.through_proxy(prompts, at_once=AT_ONCE)
    if any(text.startswith("error") for text in answers):
        raise RuntimeError(f"requests failed: {answers}")
    return REQUESTS / (time.monotonic() - began)


def check_transferred(pairs: dict[str, Pair]) -> None:
    """Raise ``RuntimeError`` where a decoder has computed a prompt: then something else was measured."""
    for name, pair in pairs.items():
        moved, computed = pair.transferred(), pair.computed()
        print(f"{name}: {moved:.0f} prompt tokens transferred, {computed:.0f} computed")
        if computed:
            raise RuntimeError(f"the decoder of {name} computed {computed:.0f} prompt tokens")


def report(found: Found) -> None:
    """Medians, and the lower and upper quartile."""
    for (what, connector), values in sorted(found.items()):
        if len(values) < 2:
            continue
        low, middle, high = statistics.quantiles(values, n=4)
        print(
            f"{what:22} {connector:9} {middle:8.2f}  ({low:.2f} to {high:.2f}, {len(values)} values)"
        )


def _tokens(generator: random.Random, count: int) -> list[int]:
    return [generator.randrange(300, 1000) for _ in range(count)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, metavar="MIB")
    parser.add_argument("--connectors", nargs="+", default=["datadist", "nixl"])
    parser.add_argument("--nixl-threads", type=int, default=4, help="of NIXL's UCX; vLLM's default")
    parser.add_argument("--no-rates", action="store_true", help="without requests per second")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that servers are stopped
    found: Found = defaultdict(list)
    with (
        tempfile.TemporaryDirectory(prefix="compare-") as name,
        running(given.connectors, Path(name), given.nixl_threads) as pairs,
    ):
        try:
            measure_first_tokens(pairs, given.sizes, given.repeats, found)
            if not given.no_rates:
                measure_rates(pairs, found)
            check_transferred(pairs)
        finally:
            report(found)


if __name__ == "__main__":
    main()
