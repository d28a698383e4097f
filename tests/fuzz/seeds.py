"""Good inputs to begin with: the fuzzer changes them."""

from __future__ import annotations

import json

from datadist.control import messages
from datadist.control.channel import GREETING
from tests.nodes import table_for

TOKEN = "0123456789abcdef" * 2


def _messages() -> list[bytes]:
    binding = messages.Binding(id=1, slot=0, space="request", key=5, model=0)
    entry = messages.Entry(
        cache_id=1, blocks=False, bases=[4096, 8192], stride=64, count=2, tensor_size=128,
        data_type=1, placement=1, pooled=True, accessible=False, regions=[1], bindings=[binding],
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
        messages.OfferMessage.model_construct(domain=TOKEN, data=b"{}", fds=0, regions=[1]),
        messages.Attached(domain=TOKEN),
        messages.Ready(domain=TOKEN),
        messages.Left(domain=TOKEN, seq=1),
        messages.Dial(link=1, backend="shm", one_sided=False, seconds=1.0),
        messages.Refused(link=1, status=1, reason="why"),
        messages.Duplicate(what="refused", other="pid 1"),
        messages.Directory(seq=1, upsert=[entry], remove=[2], unbind=[(1, 1)]),
        messages.Ack(seq=1),
        messages.Sync(id=1),
        messages.Synced(id=1),
        messages.Consume(cache_id=1, binding=1, start=0, stop=2),
        messages.Fetch.model_construct(
            id=1, domain=TOKEN, source=b"8" * 8, target=b"9" * 8, length=b"\1" + b"\0" * 7,
            data_type=1, same_type=False, seconds=1.0,
        ),
        messages.Fetched(id=1, status=0, reason=""),
        messages.Verify.model_construct(id=1, address=b"8" * 8, length=b"\1" * 8, seconds=1.0),
        messages.Verified(id=1, status=0, reason="", crc=7),
        messages.Idle(),
        messages.Goodbye(),
    ]  # fmt: skip
    return [messages.encode(message) for message in made]


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
        json.dumps({"writable": True, "regions": regions[:1], "resource": resource}).encode(),
        json.dumps({"writable": True, "regions": []}).encode(),
    ]


def _rdma_offers() -> list[bytes]:
    regions = [
        {"address": 4096, "size": 4096, "key": 7},
        {"address": 1 << 40, "size": 64, "key": 8},
    ]
    end = {"queue_pair": 17, "psn": 1, "gid": "0" * 20 + "ffff0a000001", "mtu": 3, "reads": 16}
    return [
        json.dumps({**end, "version": 1, "writable": False, "regions": regions}).encode(),
        json.dumps({**end, "writable": True, "regions": regions[:1]}).encode(),
    ]


def _introductions() -> list[bytes]:
    said = {
        "wire": messages.WIRE_VERSION, "job": "", "incarnation": TOKEN, "cluster_id": 1, "link": 1,
        "backend": "hccl", "one_sided": False, "meaning": TOKEN, "attempt": TOKEN,
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
    "message": [frame[4:] for frame in _messages()],
    "frames": [b"".join(_messages()), *_messages()],
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
    "introduction": _introductions(),
    "handshake": [GREETING + bytes(32) + bytes(32)],
}
