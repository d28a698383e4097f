"""Every check of the engine's methods, in the documented order.

The order among options of init is in test_options.py, the limit of 512 domains in test_link.py. Source of
the rows: LLM-DataDist API, LLMDataDist.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from datadist import LLMClusterInfo, LLMDataDist, LLMException, LLMRole, LLMStatusCode
from tests.matrix import OWN, PEER, Check, Table, Worlds, cases, verify, worlds_in
from tests.nodes import cluster_info, table_for

PI = LLMStatusCode.LLM_PARAM_INVALID
FAILED = LLMStatusCode.LLM_FAILED
LINK_FAILED = LLMStatusCode.LLM_LINK_FAILED
NOT_LINKED = LLMStatusCode.LLM_NOT_YET_LINK
NOT_ENABLED = LLMStatusCode.LLM_FEATURE_NOT_ENABLED
PAIR = {OWN: 0, PEER: 1}
ON = {"llm.EnableCacheManager": "1"}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    """One engine at a time, in the state that a case needs."""
    with worlds_in(tmp_path_factory.mktemp("run")) as each:
        yield each


def _comm_id(method: str) -> Table:
    return Table(
        f"LLMDataDist.{method}",
        {"comm_id": 7},
        (
            Check(RuntimeError, "call init first", world="fresh"),
            Check(TypeError, "comm_id is a NoneType", {"comm_id": None}),
            Check(TypeError, "comm_id is a str", {"comm_id": "7"}),
            Check(ValueError, "comm_id is -1", {"comm_id": -1}),
            Check(ValueError, "comm_id is 18446744073709551616", {"comm_id": 1 << 64}),
            Check(NOT_ENABLED, f"{method} is not available", world="hixl"),
            Check(NOT_LINKED, "comm id 7 is not linked"),
        ),
    )


def _cluster(cluster: int | None = PEER, ip: int | str = "127.0.0.1", local: bool = True) -> Any:
    info = LLMClusterInfo()
    if cluster is not None:
        info.remote_cluster_id = cluster
    if local:
        info.append_local_ip_info("127.0.0.1", 0)
    info.append_remote_ip_info(ip, 1)
    return info


TIMEOUT_AND_CLUSTERS = (
    Check(RuntimeError, "call init first", world="fresh"),
    Check(TypeError, "timeout is a NoneType", {"timeout": None}),
    Check(ValueError, "timeout", {"timeout": 1 << 31}),
    Check(PI, "timeout is 0", {"timeout": 0}),
    Check(PI, "timeout is -1", {"timeout": -1}),
    Check(TypeError, "clusters is a NoneType", {"clusters": None}),
    Check(TypeError, "clusters is a LLMClusterInfo", {"clusters": _cluster()}),
    Check(TypeError, r"clusters\[1\] is a int", {"clusters": [_cluster(None, local=False), 1]}),
)

TABLES = [
    Table(
        "LLMDataDist",
        {"role": LLMRole.MIX, "cluster_id": OWN},
        (
            Check(TypeError, "role is a int", {"role": 1}),
            Check(TypeError, "cluster_id is a NoneType", {"cluster_id": None}),
            Check(ValueError, "cluster_id is -1", {"cluster_id": -1}),
            Check(ValueError, "cluster_id is 18446744073709551616", {"cluster_id": 1 << 64}),
        ),
        target=LLMDataDist,
    ),
    Table(
        "Other.init",
        {"options": ON},
        (
            Check(FAILED, "only one can be", world="two-sided"),
            Check(TypeError, "options is a list", {"options": []}),
            Check(AttributeError, "options is None", {"options": None}),
            Check(TypeError, "flowGraph", {"options": {"ge.flowGraphMemMaxSize": 1}}),
            Check(PI, "flowGraph", {"options": {"ge.flowGraphMemMaxSize": "1,2"}}),
            Check(PI, "flowGraph", {"options": {"ge.flowGraphMemMaxSize": "x"}}),
            Check(
                PI,
                "LocalCommRes",
                {"options": {"llm.LocalCommRes": "", **ON, "llm.EnableCacheManager": "0"}},
            ),
            Check(PI, "listenIpInfo", {"options": {**ON, "llm.listenIpInfo": "1.2.3.4"}}),
            Check(ValueError, "not a number", {"options": {**ON, "llm.listenIpInfo": "1.2.3.4:x"}}),
            Check(ModuleNotFoundError, "enable_cache_manager", {"options": {}}),
            Check(TypeError, "option x", {"options": {**ON, "x": 1}}),
            Check(PI, "nonsense", {"options": {**ON, "llm.TransferBackend": "nonsense"}}),
            Check(PI, "deviceId", {"options": {**ON, "ge.exec.deviceId": "0;1"}}),
            Check(
                PI,
                "page",
                {"options": {**ON, "llm.MemPoolConfig": '{"memory_size": 1023, "page_shift": 10}'}},
            ),
        ),
        "fresh",
    ),
    Table(
        "LLMDataDist.link",
        {"comm_name": "link", "cluster_rank_info": PAIR, "rank_table": table_for(PAIR)},
        (
            Check(RuntimeError, "call init first", world="fresh"),
            Check(TypeError, "comm_name is a NoneType", {"comm_name": None}),
            Check(TypeError, "comm_name is a bytes", {"comm_name": b"link"}),
            Check(PI, "comm_name is empty", {"comm_name": ""}),
            Check(PI, "128 characters", {"comm_name": "a" * 128}),
            Check(TypeError, "only support dict", {"cluster_rank_info": [1, 2]}),
            Check(AttributeError, "cluster_rank_info is None", {"cluster_rank_info": None}),
            Check(TypeError, "a key of", {"cluster_rank_info": dict.fromkeys("12345", 0)}),
            Check(TypeError, r"cluster_rank_info\[2\]", {"cluster_rank_info": {-1: 0, 2: "1"}}),
            Check(PI, "at most 4", {"cluster_rank_info": {-n: -n for n in range(5)}}),
            Check(ValueError, "a cluster id in", {"cluster_rank_info": {-1: 0}}),
            Check(ValueError, "rank of cluster 1", {"cluster_rank_info": {1: 1 << 32}}),
            Check(TypeError, "rank_table is a dict", {"rank_table": {}}),
            Check(PI, "at least 2 members", {"cluster_rank_info": {9: 1}}),
            Check(PI, "ascending order", {"cluster_rank_info": {8: 1, 9: 0}}),
            Check(TypeError, "rank_table is a NoneType", {"rank_table": None}),
            Check(PI, "128 bytes", {"comm_name": "ä" * 64}),
            Check(NOT_ENABLED, "link is not available", world="hixl"),
            Check(PI, "own cluster id|engine's cluster id", {"cluster_rank_info": {8: 0, 9: 1}}),
            Check(PI, "no memory that a link could use", world="unpooled"),
            Check(LINK_FAILED, "not valid JSON", {"rank_table": "{"}),
            Check(LINK_FAILED, "rank_id 2", {"rank_table": table_for({1: 0, 2: 1, 3: 2})}),
        ),
    ),
    _comm_id("unlink"),
    _comm_id("query_register_mem_status"),
    _comm_id("wait_link"),
    _comm_id("link_error"),
    Table(
        "LLMDataDist.link_clusters",
        {"clusters": [_cluster()]},
        (
            *TIMEOUT_AND_CLUSTERS,
            Check(PI, "local_ip_info_list is empty", {"clusters": (_cluster(None, local=False),)}),
            Check(TypeError, "remote_cluster_id is a NoneType", {"clusters": [_cluster(None, -1)]}),
            Check(TypeError, "ip is -1", {"clusters": [_cluster(ip=-1)]}),
        ),
    ),
    Table(
        "LLMDataDist.unlink_clusters",
        {"clusters": [_cluster()]},
        (
            *TIMEOUT_AND_CLUSTERS,
            Check(TypeError, "force is a int", {"force": 1}),
            Check(TypeError, "force is a NoneType", {"force": None}),
            Check(TypeError, "remote_cluster_id is a NoneType", {"clusters": [_cluster(None, -1)]}),
            Check(TypeError, "ip is 4294967296", {"clusters": [_cluster(ip=1 << 32)]}),
        ),
    ),
    Table(
        "LLMDataDist.switch_role",
        {"role": LLMRole.PROMPT},
        (
            Check(RuntimeError, "call init first", world="fresh"),
            Check(TypeError, "role is a int", {"role": 1}),
            Check(TypeError, "switch_options is a list", {"switch_options": []}),
            Check(PI, "listenIpInfo", {"switch_options": {"llm.listenIpInfo": "1.2.3.4"}}),
            Check(
                ValueError, "not a number", {"switch_options": {"llm.listenIpInfo": "1.2.3.4:x"}}
            ),
            Check(PI, "IPv4", {"switch_options": {"llm.listenIpInfo": "localhost:1"}}),
            Check(KeyError, "role is None", {"role": None}),
            Check(
                NOT_ENABLED,
                "another listen_ip_info",
                {"switch_options": {"llm.listenIpInfo": "127.0.0.1:1"}},
                "hixl",
            ),
            Check(LLMStatusCode.LLM_EXIST_LINK, "'linking'", world="linking"),
            Check(
                FAILED, "no such address", {"switch_options": {"llm.listenIpInfo": "192.0.2.1:9"}}
            ),
        ),
    ),
    Table(
        "LLMDataDist.check_link_status",
        {"remote_cluster_id": None},
        (
            Check(RuntimeError, "call init first", world="fresh"),
            Check(PI, "EnableCacheManager", {"remote_cluster_id": 1}),
        ),
    ),
]


@pytest.mark.parametrize(("table", "world"), cases(TABLES))
def test_checks(worlds: Worlds, table: Table, world: str) -> None:
    verify(table, world, worlds)


# -- properties, and what is no failure ------------------------------------------------------------


def test_managers_exist_in_their_mode_only(worlds: Worlds) -> None:
    fresh = worlds.get("fresh").engine
    for name in ("cache_manager", "kv_cache_manager"):
        with pytest.raises(RuntimeError, match="call init first") as error:
            getattr(fresh, name)
        assert not isinstance(error.value, LLMException)
    engine = worlds.get("two-sided").engine
    assert engine.cache_manager is engine.cache_manager
    with pytest.raises(LLMException, match="EnableCacheManager") as caught:
        _ = engine.kv_cache_manager
    assert caught.value.status_code is PI


def test_objects_cost_nothing_until_init(worlds: Worlds) -> None:
    engine = worlds.get("two-sided").engine
    for cluster in (0, 2**64 - 1):
        other = LLMDataDist(LLMRole.PROMPT, cluster)
        assert other.cluster_id == cluster
        other.finalize()
    assert LLMDataDist.llm_engine_instance is engine
    engine.init(None)  # type: ignore[arg-type]
    nobody = LLMDataDist(None, 3)  # type: ignore[arg-type]
    engine.finalize()
    assert LLMDataDist.llm_engine_instance is None
    with pytest.raises(KeyError, match="LLMRole"):
        nobody.init(dict(ON))
    worlds.close()


def test_no_clusters_are_a_result(worlds: Worlds) -> None:
    engine = worlds.get("two-sided").engine
    assert engine.link_clusters([]) == (PI, [])
    assert engine.unlink_clusters(()) == (PI, [])


def test_each_cluster_has_its_own_result(worlds: Worlds) -> None:
    engine = worlds.get("two-sided").engine
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        nobody = cluster_info(PEER, taken.getsockname()[1])
        no_address, two_addresses = cluster_info(3), cluster_info(4, 1, 2)
        results = [PI, LINK_FAILED, PI]
        given = [no_address, nobody, two_addresses]
        assert engine.link_clusters(given, 5000) == (PI, results)
        assert engine.link_clusters(given[:2], timeout=5000) == (LINK_FAILED, results[:2])


def test_communication_resources_replace_the_local_address(worlds: Worlds) -> None:
    worlds.close()
    without = cluster_info(PEER, local=False)
    for resources, accepted in (("", False), ('{"version": "1.0"}', True)):
        with LLMDataDist(LLMRole.MIX, OWN) as engine:
            engine.init({"llm.LocalCommRes": resources})
            if accepted:
                assert engine.link_clusters([without]) == (PI, [PI])
                continue
            with pytest.raises(LLMException, match="local_ip_info_list is empty"):
                engine.link_clusters([without])


def test_the_present_role_and_address_may_be_switched_to(worlds: Worlds) -> None:
    engine = worlds.get("two-sided").engine
    for role in (LLMRole.MIX, LLMRole.MIX, LLMRole.DECODER):
        engine.switch_role(role, {"llm.listenIpInfo": "127.0.0.1:0", "unrelated": "x"})
    engine.switch_role(LLMRole.PROMPT)
    hixl = worlds.get("hixl").engine
    hixl.switch_role(LLMRole.PROMPT, {"llm.listenIpInfo": "127.0.0.1:0"})
