"""A good message of every kind."""

from __future__ import annotations

import json
from typing import Any

from datadist.control import messages
from tests.nodes import table_for

TOKEN = "0123456789abcdef" * 2


def _messages() -> list[bytes]:
    binding = messages.Binding(id=1, slot=0, space="request", key=5, model=0)
    entry = messages.Entry(
        cache_id=1, blocks=False, bases=[4096, 8192], stride=64, count=2, tensor_size=128,
        data_type=1, placement=1, pooled=True, accessible=False, regions=[1], bindings=[binding],
        tensors_per_layer=1, cuts=[4104],
    )  # fmt: skip
    member = messages.Member(rank=0, cluster_id=1, incarnation=TOKEN, link=1)
    made: list[messages.Message] = [
        messages.Hello(wire=messages.WIRE_VERSION, incarnation=TOKEN, cluster_id=1),
        messages.Welcome(),
        messages.Announce(
            link=1, name="pair", ranks=[(1, 0), (2, 1)], table=table_for({1: 0, 2: 1}),
            backend="shm", one_sided=False,
        ),
        messages.Withdraw(link=1),
        messages.Mismatch(link=1, reason="why"),
        messages.Form(domain=TOKEN, members=[member, member]),
        messages.Dissolve(domain=TOKEN, reason="why"),
        messages.Fail(domain=TOKEN, reason="why"),
        messages.OfferMessage(domain=TOKEN, data=b"{}", fds=0, regions=[1]),
        messages.Attached(domain=TOKEN),
        messages.Ready(domain=TOKEN, metadata=b"told"),
        messages.Left(domain=TOKEN, seq=1),
        messages.Dial(link=1, backend="shm", one_sided=False, seconds=1.0),
        messages.Refused(link=1, status=1, reason="why"),
        messages.Duplicate(what="refused", other="pid 1"),
        messages.Directory(seq=1, upsert=[entry], remove=[2], unbind=[(1, 1)]),
        messages.Ack(seq=1),
        messages.Sync(id=1),
        messages.Synced(id=1),
        messages.Consume(cache_id=1, binding=1, start=0, stop=2),
        messages.Fetch(
            id=1, domain=TOKEN, source=b"8" * 8, target=b"9" * 8, length=b"\1" + b"\0" * 7,
            data_type=1, same_type=False, strides=[64], seconds=1.0,
        ),
        messages.Fetched(id=1, status=0, reason=""),
        messages.Verify(id=1, address=b"8" * 8, length=b"\1" * 8, seconds=1.0),
        messages.Verified(id=1, status=0, reason="", crc=7),
        messages.AskGrant(id=1, space="request", key=1, model=0),
        messages.CheckGrant(id=1, generation=2),
        messages.GrantAnswer(id=1, live=True, token=b"ddg1" * 30),
        messages.ReleaseGrants(generations=[2], keys=[("request", 1, 0)]),
        messages.AskRoom(used=0),
        messages.Room(limit=64),
        messages.Idle(),
        messages.Goodbye(),
    ]  # fmt: skip
    return [messages.encode(message) for message in made]


FRAMES = _messages()
TEMPLATES: list[dict[str, Any]] = [json.loads(frame[4:]) for frame in FRAMES]
"""As objects of JSON."""
FRAMES.append(messages.encode(messages.Notice(data=b"to the program")))
NOTICE: dict[str, Any] = {"kind": "notice", "data": "to the program"}
"""The one message that is no JSON; the text stands for its bytes."""
KINDS = [template["kind"] for template in (*TEMPLATES, NOTICE)]
