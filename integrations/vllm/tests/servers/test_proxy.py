"""The proxy before instances that end connections; they answer as vLLM does, and are no vLLM."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from datadist_vllm.proxy import Proxy

pytestmark = pytest.mark.quick
Answer = Callable[[asyncio.StreamWriter, dict[str, Any]], Awaitable[None]]
SECONDS = 30
REQUEST = {"model": "m", "prompt": "w1 w2", "max_tokens": 8}


async def _read(reader: asyncio.StreamReader) -> dict[str, Any]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    (length,) = (int(line.split(":")[1]) for line in head.split("\r\n") if "content-length" in line)
    body: dict[str, Any] = json.loads(await reader.readexactly(length))
    return body


async def _whole(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    """An answer, after which the connection stays open."""
    data = json.dumps({"kv_transfer_params": body["kv_transfer_params"], "max": body["max_tokens"]})
    head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length:"
    writer.write(f"{head} {len(data)}\r\n\r\n{data}".encode())
    await writer.drain()


async def _half(writer: asyncio.StreamWriter, _body: dict[str, Any]) -> None:
    """The begin of an answer, and the end of the connection."""
    writer.write(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    )
    await writer.drain()
    writer.close()


def _instance(answer: Answer) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]:
    """An instance for which a connection has been idle too long when its second request comes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(writer, await _read(reader))
            await reader.read(1)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    return serve


async def _ask(prefill: Answer, decode: Answer, requests: int) -> list[tuple[int, str]]:
    async with (
        await asyncio.start_server(_instance(prefill), "127.0.0.1", 0) as one,
        await asyncio.start_server(_instance(decode), "127.0.0.1", 0) as two,
    ):
        urls = [f"http://127.0.0.1:{each.sockets[0].getsockname()[1]}" for each in (one, two)]
        async with TestClient(TestServer(Proxy(urls[:1], urls[1:]).app())) as client:
            said = []
            for _ in range(requests):
                async with client.post("/v1/completions", json=REQUEST) as answer:
                    said.append((answer.status, await answer.text()))
            return said


def _all(prefill: Answer, decode: Answer, requests: int) -> list[tuple[int, str]]:
    return asyncio.run(asyncio.wait_for(_ask(prefill, decode, requests), SECONDS))


def test_connections_that_an_instance_ends_are_not_used_again() -> None:
    said = _all(_whole, _whole, 3)
    assert [status for status, _ in said] == [200] * 3, said
    assert all(json.loads(text)["max"] == 8 for _, text in said)


def test_a_decoder_computes_where_a_prefiller_ends_in_its_answer() -> None:
    ((status, text),) = _all(_half, _whole, 1)
    assert status == 200, text
    assert json.loads(text) == {"kv_transfer_params": None, "max": 8}
