"""What a hostile member does, one thing after another: each is a step, done again until told to stop.

A step raises :class:`~tests.hostile.member.Ended` when the engine ends the connection; then the member
comes again and goes on.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from datadist.control.messages import MAX_FDS, MAX_FRAME, MAX_SECONDS
from tests.fuzz.templates import TEMPLATES
from tests.hostile.member import Member
from tests.in_process_engine import entry_of
from tests.raw_peer import HEADER, memory

Step = Callable[[Member], Iterator[None]]
"""A generator: what lies between two yields is one step."""
LINGER = struct.pack("ii", 1, 60)
LARGEST = (1 << 64) - 1
NOT_AGAIN = ("hello", "welcome", "goodbye", "idle", "form")
"""What ends the session, or the link, of who says it as a member."""


def _templates(member: Member) -> list[dict[str, Any]]:
    found = [dict(each) for each in TEMPLATES if each["kind"] not in NOT_AGAIN]
    for each in found:
        if "domain" in each and each["kind"] in ("fetch", "attached", "ready"):
            each["domain"] = member.token
    return found


def every_kind(member: Member) -> Iterator[None]:
    """Every kind of message, valid, as fast as possible."""
    bodies = [json.dumps(each).encode() for each in _templates(member)]
    while True:
        for body in bodies:
            member.body(body)
            member.read()
            yield


def _flood(*messages: dict[str, Any]) -> Step:
    def step(member: Member) -> Iterator[None]:
        bodies = [json.dumps(each).encode() for each in messages]
        while True:
            for body in bodies * 64:
                member.body(body)
            member.read()
            yield

    return step


def _with(kind: str, **changes: Any) -> dict[str, Any]:
    return {**next(each for each in TEMPLATES if each["kind"] == kind), **changes}


def not_valid(member: Member) -> Iterator[None]:
    """Small frames that are no message."""
    for body in itertools.cycle((b"{}", b"[]", b'{"kind":"ack"}', b"\xff", b'{"kind":"nothing"}')):
        member.body(body)
        yield


def large_not_valid(member: Member) -> Iterator[None]:
    """Frames of the largest size that are no message."""
    body = b'{"kind":"directory","seq":1,"upsert":[%b]}' % b",".join([b"[]"] * 5_000_000)
    while True:
        member.body(body)
        yield


def large_directory(member: Member) -> Iterator[None]:
    """Directories of the largest size: the same caches in each."""
    entries = [entry_of(cache_id=number) for number in range(40_000)]
    body = json.dumps({"kind": "directory", "seq": 1, "upsert": entries}).encode()
    assert len(body) < MAX_FRAME
    while True:
        member.body(body)
        member.read()
        yield


def caches_and_keys(member: Member) -> Iterator[None]:
    """More and more caches, each with keys."""
    for first in itertools.count(1, 500):
        bindings = [
            {"id": n, "slot": 0, "space": "request", "key": first * 100 + n, "model": 0}
            for n in range(20)
        ]
        upsert = [entry_of(cache_id=first + n, bindings=bindings) for n in range(500)]
        member.say({"kind": "directory", "seq": first, "upsert": upsert})
        member.read()
        yield


def lying_offers(member: Member) -> Iterator[None]:
    """Offers whose memory is not what they say, for links that are being made."""
    while True:
        member.say(_with("dial", backend=member.target.backend, seconds=30.0))
        member.say({"kind": "offer", "domain": member.token, "data": "e30=", "fds": 0,
                    "regions": []})  # fmt: skip
        member.say({"kind": "ready", "domain": member.token})
        member.read()
        yield


def lies(member: Member) -> Iterator[None]:
    """Directories, acknowledgements and pulls of what there is not."""
    entry = entry_of(bases=[0, (1 << 62)], tensor_size=1 << 40, stride=1 << 39, count=2)
    while True:
        member.say({"kind": "directory", "seq": LARGEST, "reset": True, "upsert": [entry]})
        member.say({"kind": "ack", "seq": LARGEST})
        for number in range(50):
            member.say({"kind": "consume", "cache_id": number, "binding": number, "start": 0,
                        "stop": LARGEST})  # fmt: skip
        member.read()
        yield


def never_reads(member: Member) -> Iterator[None]:
    """Questions without end, whose answers it does not read."""
    body = json.dumps({"kind": "sync", "id": 1}).encode()
    while True:
        member.body(body)
        yield


def half_open(member: Member) -> Iterator[None]:
    """Neither says nor reads anything any more."""
    while True:
        time.sleep(0.05)
        yield


def within_a_frame(member: Member) -> Iterator[None]:
    """Stops in the middle of a frame of the largest size."""
    member.raw(HEADER.pack(MAX_FRAME) + bytes(1 << 20))
    while True:
        time.sleep(0.05)
        yield


def byte_by_byte(member: Member) -> Iterator[None]:
    """A frame of the largest size, one byte at a time."""
    member.raw(HEADER.pack(MAX_FRAME))
    while True:
        member.raw(b" ")
        yield


def descriptors(member: Member) -> Iterator[None]:
    """Pipes, sockets that linger with unsent data, and memory, named by a message and not named."""
    if member.target.port:
        raise NotImplementedError("descriptors do not leave the host")
    while True:
        with ExitStack() as stack:
            fds = _odd_descriptors(stack)
            offer = json.dumps(
                {"kind": "offer", "domain": member.token, "data": "e30=", "fds": len(fds),
                 "regions": []}
            ).encode()  # fmt: skip
            for _ in range(16):
                member.raw(HEADER.pack(len(offer)) + offer, fds)
            member.raw(b"", fds[:1])
            member.raw(HEADER.pack(2) + b" ", fds)
        member.read()
        yield


def _odd_descriptors(stack: ExitStack) -> list[int]:
    fds: list[int] = []
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    for _ in range(4):
        sock = stack.enter_context(socket.create_connection(listener.getsockname()))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while sock.send(bytes(1 << 16)):
                pass
        fds.append(sock.fileno())
    made = [*os.pipe(), memory(4096), memory(4096, sealed=False)]
    for fd in made:
        stack.callback(os.close, fd)
    return (fds + made)[:MAX_FDS]


def absurd_numbers(member: Member) -> Iterator[None]:
    """Requests that want weeks, and links, slots and pulls with the largest of numbers."""
    while True:
        member.say(_with("fetch", domain=member.token, seconds=MAX_SECONDS))
        member.say(_with("verify", seconds=MAX_SECONDS))
        member.say(_with("announce", link=LARGEST, name="x" * 4096))
        member.say(_with("withdraw", link=LARGEST))
        member.say({"kind": "synced", "id": LARGEST})
        member.read()
        yield


def comes_again(member: Member) -> Iterator[None]:
    """Connects, says hello and hangs up, as fast as possible, each time as another one."""
    number = int(time.monotonic() * 1e6)
    while True:
        number += 1
        with contextlib.suppress(OSError, ValueError):  # it takes no more, or has ended
            Member(member.target, number).close()
        yield


BEHAVIOURS: dict[str, Step] = {
    "every kind": every_kind,
    "flood of acks": _flood({"kind": "ack", "seq": 0}),
    "flood of syncs": _flood({"kind": "sync", "id": 1}),
    "flood of announces": _flood(*(_with("announce", link=n, name=f"n{n}") for n in range(1, 50))),
    "flood of verifies": _flood(_with("verify")),
    "not valid": not_valid,
    "large, not valid": large_not_valid,
    "large directories": large_directory,
    "caches and keys": caches_and_keys,
    "lying offers": lying_offers,
    "lies": lies,
    "never reads": never_reads,
    "half-open": half_open,
    "within a frame": within_a_frame,
    "byte by byte": byte_by_byte,
    "descriptors": descriptors,
    "absurd numbers": absurd_numbers,
    "comes again": comes_again,
}
