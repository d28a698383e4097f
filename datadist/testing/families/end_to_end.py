"""Through `LLMDataDist`, as users do."""

from __future__ import annotations

import itertools
import json

import pytest

from datadist.testing import engine_operations, operations
from datadist.testing.engine_operations import EngineSettings
from datadist.testing.families.kit import Kit
from datadist.testing.processes import PeerError, Process
from datadist.testing.rules import rule
from datadist.testing.testbed import Testbed
from datadist.transport import Placement

KEY = 70
SECONDS = 30.0


class EndToEnd(Kit):
    """Link clusters, pull caches and blocks, unlink, lose a cluster."""

    @rule("Link.read", "Link.attach")
    @pytest.mark.parametrize("size", [2, 3, 4])
    def test_every_cluster_pulls_from_every_other(self, testbed: Testbed, size: int) -> None:
        """A slot of a contiguous cache and two blocks, between all pairs."""
        cluster = _Clusters(self, testbed, size)
        cluster.link("all")
        for puller in cluster.ids:
            for owner in cluster.ids:
                if owner != puller:
                    cluster.pull_slot(puller, owner)
                    cluster.pull_blocks(puller, owner)
        cluster.finalize()

    @rule("Link.close", "Transport.open")
    def test_unlink_and_link_again(self, testbed: Testbed) -> None:
        """Under the same name, with the same engines and pools."""
        cluster = _Clusters(self, testbed, 2)
        for _ in range(3):
            comm_ids = cluster.link("again")
            cluster.pull_slot(1, 2)
            cluster.unlink(comm_ids)
            assert not cluster.try_slot(1, 2).startswith("ok"), "a pull without a link succeeded"
        cluster.finalize()

    @rule("Link.close", "Transport.open")
    def test_a_domain_that_differs_fails_on_both_sides(self, testbed: Testbed) -> None:
        """With the difference in the reason; what is linked correctly afterwards works."""
        cluster = _Clusters(self, testbed, 2)
        other = json.loads(self.rank_table(2))
        other["server_list"][-1]["server_id"] += "9"
        comm_ids = {
            1: cluster.begin_link(1, "differs", self.rank_table(2)),
            2: cluster.begin_link(2, "differs", json.dumps(other)),
        }
        for number, comm_id in comm_ids.items():
            text = _error_of(cluster.processes[number], comm_id)
            assert "server_id" in text, (
                f"cluster {number} must fail to link and name the field that differs, server_id, "
                f"but: {text}"
            )
        cluster.unlink(comm_ids)
        cluster.link("differs")
        cluster.pull_slot(1, 2)
        cluster.finalize()

    @rule("Access")
    def test_one_sided_mode(self, testbed: Testbed) -> None:
        """Pulls where peers were granted write access too."""
        if not testbed.ask_link().one_sided_write:
            pytest.skip("capabilities.one_sided_write is False")
        cluster = _Clusters(self, testbed, 2, one_sided=True)
        comm_ids = cluster.link("one-sided")
        cluster.pull_blocks(1, 2)
        cluster.unlink(comm_ids)
        cluster.finalize()

    @rule("PeerLost", "Link.abort", "Link.close")
    def test_a_cluster_that_was_killed(self, testbed: Testbed) -> None:
        """Pulls from it fail with a status, others go on, and a new one takes its place."""
        cluster = _Clusters(self, testbed, 3)
        comm_ids = cluster.link("lossy")
        cluster.processes[2].kill()
        text = cluster.try_slot(1, 2)
        assert text.startswith(("LLM_NOT_YET_LINK", "LLM_FAILED")), (
            f"a pull from a killed cluster: expected LLM_NOT_YET_LINK or LLM_FAILED, came {text}"
        )
        cluster.pull_slot(1, 3)
        cluster.unlink({c: i for c, i in comm_ids.items() if c != 2})
        cluster.start(2)
        cluster.link("lossy")
        cluster.pull_slot(1, 2)
        cluster.finalize()


def _error_of(process: Process, comm_id: int) -> str:
    """What the wait for a link raises."""
    try:
        process.do(engine_operations.wait_link, comm_id)
    except PeerError as error:
        return str(error)
    return "the link is OK"


class _Clusters:
    """Engines by cluster id, from 1; each has a contiguous cache and one of blocks."""

    def __init__(self, kit: Kit, testbed: Testbed, size: int, one_sided: bool = False) -> None:
        self._kit, self._testbed, self._one_sided = kit, testbed, one_sided
        self._placement = _placement(testbed)
        self.ids = range(1, size + 1)
        self.processes: dict[int, Process] = {}
        self._cache_ids: dict[int, int] = {}
        self._keys = itertools.count(KEY + 1)
        for cluster in self.ids:
            testbed.bare(cluster - 1)
        for cluster in self.ids:
            self.start(cluster)

    def start(self, cluster: int) -> None:
        process = self.processes[cluster] = self._testbed.bare(cluster - 1)
        settings = EngineSettings(
            backend=self._kit.transport,
            options=self._kit.transport_options(cluster - 1),
            placement=self._placement,
            one_sided=self._one_sided,
            seconds=SECONDS * self._testbed.scale,
        )
        process.do(engine_operations.start_engine, cluster, settings)
        self._cache_ids[cluster] = process.do(
            engine_operations.make_cache, "cache", self._placement, _seed(cluster, "cache")
        )
        process.do(
            engine_operations.make_cache, "blocks", self._placement, _seed(cluster, "blocks"), KEY
        )

    def link(self, name: str) -> dict[int, int]:
        table = self._kit.rank_table(len(self.ids))
        comm_ids = {cluster: self.begin_link(cluster, name, table) for cluster in self.ids}
        for cluster, comm_id in comm_ids.items():
            self.processes[cluster].begin(engine_operations.wait_link, comm_id)
        for process in self.processes.values():
            process.result(SECONDS + 10)
        return comm_ids

    def begin_link(self, cluster: int, name: str, table: str) -> int:
        mapping = {number: number - 1 for number in self.ids}
        comm_id: int = self.processes[cluster].do(engine_operations.link, name, mapping, table)
        return comm_id

    def unlink(self, comm_ids: dict[int, int]) -> None:
        for cluster, comm_id in comm_ids.items():
            self.processes[cluster].do(engine_operations.unlink, comm_id)

    def try_slot(self, puller: int, owner: int) -> str:
        """Pull slot 2 of the owner into slot 1 of a cache made for that."""
        process = self.processes[puller]
        process.do(engine_operations.make_cache, "target", self._placement, 99)
        text: str = process.do(
            engine_operations.pull_slot, "target", owner, self._cache_ids[owner], 2, 1
        )
        return text

    def pull_slot(self, puller: int, owner: int) -> None:
        text = self.try_slot(puller, owner)
        assert text == "ok", f"cluster {puller} pulls from cluster {owner}: {text}"
        self._check(puller, "target", 99, {1: (_seed(owner, "cache"), 2)})

    def pull_blocks(self, puller: int, owner: int) -> None:
        process = self.processes[puller]
        process.do(engine_operations.make_cache, "target", self._placement, 98, next(self._keys))
        text = process.do(engine_operations.pull_blocks, "target", owner, KEY, [3, 1], [0, 2])
        assert text == "ok", f"cluster {puller} pulls blocks from cluster {owner}: {text}"
        seed = _seed(owner, "blocks")
        self._check(puller, "target", 98, {0: (seed, 3), 2: (seed, 1)})

    def _check(
        self, cluster: int, label: str, seed: int, arrived: dict[int, tuple[int, int]]
    ) -> None:
        wrong = self.processes[cluster].do(engine_operations.wrong, label, seed, arrived)
        assert wrong is None, f"cluster {cluster}: {wrong}"

    def finalize(self) -> None:
        for process in self.processes.values():
            process.do(operations.finalize_engine)


def _seed(cluster: int, label: str) -> int:
    return 2 * cluster + (label == "blocks")


def _placement(testbed: Testbed) -> Placement:
    """One whose memory the kit can look at."""
    usable = testbed.capabilities.placements & testbed.capabilities.host_addressable
    if not usable:
        pytest.skip("capabilities: no placement is both usable and host addressable")
    for process in [testbed.bare(0)]:
        process.do(operations.close_transport)
    return max(usable)
