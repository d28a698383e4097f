"""Keywords that do not exist (keywords.py): refused by every public method, with those that do."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

import datadist
from datadist import BlocksCacheKey, CacheDesc, DataType, LLMDataDist, LLMRole
from datadist.api.arrays import CacheTensor
from datadist.api.cache_manager import CacheManager
from datadist.base.keywords import did_you_mean, named_keywords
from datadist.types import CacheKey

ROOT = Path(__file__).parents[2]
APART = (CacheKey, BlocksCacheKey, datadist.LayerSynchronizer)
"""Keys refuse unknown keywords as upstream does (see test_types); synchronizers are the caller's."""

MOVING = ("pull_cache", "pull_blocks", "push_cache", "push_blocks")
THEMSELVES = (
    *MOVING, "allocate_cache", "allocate_blocks_cache", "register_cache", "register_blocks_cache",
    "link",
)  # fmt: skip
"""Methods that refuse unknown keywords, without a wrapper."""


def _classes() -> list[type]:
    exported = [getattr(datadist, name) for name in datadist.__all__]
    kinds = {kind for kind in exported if inspect.isclass(kind) and not issubclass(kind, Enum)}
    return sorted(kinds.difference(APART) | {CacheManager, CacheTensor}, key=lambda k: k.__name__)


def _methods(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        if base.__module__.startswith("datadist"):
            for name, member in vars(base).items():
                function = getattr(member, "__func__", member)
                if inspect.isfunction(function) and not name.startswith("_"):
                    yield name


METHODS = [(kind, name) for kind in _classes() for name in sorted(set(_methods(kind)))]


def _refused(call: Callable[..., Any], **keywords: Any) -> str:
    with pytest.raises(TypeError) as caught:
        call(**keywords)
    return str(caught.value)


def _known(call: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(call).parameters.values()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in by_name]


def _verify(call: Callable[..., Any], shown: str) -> None:
    known = _known(call)
    said = _refused(call, **dict.fromkeys(known), nonsense_0=1, nonsense_1=2)
    takes = f"it takes {', '.join(known)}" if known else "it takes none"
    assert said == f"{shown}() got an unexpected keyword argument 'nonsense_0': {takes}"
    for name in known:
        others = {other: None for other in known if other != name}
        said = _refused(call, **others, **{f"{name}x": 1})
        # Python itself refuses a call of these that lacks a parameter: it names that one.
        lacks = f"missing 1 required positional argument: {name!r}"
        lacking = shown in THEMSELVES and lacks in said
        assert lacking or f"{name + 'x'!r} (did you mean {name!r}?)" in said


def _instance(kind: type) -> Any:
    return CacheManager(None, None, True) if kind is CacheManager else object.__new__(kind)  # type: ignore[arg-type]


def test_all_methods_are_looked_at() -> None:
    names = {f"{kind.__name__}.{name}" for kind, name in METHODS}
    assert {"CacheManager.pull_cache", "Cache.create_cpu_cache", "LLMConfig.gen_options"} <= names
    assert len(METHODS) > 40


@pytest.mark.parametrize(("kind", "name"), METHODS, ids=lambda v: getattr(v, "__name__", v))
def test_unknown_keywords_of_methods(kind: type, name: str) -> None:
    kept = kind if kind is datadist.LLMException else _instance(kind)
    _verify(getattr(kept, name), name)


@pytest.mark.parametrize(
    "kind", [k for k in _classes() if k is not CacheManager], ids=lambda kind: kind.__name__
)
def test_unknown_keywords_of_constructors(kind: type) -> None:
    _verify(kind, kind.__name__)


@pytest.mark.parametrize("method", MOVING)
@pytest.mark.parametrize("name", ["src_layers", "src_layer_rang", "tensors_per_layer", "unknown"])
def test_layers_of_transfers_cannot_be_misspelt(method: str, name: str) -> None:
    call = getattr(_instance(CacheManager), method)
    said = _refused(lambda **k: call(BlocksCacheKey(1), None, **k), **{name: range(1)})
    assert said.startswith(f"{method}() got an unexpected keyword argument {name!r}")
    assert "src_layer_range, dst_layer_range" in said


def test_positional_calls_and_errors_of_python_itself_are_as_before() -> None:
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'data_type'"):
        CacheDesc(1, [1])  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="multiple values for argument 'role'"):
        LLMDataDist(LLMRole.MIX, role=1)  # type: ignore[misc,call-arg,arg-type]
    assert CacheDesc(1, shape=[2], data_type=DataType.DT_INT8).size == 2


def test_a_traceback_has_one_more_line() -> None:
    with pytest.raises(ValueError, match="num_tensors") as caught:
        CacheDesc(-1, [1], DataType.DT_INT8)
    here, *names = [frame.name for frame in traceback.extract_tb(caught.tb)]
    assert here.startswith("test_")
    assert names[:2] == ["checked_call", "__init__"]


def test_tools_see_the_parameters_of_the_method_itself() -> None:
    layers = {"src_layer_range": None, "dst_layer_range": None, "tensor_num_per_layer": 2}
    of_all = {"timeout_in_millis": None, "notify": None}
    for name, more in (("pull_cache", {}), ("pull_blocks", {"token": None, "release": False})):
        parameters = inspect.signature(getattr(CacheManager, name)).parameters.values()
        expected: dict[str, Any] = {**layers, **more, **of_all}
        last = list(parameters)[-len(expected) :]
        assert {p.name: p.default for p in last} == expected
        assert {p.kind for p in last} == {inspect.Parameter.KEYWORD_ONLY}
    assert "self" not in inspect.signature(LLMDataDist).parameters
    assert LLMDataDist.link.__qualname__ == "LLMDataDist.link"
    assert LLMDataDist.link.__doc__


def test_subclasses_have_keywords_of_their_own() -> None:
    class Labelled(CacheDesc):
        def __init__(self, label: str) -> None:
            super().__init__(1, [2], DataType.DT_INT8)
            self.label = label

    assert Labelled(label="mine").size == 2


@named_keywords
class Sample:
    """Of each kind of method one."""

    def __init__(self, *args: int, level: int = 1) -> None:
        self.args, self.level = args, level

    @classmethod
    def made(cls, level: int) -> Sample:
        return cls(level=level)

    @staticmethod
    def plain(level: int) -> int:
        return level

    def _private(self, level: int) -> int:
        return level


def test_every_kind_of_method_is_wrapped_and_still_works() -> None:
    sample = Sample(1, 2, level=3)
    assert (sample.args, sample.level) == ((1, 2), 3)
    assert Sample.made(level=4).level == Sample.plain(level=4) == sample._private(level=4) == 4
    for call, shown in ((Sample, "Sample"), (Sample.made, "made"), (sample.plain, "plain")):
        said = _refused(call, levl=1)
        assert said.startswith(f"{shown}() got an unexpected keyword argument 'levl'")
        assert said.endswith("(did you mean 'level'?): it takes level")
    assert "it takes" not in _refused(sample._private, levl=1)


def test_names_that_are_far_are_not_proposed() -> None:
    assert did_you_mean("zzz", ["level"]) == ""
    assert did_you_mean("levels", ["level", "label"]) == " (did you mean 'level'?)"


MISSPELT = """
from datadist import BlocksCacheKey, Cache, CacheKey, CacheKeyByIdAndIndex, LLMDataDist

def use(engine: LLMDataDist, cache: Cache) -> None:
    manager = engine.cache_manager
    layers = range(0, 1)
    manager.pull_cache(CacheKey(1, 2), cache, src_layer_range=layers, tensor_num_per_layer=1)
    manager.pull_blocks(BlocksCacheKey(1), cache, [1], [1], dst_layer_range=layers)
    manager.push_blocks(BlocksCacheKey(prompt_cluster_id=1, model_id=1), cache, [1], [1], layers, layers)
    manager.pull_cache(CacheKey(prompt_cluster_id=1, req_id=2), cache, src_layers=layers)
    manager.pull_blocks(BlocksCacheKey(1), cache, [1], [1], tensors_per_layer=1)
    manager.push_cache(CacheKeyByIdAndIndex(1, 1), cache, src_layers=layers)
    manager.push_blocks(BlocksCacheKey(1), cache, [1], [1], src_layers=layers)
    manager.pull_cache(CacheKey(1, 2), cache, src_layer_range=1)
    manager.register_cache(cache.cache_desc, [1], remote=True)
    CacheKey(1, 2, prefix=3)
    BlocksCacheKey(cluster=1)
    engine.link("name", {1: 0, 2: 1}, rank_tabel="{}")
"""


def test_a_type_checker_sees_the_keywords(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text(MISSPELT)
    command = [
        sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", str(tmp_path),
        "--follow-imports", "silent", "--config-file", "", str(program),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = dict(re.findall(r"program\.py:(\d+): error: (.*)", done.stdout)[::-1])
    lines = MISSPELT.splitlines()
    first = 1 + next(n for n, line in enumerate(lines) if "src_layers=" in line)
    assert {int(number) for number in said} == set(range(first, len(lines) + 1)), done.stdout
    unexpected = [text for text in said.values() if text.startswith("Unexpected keyword argument")]
    assert len(unexpected) == len(said) - 1, done.stdout
