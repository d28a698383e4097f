"""A prompt engine that grants the blocks of each request: `python prompt.py LINK_PORT REQUEST_PORT`.

A decoder asks for a request over a connection of the application, and gets its length and token. The
blocks are free again when the grant has ended, however it did. Ends with SIGTERM.
"""

import select
import signal
import sys
from multiprocessing.connection import Connection, Listener, wait

import numpy as np

from datadist import CacheDesc, CacheKey, DataType, LLMConfig, LLMDataDist, LLMRole

BLOCKS, LAYERS = 64, 4
DESC = CacheDesc(2 * LAYERS, [BLOCKS, 16, 8], DataType.DT_FLOAT16)  # K and V of each layer


def start(cluster: int, role: LLMRole, listen: str | None) -> LLMDataDist:
    """An engine that links by address."""
    config = LLMConfig()
    config.local_comm_res = ""  # links by address; also turns on cache-manager mode
    config.mem_pool_cfg = '{"memory_size": 16777216}'
    if listen:
        config.listen_ip_info = listen
    engine = LLMDataDist(role, cluster)
    engine.init(config.generate_options())
    return engine


class Prompt:
    """The blocks of one cache, and the requests that have them."""

    def __init__(self, engine: LLMDataDist) -> None:
        self.manager = engine.cache_manager
        self.cache = self.manager.allocate_blocks_cache(DESC)
        self.tensors = self.cache.numpy()
        self.free = list(range(BLOCKS))

    def prefill(self, request: int, length: int) -> bytes:
        """Compute a request's blocks and grant them to one decoder for 10 s; the token."""
        while len(self.free) < length:  # leases end: there are blocks within 10 s
            self.take_back(wait_millis=10_000)
        blocks = [self.free.pop() for _ in range(length)]
        for layer, tensor in enumerate(self.tensors):  # stands for the model
            tensor[blocks] = np.float16(request % 1000 + layer)
        key = CacheKey(1, request)
        return self.manager.grant_blocks(self.cache, key, blocks, lease_millis=10_000).token

    def take_back(self, wait_millis: int = 0) -> None:
        """Reuse the blocks of grants that were consumed, have lapsed, or whose decoder is lost."""
        select.select([self.manager.ended_grants_fileno()], [], [], wait_millis / 1000)
        for grant in self.manager.ended_grants():
            print(f"request {grant.key.req_id}: {grant.state.name}", flush=True)
            self.free += grant.blocks


def serve(prompt: Prompt, port: int) -> None:
    """Answer decoders, and take blocks back, until SIGTERM."""
    with Listener(("127.0.0.1", port)) as listener:
        ends = prompt.manager.ended_grants_fileno()
        connections: list[Connection] = []
        print("ready", flush=True)
        while True:
            socket = listener._listener._socket  # type: ignore[attr-defined]
            for ready in wait([socket, ends, *connections]):
                if ready is socket:
                    connections.append(listener.accept())
                elif ready == ends:
                    prompt.take_back()
                else:
                    assert isinstance(ready, Connection)
                    answer(prompt, connections, ready)


def answer(prompt: Prompt, connections: list[Connection], connection: Connection) -> None:
    """One request of a decoder."""
    try:
        request, length = connection.recv()
        connection.send((length, prompt.prefill(request, length)))
    except (EOFError, OSError):  # the decoder has gone
        connections.remove(connection)
        connection.close()


def stop(*_: object) -> None:
    """Leave the blocks of `with`, which finalize the engine: its grants end."""
    raise SystemExit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    with start(1, LLMRole.PROMPT, f"127.0.0.1:{sys.argv[1]}") as engine:
        serve(Prompt(engine), int(sys.argv[2]))
