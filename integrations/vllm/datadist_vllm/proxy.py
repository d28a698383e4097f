"""A small proxy in front of prefill and decode instances: ``python -m datadist_vllm.proxy --help``.

Each request goes to a prefiller with ``max_tokens`` 1, then with its answer's ``kv_transfer_params`` to a
decoder, whose answer is passed on as it comes. Instances are taken in turn; one that cannot be reached is
left out for some seconds. Where no prefiller answers, a decoder computes all, and the log says so.
"""

from __future__ import annotations

import argparse
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from aiohttp import web

log = logging.getLogger("datadist_vllm.proxy")

PATHS = ("/v1/completions", "/v1/chat/completions")
OUT_SECONDS = 5.0
"""How long an instance that could not be reached is left out."""
CONNECT_SECONDS = 5.0
Call = Callable[[str], Awaitable[Any]]


class NoInstance(Exception):
    """No instance of a kind could be reached; the text has the last reason."""


class Fleet:
    """The instances of one kind."""

    def __init__(self, kind: str, urls: list[str]) -> None:
        self.kind = kind
        self._urls = [url.rstrip("/") for url in urls]
        self._next = 0
        self._out: dict[str, float] = {}
        """Until when an instance is left out."""

    async def call(self, call: Call) -> Any:
        """``call`` with the next instance that can be reached. Raises `NoInstance`."""
        reason = "all are left out, since they could not be reached some seconds ago"
        for url in self._turn():
            try:
                return await call(url)
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
                reason = f"{url}: {error}"
                self._out[url] = time.monotonic() + OUT_SECONDS
                log.warning(
                    "%s instance %s is left out for %g s: %s", self.kind, url, OUT_SECONDS, error
                )
        raise NoInstance(f"no {self.kind} instance can be reached: {reason}")

    def _turn(self) -> list[str]:
        self._next += 1
        start = self._next % len(self._urls)
        now = time.monotonic()
        turn = self._urls[start:] + self._urls[:start]
        return [url for url in turn if self._out.get(url, 0.0) <= now]


class Proxy:
    """The handlers."""

    def __init__(self, prefill: list[str], decode: list[str]) -> None:
        self._prefill, self._decode = Fleet("prefill", prefill), Fleet("decode", decode)
        self._session: aiohttp.ClientSession | None = None

    def app(self) -> web.Application:
        """The web application."""
        app = web.Application(client_max_size=64 << 20)
        app.cleanup_ctx.append(self._with_session)
        for path in PATHS:
            app.router.add_post(path, self.generate)
        app.router.add_get("/{path:.*}", self.forward)
        return app

    async def _with_session(self, _app: web.Application) -> Any:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        # An instance ends connections that were idle, perhaps while the next request is on its way.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as self._session:
            yield

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """Anything else is asked of a decoder."""

        async def get(url: str) -> web.Response:
            assert self._session is not None
            async with self._session.get(url + request.path_qs) as answer:
                body = await answer.read()
                return web.Response(
                    status=answer.status, body=body, headers={"Content-Type": _type_of(answer)}
                )

        try:
            response: web.Response = await self._decode.call(get)
        except NoInstance as error:
            return _failure(503, str(error))
        return response

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Prefill, then decode."""
        try:
            body = await request.json()
        except ValueError as error:
            return _failure(400, f"the body is no JSON: {error}")
        if not isinstance(body, dict):
            return _failure(400, "the body is no JSON object")
        headers = {"X-Request-Id": request.headers.get("X-Request-Id") or uuid.uuid4().hex}
        if "Authorization" in request.headers:
            headers["Authorization"] = request.headers["Authorization"]
        params: dict[str, Any] | None = None
        if _one_prompt(body):
            refused, params = await self._prefilled(request.path, body, headers)
            if refused is not None:
                return refused
        return await self._decoded(request, body | {"kv_transfer_params": params}, headers)

    async def _prefilled(
        self, path: str, body: dict[str, Any], headers: dict[str, str]
    ) -> tuple[web.Response | None, dict[str, Any] | None]:
        """An answer that ends the request, or what the decoder needs."""

        async def post(url: str) -> tuple[int, bytes, Any]:
            assert self._session is not None
            asked = self._session.post(url + path, json=_prefill_body(body), headers=headers)
            async with asked as answer:
                data = await answer.read()
                return answer.status, data, await answer.json() if answer.status == 200 else None

        try:
            status, data, value = await self._prefill.call(post)
        except NoInstance as error:
            log.warning("request %s is computed by a decoder: %s", headers["X-Request-Id"], error)
            return None, None
        if 400 <= status < 500:
            return web.Response(status=status, body=data, content_type="application/json"), None
        if status != 200:
            log.warning("request %s is computed by a decoder: the prefiller answered %d: %s",
                        headers["X-Request-Id"], status, data[:500].decode(errors="replace"))  # fmt: skip
            return None, None
        return None, value.get("kv_transfer_params")

    async def _decoded(
        self, request: web.Request, body: dict[str, Any], headers: dict[str, str]
    ) -> web.StreamResponse:
        async def post(url: str) -> web.StreamResponse:
            assert self._session is not None
            async with self._session.post(url + request.path, json=body, headers=headers) as answer:
                response = web.StreamResponse(
                    status=answer.status, headers={"Content-Type": _type_of(answer)}
                )
                await response.prepare(request)
                try:
                    async for chunk in answer.content.iter_any():
                        await response.write(chunk)
                except aiohttp.ClientPayloadError as error:
                    raise ConnectionResetError(f"the decoder {url} ended: {error}") from error
                await response.write_eof()
                return response

        try:
            response: web.StreamResponse = await self._decode.call(post)
        except NoInstance as error:
            return _failure(503, str(error))
        return response


def _one_prompt(body: dict[str, Any]) -> bool:
    """Whether the request has one prompt: the answer to several names the blocks of one only."""
    prompt = body.get("prompt")
    return not (isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int))


def _prefill_body(body: dict[str, Any]) -> dict[str, Any]:
    changed = body | {"stream": False, "max_tokens": 1, "n": 1}
    for name in ("stream_options", "min_tokens", "best_of", "max_completion_tokens"):
        changed.pop(name, None)
    if "max_completion_tokens" in body:
        changed["max_completion_tokens"] = 1
    given = body.get("kv_transfer_params")  # of the last turn, if the client has them
    changed["kv_transfer_params"] = {
        **(given if isinstance(given, dict) else {}),
        "do_remote_decode": True,
        "do_remote_prefill": False,
    }
    return changed


def _type_of(answer: aiohttp.ClientResponse) -> str:
    return str(answer.headers.get("Content-Type", "application/json"))


def _failure(status: int, text: str) -> web.Response:
    return web.json_response({"error": {"message": text, "code": status}}, status=status)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m datadist_vllm.proxy", description=__doc__)
    parser.add_argument(
        "--prefill", action="append", required=True, metavar="URL", help="repeatable"
    )
    parser.add_argument(
        "--decode", action="append", required=True, metavar="URL", help="repeatable"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    web.run_app(Proxy(given.prefill, given.decode).app(), host=given.host, port=given.port)


if __name__ == "__main__":
    main()
