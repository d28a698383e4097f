"""The scheduler half alone: what it tells the workers, step by step."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from datadist_vllm.groups import Group, Groups
from datadist_vllm.messages import StepMetadata
from datadist_vllm.parameters import RankAddress
from datadist_vllm.scheduler import SchedulerHalf
from datadist_vllm.settings import Settings
from vllm.v1.request import RequestStatus

pytestmark = pytest.mark.quick
RANKS = [RankAddress(5, "127.0.0.1", 4711)]
BLOCK = 4
FULL, WINDOW = Group("full", BLOCK, None), Group("window", BLOCK, 6)


def _half(*groups: Group, **settings: Any) -> SchedulerHalf:
    half = SchedulerHalf("engine", Groups(groups or (FULL,)), Settings(**settings))
    half.set_ranks(RANKS)
    return half


def _request(name: str, tokens: list[int], params: dict[str, Any] | None) -> Any:
    return SimpleNamespace(
        request_id=name,
        prompt_token_ids=list(tokens),
        _all_token_ids=list(tokens),
        all_token_ids=tokens,
        num_prompt_tokens=len(tokens),
        num_tokens=len(tokens) + 1,
        num_computed_tokens=0,
        max_tokens=1,
        kv_transfer_params=params,
        status=RequestStatus.RUNNING,
        get_skip_reading_prefix_cache=lambda: False,
    )


def _step(
    half: SchedulerHalf, blocks: dict[str, Any], preempted: set[str] | None = None, **counts: Any
) -> StepMetadata:
    state = SimpleNamespace(get_block_ids=lambda name: blocks[name])
    return half.build_meta(
        SimpleNamespace(
            preempted_req_ids=preempted, num_scheduled_tokens=counts, kv_connector_block_state=state
        )
    )


def _prefilled(
    half: SchedulerHalf, tokens: list[int], blocks: Any, name: str = "p"
) -> dict[str, Any]:
    """The parameters of a prefiller's answer."""
    request = _request(name, tokens, {"do_remote_decode": True})
    half.on_new_request(request)
    _step(half, {name: blocks}, None, **{name: len(tokens)})
    request.num_computed_tokens = request.num_prompt_tokens
    request.status = RequestStatus.FINISHED_LENGTH_CAPPED
    kept, params = half.finished(request, blocks)
    assert kept
    assert params is not None
    return params


def _block(block_id: int, hashed: bool = False) -> Any:
    return SimpleNamespace(
        block_id=block_id, block_hash=b"h" if hashed else None, is_null=block_id == 0
    )


def test_blocks_are_granted_in_the_step_that_computes_the_last_tokens() -> None:
    half = _half()
    request = _request("p", list(range(10)), {"do_remote_decode": True})
    half.on_new_request(request)
    assert _step(half, {"p": ([1, 2],)}, p=6).grants == []
    request.num_computed_tokens = 6
    (granting,) = _step(half, {"p": ([1, 2, 3],)}, p=4).grants
    assert (granting.request_id, granting.blocks) == ("p", [1, 2, 3])
    assert _step(half, {"p": ([1, 2, 3],)}, p=1).grants == []


def test_a_preempted_request_is_revoked_and_granted_again() -> None:
    half = _half()
    request = _request("p", list(range(4)), {"do_remote_decode": True})
    half.on_new_request(request)
    _step(half, {"p": ([1],)}, p=4)
    assert _step(half, {}, {"p"}).revokes == ["p"]
    assert _step(half, {"p": ([7],)}, p=4).grants[0].blocks == [7]


@pytest.mark.parametrize("status", [RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_IGNORED])
def test_an_aborted_prefill_is_revoked_before_its_blocks_are_used_again(status: Any) -> None:
    half = _half()
    request = _request("p", list(range(4)), {"do_remote_decode": True})
    half.on_new_request(request)
    _step(half, {"p": ([1],)}, p=4)
    request.status = status
    assert half.finished(request, ([1],)) == (False, None)
    assert _step(half, {}).revokes == ["p"]


def test_a_decoder_loads_what_its_prefix_cache_does_not_have() -> None:
    params = _prefilled(_half(), list(range(10)), ([1, 2, 3],))
    half = _half()
    request = _request("d", list(range(10)), params)
    half.on_new_request(request)
    assert half.matched_tokens(request, 4) == (6, True)
    blocks: Any = SimpleNamespace(blocks=([_block(8, True), _block(9), _block(11)],))
    half.after_alloc(request, blocks, 6)
    (load,) = _step(half, {}).loads
    assert (load.positions, load.blocks, load.tokens) == ([1, 2], [9, 11], 6)
    half.after_alloc(request, blocks, 0)
    assert _step(half, {}) == StepMetadata()


def test_windows_grant_and_load_the_last_blocks_only() -> None:
    tokens = list(range(21))  # the prefiller computes 20 of them
    own = ([1, 2, 3, 4, 5], [0, 0, 0, 6, 7])
    params = _prefilled(_half(FULL, WINDOW), tokens, own)
    assert params["remote_num_tokens"] == 20
    assert [len(group) for group in params["remote_block_ids"]] == [5, 2]
    half = _half(FULL, WINDOW)
    request = _request("d", tokens, params)
    half.on_new_request(request)
    assert half.matched_tokens(request, 0) == (20, True)
    here: Any = SimpleNamespace(
        blocks=([_block(n) for n in range(11, 17)], [_block(n) for n in (0, 0, 0, 21, 22, 23)])
    )
    half.after_alloc(request, here, 20)
    (load,) = _step(half, {}).loads
    assert (load.positions, load.blocks) == ([0, 1, 2, 3, 4, 5, 6], [11, 12, 13, 14, 15, 21, 22])


def test_a_full_hit_releases_without_reading() -> None:
    params = _prefilled(_half(), list(range(10)), ([1, 2, 3],))
    half = _half()
    request = _request("d", list(range(10)), params)
    half.on_new_request(request)
    assert half.matched_tokens(request, 10) == (0, False)
    half.after_alloc(request, SimpleNamespace(blocks=([],)), 0)
    step = _step(half, {})
    assert (len(step.releases), step.loads) == (1, [])


def test_aborted_before_it_was_scheduled_releases_and_while_it_is_loaded_cancels() -> None:
    source, half = _half(), _half()
    for name in ("early", "late"):
        params = _prefilled(source, list(range(10)), ([1, 2, 3],), name)
        request = _request(name, list(range(10)), params)
        half.on_new_request(request)
        if name == "late":
            half.matched_tokens(request, 0)
            blocks: Any = SimpleNamespace(blocks=([_block(8), _block(9), _block(11)],))
            half.after_alloc(request, blocks, 10)
        request.status = RequestStatus.FINISHED_ABORTED
        half.finished(request, ([],))
    step = _step(half, {})
    assert [each.request_id for each in step.releases] == ["early"]
    assert step.cancels == ["late"]
    half.received({"late"}, {"late"})
    assert half.stats() is None, "tokens that nobody computes again are not counted"


def test_of_several_requests_with_one_grant_one_reads() -> None:
    params = _prefilled(_half(), list(range(10)), ([1, 2, 3],))
    half = _half()
    first, second = (_request(name, list(range(10)), dict(params)) for name in ("1", "2"))
    half.on_new_request(first)
    half.on_new_request(second)
    half.after_alloc(first, SimpleNamespace(blocks=([_block(8), _block(9), _block(11)],)), 10)
    assert half.matched_tokens(second, 0) == (None, False)
    half.received({"1"}, set())
    assert half.matched_tokens(second, 8) == (0, False)


def test_leases_of_requests_that_wait_are_renewed_as_the_prefiller_says() -> None:
    for seconds, again in ((0.1, ["p"]), (3000.0, [])):
        source, half = _half(lease_seconds=seconds), _half()
        params = _prefilled(source, list(range(10)), ([1, 2, 3],))
        half.on_new_request(_request("d", list(range(10)), params))
        assert [each.request_id for each in _step(half, {}).renewals] == ["p"]
        time.sleep(0.04)
        assert [each.request_id for each in _step(half, {}).renewals] == again


def test_another_prompt_is_computed_here() -> None:
    params = _prefilled(_half(), list(range(10)), ([1, 2, 3],))
    half = _half()
    for tokens in ([*range(9), 99], list(range(9))):
        request = _request("d", tokens, dict(params))
        half.on_new_request(request)
        assert half.matched_tokens(request, 0) == (0, False)
    assert len(_step(half, {}).releases) == 2


def test_a_decoder_keeps_its_blocks_for_the_next_turn() -> None:
    params = _prefilled(_half(), list(range(10)), ([1, 2, 3],))
    half = _half(keep_seconds=9.0)
    request = _request("d", list(range(10)), params)
    half.on_new_request(request)
    half.after_alloc(request, SimpleNamespace(blocks=([_block(8), _block(9), _block(11)],)), 10)
    _step(half, {})
    half.received({"d"}, set())
    request.all_token_ids, request.num_tokens = list(range(13)), 13
    request.num_computed_tokens = 13  # one token more than was processed is under way
    request.status = RequestStatus.FINISHED_STOPPED
    kept, answer = half.finished(request, ([8, 9, 11],))
    assert kept
    assert answer is not None
    assert (answer["remote_num_tokens"], answer["do_remote_decode"]) == (12, True)
    step = _step(half, {})
    assert step.grants[0].blocks == [8, 9, 11]
    assert step.finished[0].lease_seconds == 9.0
