"""What a link that is complete means for what was found out before (domain.py)."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, cast

from datadist.base.flag import Flag
from datadist.caches.peers import PeerView
from datadist.links.domain import Attempt, invalidate_routes
from tests.interrupts import raising_anew


def _view(cluster: int) -> PeerView:
    return PeerView(cast("Any", SimpleNamespace(cluster_id=cluster)))


def test_all_engines_of_the_clusters_of_a_new_link_are_looked_up_again() -> None:
    clusters = {"a": 1, "b": 3, "c": 1, "d": 2, "e": 4}
    views = {incarnation: _view(cluster) for incarnation, cluster in clusters.items()}
    domain: Any = SimpleNamespace(others={1: 0, 2: 1})
    invalidate_routes(views, domain)
    assert {name: view.version for name, view in views.items()} == {
        "a": 1, "b": 0, "c": 1, "d": 1, "e": 0,
    }  # fmt: skip
    assert not views["a"].begin_pull_at(0, 1)
    assert views["b"].begin_pull_at(0, 1)


def test_an_unlink_that_is_interrupted_does_not_stop_the_thread_that_ends_the_last_step() -> None:
    def prepare() -> Attempt:
        attempt = Attempt("token", 0, [0, 1], {})
        attempt.idle = Flag()  # a worker is busy with it
        return attempt

    moments = 0
    for where, attempt in raising_anew(
        prepare, lambda each: each.shut_down(0.0, 0.0, lambda: None)
    ):
        moments += 1
        ending = threading.Thread(target=attempt.idle.set)
        ending.start()
        ending.join(60)
        assert not ending.is_alive(), where
    assert moments > 10
