"""A prefiller, a decoder and a proxy, and what tests ask of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from harness.models import make_model
from harness.servers import HERE, Place, ask, datadist_config, proxy_server, vllm_server

MODELS = Path(os.environ.get("DATADIST_VLLM_MODELS", "/tmp/datadist-vllm-models"))
SOURCES = "vllm:prompt_tokens_by_source_total"
HITS = "vllm:prefix_cache_hits_total"
WAIT_SECONDS = 60
LEASE_SECONDS = 8.0
"""Long enough for a request on a busy machine, short enough to wait for its end."""
QUICK: dict[str, Any] = {"lease_seconds": LEASE_SECONDS, "pull_seconds": 5.0, "link_seconds": 5.0}
Prompt = str | list[int]
Transfer = Callable[..., dict[str, Any]]


class Pair:
    """A context manager: starts all, stops all."""

    def __init__(
        self,
        kind: str,
        directory: Path,
        extra: Mapping[str, Any] | None = None,
        decode_extra: Mapping[str, Any] | None = None,
        arguments: tuple[str, ...] = (),
        prefill_arguments: tuple[str, ...] = (),
        decode_arguments: tuple[str, ...] = (),
        transfer: Transfer = datadist_config,
        policy: str = "recompute",
        cache_gib: int = 1,
        env: Mapping[str, str] | None = None,
        places: tuple[Place, Place] = (HERE, HERE),
    ) -> None:
        model = make_model(kind, MODELS)
        first = dict(extra or {})
        second = first | dict(decode_extra or {})
        self.prefill, self.decode = (
            vllm_server(
                name, model, directory,
                transfer(policy=policy, **settings, **place.settings),
                (*arguments, *own), dict(env or {}), cache_gib, place,
            )
            for name, own, settings, place in (
                ("prefill", prefill_arguments, first, places[0]),
                ("decode", decode_arguments, second, places[1]),
            )
        )  # fmt: skip
        self.proxy = proxy_server(directory, [self.prefill], [self.decode])
        self._stack = ExitStack()

    def __enter__(self) -> Pair:
        try:
            for server in (self.prefill, self.decode, self.proxy):
                self._stack.callback(server.stop)
                server.start()
            for server in (self.prefill, self.decode, self.proxy):
                server.wait_until_ready()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    # -- requests ------------------------------------------------------------------------------

    def through_proxy(self, prompts: Sequence[Prompt], at_once: int = 1, **more: Any) -> list[str]:
        """The answers to prompts that are prefilled by one and decoded by the other."""
        return _texts(self.proxy.url, prompts, at_once, more)

    def alone(self, prompts: Sequence[Prompt], at_once: int = 4, **more: Any) -> list[str]:
        """What the prefiller answers by itself: the reference."""
        return _texts(self.prefill.url, prompts, at_once, more)

    def prefilled(self, prompt: Prompt) -> dict[str, Any]:
        """The ``kv_transfer_params`` of the prefiller's answer."""
        asked = {"do_remote_decode": True, "do_remote_prefill": False}
        answer = ask(
            self.prefill.url, {"prompt": prompt, "max_tokens": 1, "kv_transfer_params": asked}
        )
        params: dict[str, Any] = answer["kv_transfer_params"]
        return params

    def decoded(self, prompt: Prompt, params: dict[str, Any], **more: Any) -> dict[str, Any]:
        """The decoder's answer."""
        return ask(
            self.decode.url,
            {"prompt": prompt, "max_tokens": 16, "kv_transfer_params": params, **more},
        )

    # -- what has happened ---------------------------------------------------------------------

    def transferred(self) -> float:
        """Prompt tokens that came to the decoder by transfer."""
        return self.decode.metric(SOURCES, source="external_kv_transfer")

    def computed(self) -> float:
        """Prompt tokens that the decoder computed."""
        return self.decode.metric(SOURCES, source="local_compute")

    def wait_until_free(self) -> None:
        """Until no block of either cache is held. Raises ``AssertionError``."""
        until = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < until:
            held = [each.metric("vllm:kv_cache_usage_perc") for each in (self.prefill, self.decode)]
            if not any(held):
                return
            time.sleep(0.2)
            # The gauge is set by steps: a small request makes some.
            for each in (self.prefill, self.decode):
                ask(each.url, {"prompt": "w1", "max_tokens": 1})
        raise AssertionError(f"blocks are held: {held} of the caches")


def _texts(url: str, prompts: Sequence[Prompt], at_once: int, more: dict[str, Any]) -> list[str]:
    def text(prompt: Prompt) -> str:
        answer = ask(url, {"prompt": prompt, "max_tokens": 16, **more})
        return str(answer["choices"][0]["text"]) if "choices" in answer else f"error: {answer}"

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(text, prompts))
