"""``make demo-vllm``: a prefiller, a decoder and the proxy; tokens compared with one server's."""

from __future__ import annotations

import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from harness.models import make_model, prompt
from harness.servers import Server, ask, datadist_config, proxy_server, vllm_server

REQUESTS, AT_ONCE = 16, 4


def main() -> None:
    """Exit with 1 where tokens differ, or were not transferred."""
    with tempfile.TemporaryDirectory(prefix="datadist-vllm-") as name, ExitStack() as stack:
        directory = Path(name)
        print("making a small model with random weights", flush=True)
        model = make_model("gqa", directory)
        servers = [
            vllm_server("prefill", model, directory, datadist_config()),
            vllm_server("decode", model, directory, datadist_config()),
            vllm_server("alone", model, directory),
        ]
        print("starting three vLLM servers: one prefills, one decodes, one does all", flush=True)
        for server in servers:
            stack.callback(server.stop)
            server.start()
        for server in servers:
            server.wait_until_ready()
            print(f"  {server.name} is ready at {server.url}", flush=True)
        prefill, decode, alone = servers
        proxy = proxy_server(directory, [prefill], [decode])
        stack.callback(proxy.stop)
        proxy.start()
        proxy.wait_until_ready()
        sys.exit(_compare(proxy, decode, alone))


def _compare(proxy: Server, decode: Server, alone: Server) -> int:
    generator = random.Random(5)
    prompts = [prompt(generator, generator.choice([5, 60, 300])) for _ in range(REQUESTS)]
    texts = []
    for server in (proxy, alone):
        began = time.monotonic()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            texts.append(list(pool.map(lambda each, url=server.url: _text(url, each), prompts)))
        print(f"{REQUESTS} requests to {server.name}: {time.monotonic() - began:.1f} s", flush=True)
    equal = sum(one == other for one, other in zip(*texts, strict=True))
    by_source = "vllm:prompt_tokens_by_source_total"
    moved = decode.metric(by_source, source="external_kv_transfer")
    computed = decode.metric(by_source, source="local_compute")
    mib = decode.metric("vllm:datadist_bytes_total") / 2**20
    print(f"equal answers: {equal} of {REQUESTS}")
    print(
        f"prompt tokens of the decoder: {moved:.0f} transferred ({mib:.1f} MiB), {computed:.0f} computed"
    )
    return 0 if equal == REQUESTS and moved and not computed else 1


def _text(url: str, text: str) -> str:
    answer = ask(url, {"prompt": text, "max_tokens": 16})
    return str(answer["choices"][0]["text"])


if __name__ == "__main__":
    main()
