"""Linking without a rank table: one engine listens, the other one links with its address."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection

from datadist import LLMClusterInfo, LLMConfig, LLMDataDist, LLMRole, LLMStatusCode

SECONDS = 60.0
"""How long one waits for the other."""


def configured() -> LLMConfig:
    """What both need."""
    config = LLMConfig()
    config.mem_pool_cfg = '{"memory_size": 16777216}'
    # region both
    config.local_comm_res = ""  # also turns on cache-manager mode and remote access
    # endregion
    return config


def listen(pipe: Connection) -> None:
    """Listen until the other one has unlinked."""
    config = configured()
    # region listener
    config.listen_ip_info = "127.0.0.1:0"  # port 0: a free one
    engine = LLMDataDist(LLMRole.PROMPT, cluster_id=1)
    engine.init(config.generate_options())
    address = engine.listen_address  # ("127.0.0.1", the port): tell it the others
    # endregion
    pipe.send(address)
    assert pipe.poll(SECONDS)
    engine.finalize()


def link(ip: str, port: int) -> None:
    """Link with who listens there."""
    with LLMDataDist(LLMRole.DECODER, 2) as engine:
        engine.init(configured().generate_options())
        # region link
        info = LLMClusterInfo()
        info.remote_cluster_id = 1
        info.append_local_ip_info("127.0.0.1", 0)
        info.append_remote_ip_info("127.0.0.1", port)
        code, codes = engine.link_clusters([info], timeout=5000)  # one status per cluster
        # endregion
        assert (code, codes) == (LLMStatusCode.LLM_SUCCESS, [code]), info.link_error
        assert engine.cluster_at(ip, port) == 1
        # region unlink
        engine.unlink_clusters([info], timeout=5000)
        # endregion


def main() -> None:
    """Start the listener, and link."""
    os.environ.setdefault("DATADIST_JOB", f"guide-{os.getpid()}")
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    listener = context.Process(target=listen, args=(theirs,))
    listener.start()
    theirs.close()
    try:
        assert pipe.poll(SECONDS), "nobody listens"
        link(*pipe.recv())
        pipe.send("done")
    finally:
        pipe.close()
        listener.join()
    assert listener.exitcode == 0


if __name__ == "__main__":
    main()
