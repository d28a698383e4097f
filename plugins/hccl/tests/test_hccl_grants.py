"""Grants over the hccl transport: words of generations in memory of the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hccl_sim
import numpy as np
import pytest
from hccl_sim import engines

from datadist import BlocksCacheKey, CacheKey, LLMException
from tests import nodes
from tests.grants import world as grants
from tests.nodes import Here, Node, pattern

Start = Callable[..., Node]
HCCS = {"HCCL_INTRA_ROCE_ENABLE": "0", "HCCL_INTRA_PCIE_ENABLE": "1"}
RDMA = {"HCCL_INTRA_ROCE_ENABLE": "1"}


def _pull(here: Here, blocks: list[int], **options: Any) -> str:
    try:
        here.live.cache_manager.pull_blocks(
            CacheKey(1, 7), here.caches["paged"], (), blocks, **options
        )
    except LLMException as error:
        return error.status_code.name
    return "LLM_SUCCESS"


def _questions(here: Here) -> int:
    """How often the owner was asked whether a grant lives."""
    count: int = here.any.get("questions", 0)
    return count


def _count_questions(here: Here) -> None:
    from datadist.grants.messages import GrantMessages

    kind: Any = GrantMessages
    inner = kind.is_live

    def is_live(*args: Any) -> bool:
        here.any["questions"] = here.any.get("questions", 0) + 1
        return bool(inner(*args))

    kind.is_live = is_live


@pytest.mark.parametrize("environ", [HCCS, RDMA], ids=["hccs", "rdma"])
@pytest.mark.parametrize("one_sided", [False, True])
def test_grants(start_node: Start, environ: dict[str, str], one_sided: bool) -> None:
    owner, reader = start_node(environ), start_node(environ)
    settings = {"enable_remote_cache_accessible": one_sided}
    for cluster, node in ((1, owner), (2, reader)):
        key = BlocksCacheKey(cluster, 0)
        node.do(engines.paged_engine, cluster, "hccl", key, device_id=cluster - 1, **settings)
    table = hccl_sim.table(2, 1)
    for node in (owner, reader):
        node.begin(engines.link, table)
    for node in (owner, reader):
        node.result()
    reader.do(_count_questions)
    token = owner.do(grants.grant, [3, 1], label="paged")
    assert reader.do(_pull, [10, 11]) == "LLM_SUCCESS"
    expected = [pattern(2, tensor, engines.SHAPE) for tensor in range(4)]
    for tensor, array in enumerate(expected):
        array[[10, 11]] = pattern(1, tensor, engines.SHAPE)[[3, 1]]
    np.testing.assert_array_equal(reader.do(engines.contents, "paged"), expected)
    assert owner.do(grants.wait) == "CONSUMED"
    again = owner.do(grants.grant, [3, 1], label="paged")
    owner.do(grants.revoke)
    owner.do(engines.fill, "paged", 9)
    assert {reader.do(_pull, [10, 11], token=each) for each in (None, token, again)} == {
        grants.GONE
    }
    assert reader.do(_questions) == 0  # the words are reached, over every kind of connection
    for node in (owner, reader):
        node.do(nodes.finalize)
