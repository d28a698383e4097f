"""Tensors over pool memory: caches made from them, and when the memory returns (pool_tensors.py)."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datadist import (
    BlocksCacheKey,
    CacheDesc,
    DataType,
    LLMException,
    LLMStatusCode,
    Placement,
)
from datadist.caches.quarantine import Kept, Ranges
from datadist.dlpack import BFLOAT, tensor_in
from tests import nodes
from tests.in_process_engine import Engine
from tests.nodes import Here, Node

Start = Callable[..., Node]
EXAMPLE = Path(__file__).parents[2] / "examples" / "kv_in_pool" / "kv_in_pool.py"


def _used(engine: Engine) -> int:
    gc.collect()
    return int(engine.api.stats()["pools"]["DEVICE"]["pages_used"])


def test_memory_returns_with_the_last_view(engine: Engine) -> None:
    before = _used(engine)
    tensor = engine.api.cache_manager.allocate_tensor([3, 4096], DataType.DT_FLOAT)
    assert _used(engine) == before + 12
    view = tensor.numpy()[1:]
    view[:] = 2
    del tensor
    assert _used(engine) == before + 12
    part = view[0, :5]
    del view
    assert _used(engine) == before + 12
    assert (part == 2).all()
    del part
    assert _used(engine) == before


def test_a_cache_keeps_the_memory_until_it_is_unregistered(engine: Engine) -> None:
    before, manager = _used(engine), engine.api.cache_manager
    buffer = manager.allocate_tensor([4, 2, 512], DataType.DT_INT32).numpy()
    cache = manager.register_blocks_cache(
        CacheDesc.from_tensors([buffer[:, 0], buffer[:, 1]]), [buffer[:, 0], buffer[:, 1]]
    )
    del buffer
    assert _used(engine) == before + 4
    manager.unregister_cache(cache.cache_id)
    assert _used(engine) == before


def test_memory_that_a_transfer_may_touch_does_not_return(engine: Engine) -> None:
    before, manager = _used(engine), engine.api.cache_manager
    settled: list[bool] = []

    class Flight:
        def settled(self) -> bool:
            return bool(settled)

    tensor = manager.allocate_tensor([4096], DataType.DT_INT8)
    live: Any = engine.api._engine
    quarantine = live.memory.quarantine
    quarantine.on_kept = lambda _: None
    ranges = Ranges(array("q", [tensor.address + 100]), array("q", [8]))
    quarantine.keep(Kept(Flight(), ranges, "link", 1, "a pull"))
    del tensor
    assert _used(engine) == before + 1
    settled.append(True)
    quarantine.release_settled()
    assert _used(engine) == before


def test_a_view_outlives_the_engine(engine: Engine) -> None:
    view = engine.api.cache_manager.allocate_tensor([8], DataType.DT_INT32).numpy()
    view[:] = 9
    engine.api.finalize()
    assert view.tolist() == [9] * 8
    del view
    gc.collect()


def test_what_dlpack_is_asked_for(engine: Engine) -> None:
    tensor: Any = engine.api.cache_manager.allocate_tensor([8], DataType.DT_BF16)
    for wrong in ({"bogus": 1}, {"strem": None}):
        with pytest.raises(TypeError):
            tensor.__dlpack__(**wrong)
    for options, shared in (({}, True), ({"copy": True}, False), ({"stream": None}, True)):
        capsule = tensor.__dlpack__(**options)
        found = tensor_in(capsule)
        assert (found.data == tensor.address) is shared
        assert found.dtype.code == BFLOAT


def test_what_cannot_be_allocated(engine: Engine) -> None:
    manager = engine.api.cache_manager
    before = _used(engine)
    cases: list[tuple[Any, str]] = [
        (([8], DataType.DT_INT8, Placement.HOST), "no HOST pool is configured"),
        (([0, 4], DataType.DT_INT8), "every dimension must be positive"),
        (([4], DataType.DT_STRING), "has no array type"),
    ]
    for arguments, words in cases:
        with pytest.raises(LLMException, match=words) as caught:
            manager.allocate_tensor(*arguments)
        assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    with pytest.raises(LLMException) as caught:
        manager.allocate_tensor([1 << 30], DataType.DT_INT8)
    assert caught.value.status_code is LLMStatusCode.LLM_OUT_OF_MEMORY
    wrong: list[Any] = ["x", None, 5]
    for shape in wrong:
        with pytest.raises(TypeError):
            manager.allocate_tensor(shape, DataType.DT_INT8)
    assert _used(engine) == before


def _whole(here: Here, label: str, key: Any, **options: Any) -> int:
    manager = here.live.cache_manager
    buffer = manager.allocate_tensor([6, 2, 8], DataType.DT_INT32).numpy()
    layers = [buffer[:, 0], buffer[:, 1]]
    cache = manager.register_blocks_cache(CacheDesc.from_tensors(layers), layers, key, **options)
    here.caches[label], here.arrays[label] = cache, cache.numpy()
    return cache.cache_id


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("options", [{}, {"remote_accessible": True}])
def test_caches_in_the_pool_are_reached_by_links_made_before(
    start_node: Start, one_sided: bool, options: dict[str, Any]
) -> None:
    owner, user = (start_node(n, enable_remote_cache_accessible=one_sided) for n in (1, 2))
    nodes.link_pair(owner, user)
    owner.do(_whole, "theirs", BlocksCacheKey(1), **options)
    owner.do(nodes.fill, "theirs", 1)
    user.do(_whole, "mine", None, **options)
    user.do(nodes.pull_blocks, BlocksCacheKey(1), "mine", [0, 5], [5, 1])
    for n, found in enumerate(user.do(nodes.read, "mine")):
        np.testing.assert_array_equal(found[[5, 1]], nodes.pattern(1, n, (6, 8))[[0, 5]])


def test_the_example(tmp_path: Path) -> None:
    done = _run(EXAMPLE, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "blocks 3 and 4 of all layers are here" in done.stdout


def test_the_example_ends_where_an_engine_fails(tmp_path: Path) -> None:
    pull, script = "            manager.pull_blocks(", tmp_path / "fails.py"
    text = EXAMPLE.read_text()
    assert pull in text
    script.write_text(text.replace(pull, f"            raise OSError('no pull')\n{pull}"))
    done = _run(script, tmp_path)
    assert done.returncode == 1
    assert "no pull" in done.stderr


def _run(script: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("torch", reason="torch is not installed")
    environ = {**os.environ, "DATADIST_RUNTIME_DIR": str(tmp_path), "DATADIST_JOB": "kv_in_pool"}
    return subprocess.run(
        [sys.executable, str(script)], env=environ, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
