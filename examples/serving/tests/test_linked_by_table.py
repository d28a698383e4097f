"""Prefill and decode over engines that the plugin has linked, also while one of them fails."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from pytest_datadist import Cluster, Worker
from serving.decode import Decode
from serving.model import generate
from serving.prefill import Prefill, Prefilled

PROMPT = tuple(range(100, 119))
COUNT = 6


# These run in the workers, with the engine as first argument.


def make_prefill(engine):
    return Prefill(engine)


def make_decode(engine):
    return Decode(engine)


def prefill(_engine, stage, request_id, prompt):
    return stage.prefill(request_id, prompt)


def decode(_engine, stage, request, count):
    return stage.generate(request, count)


def release(_engine, stage, request_id):
    stage.release(request_id)


def free_blocks(_engine, stage):
    return stage.kv.free_blocks


def recomputed(_engine, stage):
    return stage.recomputed


def close(_engine, stage):
    stage.close()


@pytest.fixture
def stages(datadist_pair: Cluster):
    """A prefill and a decode stage, by their workers."""
    prompt, decoder = datadist_pair
    made = {prompt: prompt.keep(make_prefill), decoder: decoder.keep(make_decode)}
    with ExitStack() as stack:
        for worker, stage in made.items():
            stack.callback(_close, worker, stage)
        yield made


def _close(worker: Worker, stage: object) -> None:
    if not worker.faulted:
        worker.run(close, stage)


def request(worker: Worker, stage: object, request_id: int = 1) -> Prefilled:
    found: Prefilled = worker.run(prefill, stage, request_id, PROMPT)
    return found


def test_the_tokens_are_those_of_one_process(datadist_pair, stages):
    prompt, decoder = datadist_pair
    given = request(prompt, stages[prompt])
    assert decoder.run(decode, stages[decoder], given, COUNT) == generate(PROMPT, COUNT)
    assert decoder.run(recomputed, stages[decoder]) == 0


def test_all_blocks_come_back(datadist_pair, stages):
    prompt, decoder = datadist_pair
    before = [worker.run(free_blocks, stages[worker]) for worker in datadist_pair]
    for request_id in range(5):
        given = request(prompt, stages[prompt], request_id)
        decoder.run(decode, stages[decoder], given, COUNT)
        prompt.run(release, stages[prompt], request_id)
    assert [worker.run(free_blocks, stages[worker]) for worker in datadist_pair] == before


def test_many_requests_are_decoded_while_others_are_prefilled(datadist_pair, stages):
    prompt, decoder = datadist_pair
    given = request(prompt, stages[prompt], 0)
    for request_id in range(1, 8):
        running = decoder.start(decode, stages[decoder], given, COUNT)
        given = request(prompt, stages[prompt], request_id)
        assert running.result() == generate(PROMPT, COUNT)
        prompt.run(release, stages[prompt], request_id - 1)


# region faults
@pytest.mark.parametrize("fault", ["kill", "cut"])
def test_a_decoder_goes_on_without_its_prefill(datadist_pair, stages, fault):
    prompt, decoder = datadist_pair
    given = request(prompt, stages[prompt])
    if fault == "kill":
        prompt.kill()
    else:
        datadist_pair.cut(prompt, decoder)
    assert decoder.run(decode, stages[decoder], given, COUNT) == generate(PROMPT, COUNT)


def test_a_stopped_prefill_does_not_stop_its_decoder(datadist_pair, stages):
    prompt, decoder = datadist_pair
    given = request(prompt, stages[prompt])
    prompt.stop()
    assert decoder.run(decode, stages[decoder], given, COUNT) == generate(PROMPT, COUNT)


# endregion
def test_two_prefills_serve_one_decoder(datadist_cluster):
    first, second, decoder = datadist_cluster(3, roles=["PROMPT", "PROMPT", "DECODER"])
    decoding = decoder.keep(make_decode)
    for worker in (first, second):
        stage = worker.keep(make_prefill)
        given = request(worker, stage)
        assert given.cluster_id == worker.cluster_id
        assert decoder.run(decode, decoding, given, COUNT) == generate(PROMPT, COUNT)
        worker.run(close, stage)
    assert decoder.run(recomputed, decoding) == 0
    decoder.run(close, decoding)
