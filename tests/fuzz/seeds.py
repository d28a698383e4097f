"""Good inputs to begin with: the fuzzer changes them."""

from __future__ import annotations

import json

from datadist.control import messages
from datadist.control.channel import GREETING
from tests.fuzz.dispatch import OPERATIONS
from tests.fuzz.templates import FRAMES, KINDS, TOKEN
from tests.nodes import table_for


def program(*steps: str | bytes) -> bytes:
    """Steps of :mod:`tests.fuzz.dispatch`: an operation or a kind of message, with the peer's number."""
    names = [operation.__name__ for operation in OPERATIONS]
    made = b""
    for step in steps:
        if isinstance(step, bytes):
            made += step
            continue
        name, _, peer = step.partition(" ")
        actor = 16 * int(peer or 0)
        if name in KINDS:
            made += bytes([names.index("say") + actor, KINDS.index(name)])
        else:
            made += bytes([names.index(name) + actor])
    return made


def _programs() -> list[bytes]:
    """Sequences that lead into every state: linked in each of the ways, serving, unlinking."""
    built = ["offer", "ready", "attached", "settle"]
    used: list[str | bytes] = [
        "directory",
        "pull",
        b"\0",
        "sync",
        "fetch",
        "verify",
        "consume",
        "ack",
        "settle",
    ]
    formed = ["wait_for_pair", "announce", "settle", *built]
    other = ["wait_for_other", "sync", "settle", "form", *built]
    dialled = ["dial", "settle", *built]
    asked = ["ask", "settle", "form", *built]
    ways = [formed, other, dialled, asked]
    ends = [["left"], ["unlink", "ack"], ["goodbye"], ["hang_up"], ["fail"], ["dissolve"]]
    known = [
        kind for kind in KINDS if kind not in ("hello", "welcome")
    ]  # which can only come first
    intruders = ["ready", "fail", "dissolve", "left", "offer", "attached", "fetch"]
    return [
        program(*(program("say_of_another", bytes([KINDS.index(kind)])) for kind in intruders)),
        *(
            program(*way, "settle", "say_of_another", bytes([KINDS.index("form")]), "settle")
            for way in (["wait_for_other"], ["ask"])
        ),
        *(program(*way, *used, *end) for way in ways for end in ends),
        *(
            program(*way[: 2 + n], "settle", *end)
            for way in ways
            for n in (1, 2)
            for end in ends[3:]
        ),
        program("ask", "settle", "refused", "settle"),
        program("wait_for_pair", "announce", "settle", "mismatch", "withdraw", "settle"),
        program("wait_for_other", "sync", "settle", "mismatch", "settle", "unlink"),
        program(*formed, "come 1", b"\1", "announce 1", "dial 1", *(f"{k} 1" for k in known)),
        program(*formed, *used, "dial", "settle", *built, *used, "left", "unlink"),
        program(*dialled, "dial 1", "settle", "offer 1", "ready 1", "hang_up", "pull 1", b"\0"),
        program(*known),
        program(*dialled, "ask_room", "settle", "notice", "notice", "settle", "left"),
        program("come_silently", "hello", "settle", "sync", "idle", "settle"),
    ]


def _connections() -> list[bytes]:
    """Who dials; a handshake that nobody touches; then messages by number, untouched."""
    hello, welcome = b"\0\0\0", b"\1\0\0"
    others = [bytes([2, number, 0]) for number in range(len(KINDS))]
    listened, dialled = b"\0\0\0", b"\1\0\0"
    return [
        listened,
        dialled,
        *(listened + hello + welcome + other + others[0] for other in others),
        *(dialled + hello + other + others[0] for other in others),
        listened + hello + hello,
        listened + welcome,
        dialled + welcome,
        # A lost frame that comes in a later one's place.
        bytes.fromhex("0141000000010002d9000210a600d0"),
    ]


UNTOUCHED = b"\0" + b"\0\x3f" * 4
"""A handshake of two ends with the key; frames may follow."""


def _strangers() -> list[bytes]:
    """What those without the key say: bytes, what they have heard, echoes, and wrong proofs."""
    return [
        b"\3\0" + b"\0\x50" + GREETING + bytes(64),
        b"\3\1" + b"\0\x50" + GREETING + bytes(64),
        *(bytes([3, side]) + bytes([2, 0, 0, 0] * 4) for side in (0, 1)),
        *(
            bytes([3, side]) + bytes([1, n, 0, 0, 0, 1, n + 2, 0, 0, 0])
            for side in (0, 1)
            for n in (0, 1, 2)
        ),
        *(bytes([3, side]) + bytes([1, 5, 0, 0, 0, 3, 0, 0, 3, 0, 0]) for side in (0, 1)),
    ]


def _offers() -> list[bytes]:
    region = {"id": 1, "address": 4096, "size": 4096, "fd": 0}
    foreign = {"id": 2, "address": 1 << 40, "size": 64, "fd": None}
    offers = [
        (1, {"version": 1, "writable": False, "regions": [region, foreign], "fence": None}),
        (2, {"version": 1, "writable": True, "regions": [region], "fence": 1}),
    ]
    return [bytes([count]) + json.dumps(offer).encode() for count, offer in offers]


def _hccl_offers() -> list[bytes]:
    regions = [
        {"address": 1 << 21, "size": 1 << 21, "placement": 1},
        {"address": 1 << 40, "size": 64, "placement": 0},
    ]
    resource = {"version": "1.0", "server_id": "one", "device_id": 0, "device_ip": "10.1.0.1"}
    return [
        json.dumps({"version": 1, "writable": False, "regions": regions}).encode(),
        json.dumps(
            {"version": 1, "writable": True, "regions": regions[:1], "resource": resource}
        ).encode(),
        json.dumps({"version": 1, "writable": True, "regions": []}).encode(),
    ]


def _rdma_offers() -> list[bytes]:
    regions = [
        {"address": 4096, "size": 4096, "key": 7},
        {"address": 1 << 40, "size": 64, "key": 8},
    ]
    pairs = [{"number": 17, "psn": 1}, {"number": 18, "psn": 2}]
    end = {"version": 2, "gid": "0" * 20 + "ffff0a000001", "mtu": 3, "reads": 16}
    return [
        json.dumps({**end, "queue_pairs": pairs, "writable": False, "regions": regions}).encode(),
        json.dumps(
            {**end, "queue_pairs": pairs[:1], "writable": True, "regions": regions[:1]}
        ).encode(),
    ]


def _introductions() -> list[bytes]:
    said = {
        "wire": messages.WIRE_VERSION, "job": "", "incarnation": TOKEN, "cluster_id": 1, "link": 1,
        "backend": "hccl", "one_sided": False, "domain_key": TOKEN, "attempt": TOKEN,
        "endpoints": ["10.0.0.1:26000"],
    }  # fmt: skip
    return [json.dumps(said).encode(), json.dumps({**said, "endpoints": []}).encode()]


def _options() -> list[bytes]:
    values = {
        "llm.SyncKvCacheWaitTime": "1000",
        "llm.listenIpInfo": "127.0.0.1:26000",
        "llm.LinkTotalTime": "10",
        "llm.LinkRetryCount": "1",
        "llm.RdmaTrafficClass": "132",
        "llm.RdmaServiceLevel": "4",
        "llm.TransferBackend": "shm",
        "llm.EnableRemoteCacheAccessible": "1",
        "ge.exec.deviceId": "0",
        "ge.flowGraphMemMaxSize": "1",
        "llm.LocalCommRes": "{}",
        "datadist.shm.populate": "0",
        "datadist.checksum": "1",
        "datadist.check_types": "1",
        "llm.MemPoolConfig": '{"memory_size": 1048576}',
    }
    lines = [f"{key}={value}".encode() for key, value in values.items()]
    return [*lines, b"\n".join(lines), json.dumps(values).encode()]


SEEDS = {
    "message": [frame[4:] for frame in FRAMES],
    "frames": [b"".join(FRAMES), *FRAMES],
    "rank_table": [
        table_for({1: 0, 2: 1}).encode(),
        json.dumps(
            {
                "version": "1.2",
                "status": "completed",
                "server_count": "1",
                "server_list": [
                    {
                        "server_id": "10.0.0.1",
                        "host_ip": "10.0.0.1",
                        "device": [
                            {
                                "device_id": "0",
                                "super_device_id": "0",
                                "device_ip": "10.1.0.1",
                                "rank_id": "0",
                            }
                        ],
                    }
                ],
                "super_pod_list": [
                    {"super_pod_id": "0", "server_list": [{"server_id": "10.0.0.1"}]}
                ],
            }
        ).encode(),
    ],
    "options": _options(),
    "pool_config": [b'{"memory_size": 1048576}', b'{"memory_size": 1073741824, "page_shift": 16}'],
    "shm_offer": _offers(),
    "rdma_offer": _rdma_offers(),
    "hccl_offer": _hccl_offers(),
    "member_record": _introductions(),
    "handshake": [
        b"\0",
        bytes(40),
        bytes([1, *range(64)] + [127] * 64),
        bytes([0, 0, 47, 0, 47, 0, 31]),
    ],
    "network": _connections(),
    "dispatch": _programs(),
}

REFUSED = {
    "handshake": [
        *_strangers(),
        *(
            UNTOUCHED + bytes([0, how, 0, 1, 1, 1]) for how in range(128, 136)
        ),  # the second frame is not
    ],
    "network": [bytes([6 + side]) + said[2:] for side in (0, 1) for said in _strangers()],
    "dispatch": [
        program("come_silently", "sync", "settle", "come", b"\0", "welcome", "settle"),
        program("wait_for_pair", "announce", "settle", "babble", b"\x08nonsense"),
        program("hello", "settle"),
        program("dial", "settle", "offer", "ready", "attached", "settle", "notice", "settle"),
        *(program("come_silently", kind, "settle") for kind in KINDS if kind != "hello"),
    ],
}
"""Good inputs, too, which lead to what must be refused."""
