"""The stack makes and links its engines itself; the plugin gives it processes and surroundings."""

from __future__ import annotations

from llm_datadist import LLMRole
from serving.decode import Decode
from serving.engines import cluster_at, link_with, make_engine
from serving.model import generate
from serving.prefill import Prefill

PROMPT = tuple(range(7, 40))
COUNT = 5


class Server:
    """A stage and its engine, in one worker."""

    def __init__(self, role: LLMRole, cluster_id: int, listen: str = "") -> None:
        self.engine = make_engine(role, cluster_id, listen)
        self.stage = (Prefill if role is LLMRole.PROMPT else Decode)(self.engine)


# These run in the workers; without an engine of the plugin they get none.


def serve_prefill():
    return Server(LLMRole.PROMPT, 1, "127.0.0.1:0")


def serve_decode(address):
    server = Server(LLMRole.DECODER, 2)
    link_with(server.engine, [cluster_at(1, address)])
    return server


def address_of(server):
    return server.engine.listen_address


def prefill(server, prompt):
    return server.stage.prefill(1, prompt)


def decode(server, request, count):
    return server.stage.generate(request, count), server.stage.recomputed


def close(server):
    server.stage.close()
    server.engine.finalize()


def test_a_request_goes_through_the_stack(datadist_cluster):
    first, second = datadist_cluster(2, engines=False)
    prefiller = first.keep(serve_prefill)
    decoder = second.keep(serve_decode, first.run(address_of, prefiller))
    request = first.run(prefill, prefiller, PROMPT)
    assert second.run(decode, decoder, request, COUNT) == (generate(PROMPT, COUNT), 0)
    second.run(close, decoder)
    first.run(close, prefiller)


def test_engines_of_one_process(datadist_isolation):
    engine = make_engine(LLMRole.MIX, 3, "127.0.0.1:0")
    assert engine.listen_address[1] != 0
    engine.finalize()
