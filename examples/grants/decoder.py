"""A decoder that reads granted blocks: `python decoder.py LINK_PORT REQUEST_PORT FIRST COUNT`.

It goes on when the prompt engine is restarted: it connects and links again, and asks once more for the
request that it was about. A grant that has ended is no error of the program: the request is asked for
again, too.
"""

import sys
import time
from multiprocessing.connection import Client, Connection

import numpy as np
from prompt import DESC, start

from datadist import CacheKey, LLMClusterInfo, LLMDataDist, LLMException, LLMRole, LLMStatusCode

RETRY = (
    LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,  # the grant has ended: ask for the request again
    LLMStatusCode.LLM_NOT_YET_LINK,  # the prompt engine is gone: link again
    LLMStatusCode.LLM_FAILED,
    LLMStatusCode.LLM_TIMEOUT,
)


class Decoder:
    """An engine that pulls, and a connection to ask for requests."""

    def __init__(self, engine: LLMDataDist, link_port: int, request_port: int) -> None:
        self.engine = engine
        self.manager = engine.cache_manager
        self.cache = self.manager.allocate_blocks_cache(DESC)
        self.request_port = request_port
        self.connection: Connection | None = None
        self.prompt = LLMClusterInfo()
        self.prompt.remote_cluster_id = 1
        self.prompt.append_local_ip_info("127.0.0.1", 0)
        self.prompt.append_remote_ip_info("127.0.0.1", link_port)

    def connect(self) -> Connection:
        """Link, and connect, with whatever prompt engine is there by now; tries for a minute."""
        if self.connection is not None:
            return self.connection
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            code, _ = self.engine.link_clusters([self.prompt], timeout=3000)
            linked = LLMStatusCode.LLM_SUCCESS, LLMStatusCode.LLM_ALREADY_LINK
            try:
                if code in linked:
                    self.connection = Client(("127.0.0.1", self.request_port))
                    return self.connection
            except OSError:  # it does not serve yet
                pass
            time.sleep(0.1)
        raise TimeoutError("there is no prompt engine")

    def read(self, request: int) -> None:
        """Have a request computed, and pull its blocks; again until that has gone well."""
        while True:
            try:
                connection = self.connect()
                connection.send((request, 1 + request % 4))
                length, token = connection.recv()
                target = list(range(length))
                self.manager.pull_blocks(
                    CacheKey(1, request), self.cache, dst_blocks=target, token=token
                )
                return
            except LLMException as error:
                if error.status_code not in RETRY:
                    raise
                print(f"request {request} again: {error}", flush=True)
            except (EOFError, OSError) as error:
                print(f"request {request} again: the prompt engine is gone ({error})", flush=True)
            self.drop()

    def drop(self) -> None:
        """Begin anew with the prompt engine."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def check(self, request: int) -> None:
        """What was read is what the prompt engine computed for this request."""
        for layer, tensor in enumerate(self.cache.numpy()):
            expected = np.float16(request % 1000 + layer)
            if not (tensor[: 1 + request % 4] == expected).all():
                raise SystemExit(f"request {request}: wrong bytes in tensor {layer}")


def main(link_port: int, request_port: int, first: int, count: int) -> None:
    """Read ``count`` requests."""
    with start(2, LLMRole.DECODER, None) as engine:
        decoder = Decoder(engine, link_port, request_port)
        for request in range(first, first + count):
            decoder.read(request)
            decoder.check(request)
            print(f"request {request} is right", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]))
