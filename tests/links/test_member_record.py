"""What members say of themselves once a transport's library brought them together."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datadist.control.messages import Announce
from datadist.control.runtime_dir import Address
from datadist.links import member_record
from datadist.links.domain import TableDomain

RANKS = {7: 0, 8: 1, 9: 3}
ENGINES = {cluster: Address(cluster, f"{cluster:032x}") for cluster in RANKS}


class _Nobody:
    def on_ok(self, domain: Any) -> None: ...
    def on_failed(self, domain: Any, reason: str) -> None: ...
    def on_dissolved(self, domain: Any) -> None: ...
    def on_member_gone(self, domain: Any, unlinked: bool) -> None: ...


def _domain(cluster: int, comm_id: int = 1, **changes: Any) -> TableDomain:
    wish: dict[str, Any] = {
        "link": comm_id,
        "name": "pair",
        "ranks": sorted(RANKS.items()),
        "table": "{}",
        "backend": "some",
        "one_sided": False,
        **changes,
    }
    return TableDomain(
        owner=_Nobody(),
        name=wish["name"],
        ranks=RANKS,
        own_cluster=cluster,
        table=None,
        deadline=0.0,
        comm_id=comm_id,
        announce=Announce(**wish),
    )


def _blob(cluster: int, endpoints: tuple[str, ...] = (), **changes: Any) -> bytes:
    domain = _domain(cluster, **changes)
    return member_record.make_record(domain, ENGINES[cluster], list(endpoints))


def test_all_members_compute_the_same() -> None:
    blobs = [_blob(c, (f"10.0.0.{c}:1000",), comm_id=c + 20) for c in RANKS]
    results = [member_record.read(_domain(cluster), blobs) for cluster in RANKS]
    assert results[0] == results[1] == results[2]
    token, members = results[0]
    assert len(token) == 32
    assert [(m.rank, m.cluster_id, m.link) for m in members.values()] == [
        (0, 7, 27), (1, 8, 28), (3, 9, 29),
    ]  # fmt: skip
    assert members[3].endpoints == ["10.0.0.9:1000"]
    again = [*blobs[:2], _blob(9, comm_id=29)]
    assert member_record.read(_domain(7), again)[0] != token, "another attempt has another token"
    again = [*blobs[:2], _blob(9, comm_id=30)]
    assert member_record.read(_domain(7), again)[0] != token, "another link has another token"


def test_a_blob_is_small() -> None:
    many = tuple(f"[{'ffff:' * 7}{n:x}]:65535" for n in range(100))
    assert len(_blob(9, many)) < 8 << 10


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"name": "other"}, "rank 1 differ"),
        ({"table": "other"}, "rank 1 differ"),
        ({"backend": "another"}, "rank 1 uses backend another"),
        ({"one_sided": True}, "enable_remote_cache_accessible"),
    ],
)
def test_what_differs_is_named(changes: dict[str, Any], problem: str) -> None:
    blobs = [_blob(7), _blob(8, **changes), _blob(9)]
    with pytest.raises(ValueError, match=problem):
        member_record.read(_domain(7), blobs)


def test_another_job_is_refused() -> None:
    foreign = json.dumps({**json.loads(_blob(8)), "job": "blue"}).encode()
    with pytest.raises(
        ValueError, match="rank 1 belongs to job 'blue', this engine to the job without"
    ):
        member_record.read(_domain(7), [_blob(7), foreign, _blob(9)])


def test_ranks_in_another_order_and_other_releases_are_refused() -> None:
    with pytest.raises(ValueError, match="rank 0 is cluster 8"):
        member_record.read(_domain(7), [_blob(8), _blob(7), _blob(9)])
    with pytest.raises(ValueError, match="2 blobs, expected 3"):
        member_record.read(_domain(7), [_blob(7), _blob(8)])
    newer = json.dumps({**json.loads(_blob(8)), "wire": 99}).encode()
    with pytest.raises(ValueError, match="control protocol 99"):
        member_record.read(_domain(7), [_blob(7), newer, _blob(9)])


@given(st.binary(max_size=200))
def test_what_is_no_introduction_is_a_value_error(blob: bytes) -> None:
    with pytest.raises(ValueError, match="rank 1"):
        member_record.read(_domain(7), [_blob(7), blob, _blob(9)])


@pytest.mark.parametrize("item", [b"{}", b'"\\n"', b"0"])
def test_faults_in_great_numbers_make_no_long_text(item: bytes) -> None:
    blob = b'{"endpoints":[%b],%b}' % (
        b",".join([item] * 900),
        b",".join(b'"%d":0' % n for n in range(900)),
    )
    with pytest.raises(ValueError, match="rank 1 exchanged is no introduction") as caught:
        member_record.read(_domain(7), [_blob(7), blob, _blob(9)])
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)
