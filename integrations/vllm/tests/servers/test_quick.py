"""What says most in the shortest time: one pair, one restart. For CI: `make test-vllm ARGS=-mquick`."""

from __future__ import annotations

import random
import time

import pytest
from harness.models import prompt
from harness.pair import Pair

pytestmark = pytest.mark.quick


def test_tokens_and_a_restart(pair: Pair) -> None:
    generator = random.Random(21)
    prompts = [prompt(generator, generator.choice([3, 60, 300, 600])) for _ in range(24)]
    got = pair.through_proxy(prompts, at_once=8)
    assert pair.transferred() > 0
    assert pair.computed() == 0
    pair.wait_until_free()
    assert got == pair.alone(prompts)

    params = pair.prefilled(prompts[0])
    pair.prefill.kill()
    answer = pair.decoded(prompts[0], params)
    assert answer["choices"][0]["text"] == got[0]
    pair.prefill.start()
    pair.prefill.wait_until_ready()
    time.sleep(5)  # the proxy leaves out for so long what it could not reach

    prompts = [prompt(generator, 200) for _ in range(8)]
    before = pair.transferred()
    got = pair.through_proxy(prompts, at_once=4)
    assert pair.transferred() > before
    pair.wait_until_free()
    assert got == pair.alone(prompts)
