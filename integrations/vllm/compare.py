"""Times of this connector beside NixlConnector: the same machine and run, in turns.

    python compare.py [--rounds 2] [--repeats 15]

Each round starts a pair of each connector, one after the other. It measures, for prompts of 1, 16 and
64 MiB of KV cache, the time from the prefiller's answer to the decoder's first token, of requests
one by one; then requests per second, 8 at once. NIXL must be installed: `pip install nixl==1.5.1`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
import urllib.request
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness.pair import Pair
from harness.servers import datadist_config, free_port

TOKENS_PER_MIB = 32
SIZES = (1, 16, 64)
ARGUMENTS = ("--block-size", "32", "--no-enable-prefix-caching", "--max-num-batched-tokens", "4096")
WARM_UPS = 3
REQUESTS, AT_ONCE = 64, 8


def nixl_config(policy: str = "recompute", **extra: Any) -> dict[str, Any]:
    """A ``--kv-transfer-config`` of NixlConnector."""
    return {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": extra,
    }


def pair_of(connector: str, directory: Path) -> Pair:
    """A pair that is not started."""
    if connector == "datadist":
        return Pair("wide", directory, arguments=ARGUMENTS, transfer=datadist_config)
    pair = Pair("wide", directory, arguments=ARGUMENTS, transfer=nixl_config)
    for server in (pair.prefill, pair.decode):
        server.set_env("VLLM_NIXL_SIDE_CHANNEL_PORT", str(free_port()))
    return pair


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
    with urllib.request.urlopen(request, timeout=120) as answer:
        answer.readline()
        seconds = time.monotonic() - began
        answer.read()
    return seconds


def per_second(pair: Pair, generator: random.Random) -> float:
    """Requests of 256 to 1024 tokens through the proxy, 16 tokens each."""
    prompts = [_tokens(generator, generator.choice([256, 512, 1024])) for _ in range(REQUESTS)]
    began = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda each: pair.through_proxy([each]), prompts))
    return REQUESTS / (time.monotonic() - began)


def _tokens(generator: random.Random, count: int) -> list[int]:
    return [generator.randrange(300, 1000) for _ in range(count)]


def measure(connector: str, repeats: int, found: dict[tuple[str, str], list[float]]) -> None:
    """One pair of a connector."""
    generator = random.Random(7)
    with tempfile.TemporaryDirectory(prefix="compare-") as name:
        with pair_of(connector, Path(name)) as pair:
            for size in SIZES:
                count = size * TOKENS_PER_MIB
                for repeat in range(WARM_UPS + repeats):
                    seconds = first_token_seconds(pair, _tokens(generator, count))
                    if repeat >= WARM_UPS:
                        found[f"{size} MiB, ms", connector].append(seconds * 1000)
            found["requests per second", connector].append(per_second(pair, generator))
            moved = pair.transferred()
        print(f"{connector}: {moved:.0f} tokens transferred, load {Path('/proc/loadavg').read_text()}",
              end="", flush=True)  # fmt: skip


def main() -> None:
    """Print medians, and the lower and upper quartile, after each pair."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(given.rounds):
        for connector in ("datadist", "nixl"):
            measure(connector, given.repeats, found)
            report(found)


def report(found: dict[tuple[str, str], list[float]]) -> None:
    """Medians and quartiles of what was measured so far."""
    for (what, connector), values in sorted(found.items()):
        low, middle, high = _quartiles(values)
        print(
            f"{what:22} {connector:9} {middle:8.2f}  ({low:.2f} to {high:.2f}, {len(values)} values)"
        )


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


if __name__ == "__main__":
    main()
