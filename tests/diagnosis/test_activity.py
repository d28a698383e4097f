"""Rates between two looks (activity.py)."""

from __future__ import annotations

from typing import Any

import pytest

from datadist.diagnosis.activity import Activity, Look, activities
from datadist.diagnosis.asking import Asked


def _tally(operations: int = 0, nbytes: int = 0, errors: int = 0, seconds: float = 0.0) -> Any:
    return {"operations": operations, "bytes": nbytes, "errors": errors, "seconds": seconds}


def _link(peer: int, pull: Any = None, push: Any = None, **changes: Any) -> dict[str, Any]:
    link = {
        "comm_id": 1, "name": "kv", "cluster_id": peer, "rank": 0, "status": "OK", "backend": "shm",
        "error": None, "pull": pull or _tally(), "push": push or _tally(),
    }  # fmt: skip
    return {**link, **changes}


def _asked(cluster: int, at: float, *links: dict[str, Any], job: str = "", **changes: Any) -> Asked:
    totals = {way: _sum([link[way] for link in links]) for way in ("pull", "push")}
    report = {
        "program": f"program {cluster}", "backend": "shm", "links": list(links), "total": totals,
        "pools": {}, "grants": 0, "kept": [], "links_left_out": 0, **changes,
    }  # fmt: skip
    return Asked(job, cluster, f"{job}{cluster}", 100 + cluster, "as /proc has it", report, at=at)


def _sum(tallies: list[Any]) -> Any:
    return {name: sum(each[name] for each in tallies) for name in _tally()}


def _found(before: list[Asked], now: list[Asked]) -> dict[int, Activity]:
    return {each.cluster_id: each for each in activities(Look(before), Look(now))}


def test_a_pull_is_in_here_and_out_there() -> None:
    before = [_asked(1, 10.0, _link(2)), _asked(2, 10.0, _link(1, _tally(5, 100, 0, 1.0)))]
    now = [_asked(1, 12.0, _link(2)), _asked(2, 12.0, _link(1, _tally(9, 500, 1, 1.5)))]
    found = _found(before, now)
    puller, owner = found[2], found[1]
    assert (puller.rates.bytes_in, puller.rates.bytes_out) == (200.0, 0.0)
    assert puller.rates.operations == 2.0
    assert puller.rates.mean == pytest.approx(0.125)
    assert (owner.rates.bytes_in, owner.rates.bytes_out) == (0.0, 200.0)
    assert owner.rates.mean is None
    assert owner.links[0].rates.bytes_out == 200.0
    assert puller.links[0].errors == 1


def test_a_push_goes_the_other_way() -> None:
    before = [_asked(1, 0.0, _link(2)), _asked(2, 0.0, _link(1))]
    now = [_asked(1, 1.0, _link(2)), _asked(2, 1.0, _link(1, push=_tally(1, 64)))]
    found = _found(before, now)
    assert found[2].rates.bytes_out == 64.0
    assert found[1].rates.bytes_in == 64.0
    assert found[1].links[0].rates.bytes_in == 64.0


def test_links_of_one_pair_are_told_apart() -> None:
    links = [_link(2), _link(2, comm_id=2, name="other")]
    theirs = [_link(1), _link(1, _tally(1, 10), comm_id=2, name="other")]
    zero = [_link(1), _link(1, comm_id=2, name="other")]
    found = _found(
        [_asked(1, 0.0, *links), _asked(2, 0.0, *zero)],
        [_asked(1, 1.0, *links), _asked(2, 1.0, *theirs)],
    )
    assert [link.rates.bytes_out for link in found[1].links] == [0.0, 10.0]


def test_equal_ids_of_other_jobs_are_others() -> None:
    before = [_asked(1, 0.0, _link(2), job="a"), _asked(2, 0.0, _link(1), job="b")]
    now = [_asked(1, 1.0, _link(2), job="a"), _asked(2, 1.0, _link(1, _tally(1, 9)), job="b")]
    assert _found(before, now)[1].rates.bytes_out == 0.0


def test_who_came_between_has_no_rate_yet() -> None:
    assert _found([], [_asked(2, 1.0, _link(1, _tally(9, 9)))])[2].rates.bytes_in == 0.0


def test_a_link_that_was_made_anew_counts_from_zero() -> None:
    before = [_asked(2, 0.0, _link(1, _tally(9, 900)))]
    now = [_asked(2, 1.0, _link(1, _tally(2, 20)))]
    assert _found(before, now)[2].links[0].rates.bytes_in == 20.0


def test_failures_are_named() -> None:
    broken = _link(1, error="its process ended")
    failed = _link(3, status="FAILED", error="no such peer")
    silent = Asked("", 4, "4", 104, "x.py", None, "no answer")
    now = [_asked(2, 1.0, broken, failed, kept=["memory"], links_left_out=7), silent]
    found = _found([], now)
    assert [link.state for link in found[2].links] == ["BROKEN", "FAILED"]
    assert found[2].failures == [
        "cluster 2, link kv to 1: BROKEN: its process ended",
        "cluster 2, link kv to 3: FAILED: no such peer",
        "cluster 2: memory",
        "cluster 2: 7 more links are not listed",
    ]
    assert found[4].failures == ["cluster 4 (pid 104): no answer"]
    assert found[4].program == "x.py"


@pytest.mark.parametrize(
    ("page", "text"),
    [(1 << 38, "25% 1T"), (1 << 30, "25% 4G"), (1 << 20, "25% 4M"), (1024, "25% 4K"), (0, "-")],
)
def test_pools_are_summed(page: int, text: str) -> None:
    pool = {"pages_used": 1, "pages_free": 3, "page_bytes": page}
    assert _found([], [_asked(1, 1.0, pools={"HOST": pool})])[1].pool == text
