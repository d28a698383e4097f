"""What tools see of the API: docstrings, annotations, parameters, and the marker that it is typed."""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from types import FunctionType
from typing import Any, get_type_hints

import pytest

import datadist
from datadist import Placement
from datadist.api.arrays import CacheTensor
from datadist.api.cache_manager import CacheManager
from tests import upstream

ROOT = Path(__file__).parents[2]
DROP_IN = (
    "llm_datadist",
    "llm_datadist.configs",
    "llm_datadist.data_type",
    "llm_datadist.status",
    "llm_datadist.v2",
    "llm_datadist.v2.cache_manager",
    "llm_datadist.v2.llm_datadist",
    "llm_datadist.v2.llm_types",
)


def _public() -> dict[str, Any]:
    """Names that users import or reach, those of the transport interface included."""
    transport = importlib.import_module("datadist.transport")
    own = {n: v for n, v in vars(transport).items() if _is_own(v, transport.__name__, n)}
    assert len(own) > 10
    exported = {name: getattr(datadist, name) for name in datadist.__all__}
    return own | exported | {"CacheManager": CacheManager, "CacheTensor": CacheTensor}


def _is_own(value: object, module: str, name: str) -> bool:
    defined = inspect.isclass(value) or inspect.isfunction(value)
    return defined and getattr(value, "__module__", "") == module and not name.startswith("_")


def _callables() -> Iterator[tuple[str, Callable[..., Any], bool]]:
    """Every function and method that users may call; whether it must have a docstring of its own."""
    for name, value in _public().items():
        if not inspect.isclass(value):
            yield name, value, True
            continue
        for base in value.__mro__:
            if base.__module__.startswith("datadist"):
                yield from _methods(base)


def _methods(kind: type) -> Iterator[tuple[str, Callable[..., Any], bool]]:
    for name, member in vars(kind).items():
        label = f"{kind.__name__}.{name}"
        special = name.startswith("__") and name.endswith("__")
        if name.startswith("_") and not special:
            continue
        if isinstance(member, property):
            yield label, member.fget, True  # type: ignore[misc]
            if member.fset is not None:
                yield f"{label} (setter)", member.fset, False
            continue
        function = getattr(member, "__func__", member)
        ours = inspect.isfunction(function) and function.__module__.startswith("datadist")
        if ours and not _is_generated(function):
            yield label, function, not special


def _is_generated(function: Callable[..., Any]) -> bool:
    """Whether dataclass made it."""
    return bool(inspect.unwrap(function).__code__.co_filename == "<string>")


CALLABLES = {name: (function, documented) for name, function, documented in _callables()}


def test_all_of_the_api_is_looked_at() -> None:
    for name in (
        "LLMDataDist.link",
        "Pulling.pull_cache",
        "Cache.create_cpu_cache",
        "Transport.open",
    ):
        assert name in CALLABLES
    assert "LLMConfig.device_id (setter)" in CALLABLES
    assert len(CALLABLES) > 150


def test_annotations_are_complete() -> None:
    missing = []
    for name, (function, _) in CALLABLES.items():
        names = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
        annotated = inspect.get_annotations(function)
        missing += [(name, each) for each in [*names, "return"] if each not in annotated]
    assert missing == []


def test_annotations_can_be_read_at_run_time() -> None:
    unread = {}
    classes = {name: value for name, value in _public().items() if inspect.isclass(value)}
    functions = {name: function for name, (function, _) in CALLABLES.items()}
    each: Any
    for name, each in {**classes, **functions}.items():
        try:
            hints = get_type_hints(each)
        except Exception as error:
            unread[name] = repr(error)
            continue
        if not inspect.isclass(each):
            assert hints.keys() <= {*inspect.signature(each).parameters, "return"}, name
    assert unread == {}


def test_annotations_name_what_is_imported_late() -> None:
    code = (
        "import sys, typing, datadist;"
        "from datadist.transport import Link, Transport;"
        "assert 'numpy' not in sys.modules;"
        "hints = [typing.get_type_hints(f)['return'] for f in (datadist.Cache.numpy,"
        "    datadist.Cache.tensors.fget, datadist.LLMDataDist.cache_manager.fget)];"
        "print(*hints, typing.get_type_hints(Transport.check_table)['table'], sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    arrays, tensors, manager, table = done.stdout.splitlines()
    assert arrays.startswith(
        ("list[numpy.ndarray[", "list[NDArray[")
    )  # NumPy before 2.5, and from there
    assert tensors == "list[datadist.api.arrays.CacheTensor]"
    assert "CacheManager" in manager
    assert "RankTable" in table


@pytest.mark.parametrize("name", ["pull_cache", "pull_blocks", "push_cache", "push_blocks"])
def test_pydantic_can_validate_calls(name: str) -> None:
    pydantic = pytest.importorskip("pydantic")
    checked = pydantic.validate_call(config={"arbitrary_types_allowed": True})
    with pytest.raises(pydantic.ValidationError, match="tensor_num_per_layer"):
        checked(getattr(CacheManager, name))(None, None, None, tensor_num_per_layer="x")


def test_docstrings_say_something() -> None:
    functions = {name: function for name, (function, documented) in CALLABLES.items() if documented}
    assert [
        name for name, function in functions.items() if not (function.__doc__ or "").strip()
    ] == []


def test_classes_and_modules_have_docstrings() -> None:
    for name, value in _public().items():
        assert value.__doc__, name
        if inspect.isclass(value) and not issubclass(value, Enum):
            assert not value.__doc__.startswith(f"{name}("), f"{name}: made by dataclass"
    for name in DROP_IN:
        assert importlib.import_module(f"datadist.drop_in.{name}").__doc__, name


def test_the_wheel_says_that_it_is_typed_and_has_the_drop_in(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "datadist", tree / "datadist", ignore=ignore)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "datadist/py.typed" in names
    sources = {
        str(path.relative_to(ROOT)) for path in (ROOT / "datadist").rglob("*.py") if path.is_file()
    }
    assert sources <= set(names)
    assert not [name for name in names if name.startswith(("llm_datadist", "tests"))]


# -- against upstream ----------------------------------------------------------------------------


def _parameters(name: str) -> str:
    """The parameters of one of our constructors or methods, without ``self``, as text."""
    kind, _, method = name.partition(".")
    owner = _public()[kind]
    found = inspect.signature(getattr(owner, method) if method else owner)
    parameters = [p for p in found.parameters.values() if p.name not in ("self", "cls")]
    shown = [_parameter(p) for p in parameters]
    kinds = [p.kind for p in parameters]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        shown.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    return ", ".join(shown)


def _parameter(parameter: inspect.Parameter) -> str:
    value = parameter.default
    name = str(parameter.replace(annotation=parameter.empty, default=parameter.empty))
    if value is inspect.Parameter.empty:
        return name
    return f"{name}={value if isinstance(value, Enum) else repr(value)}"


def test_parameters_show_names_order_defaults_and_kinds() -> None:
    def sample(a: int, b: Any = Placement.HOST, *, c: str = "x", **more: Any) -> None: ...

    parameters = inspect.signature(sample).parameters.values()
    assert [_parameter(p) for p in parameters] == ["a", "b=Placement.HOST", "c='x'", "**more"]
    assert _parameters("LLMException") == upstream.SIGNATURES["LLMException"]


@pytest.mark.parametrize("name", upstream.SIGNATURES)
def test_parameters_are_those_of_upstream(name: str) -> None:
    _, expected = upstream.DIFFERENT.get(name, (None, upstream.SIGNATURES[name]))
    assert _parameters(name) == expected


@pytest.mark.parametrize("name", upstream.DIFFERENT)
def test_other_parameters_are_listed_as_deviations(name: str) -> None:
    number, ours = upstream.DIFFERENT[name]
    assert ours != upstream.SIGNATURES[name]
    page = (ROOT / "docs" / "api.md").read_text()
    (text,) = re.findall(rf"^{number}\. (.*?)(?=^\d+\. |\Z)", page, re.MULTILINE | re.DOTALL)
    assert f"`{name.rpartition('.')[2]}`" in text
    (row,) = [line for line in page.splitlines() if line.startswith("|") and f"`{name}`" in line]
    assert "| differs |" in row
    assert f"({number})" in row


def test_the_table_has_all_that_is_not_marked_as_an_extra() -> None:
    rows = re.findall(r"^\| (`.+?`) \| (\w+) \|", (ROOT / "docs" / "api.md").read_text(), re.M)
    extra = {n for names, status in rows if status == "extra" for n in re.findall("`(.+?)`", names)}
    ours = {f"{kind}.{name}" for kind, value in _public().items() for name in _own_methods(value)}
    aliases = {f"LlmConfig.{name}" for name in ("generate_options", "gen_options")}
    assert ours - extra - aliases == {name for name in upstream.SIGNATURES if "." in name}


def _own_methods(kind: object) -> set[str]:
    """Public methods of a class of the API, not of the transport interface."""
    if not inspect.isclass(kind) or issubclass(kind, Enum):
        return set()
    if kind.__module__ == "datadist.transport":
        return set()
    bases = [base for base in kind.__mro__ if base.__module__.startswith("datadist")]
    members = {name: member for base in bases for name, member in vars(base).items()}
    kinds = (FunctionType, classmethod, staticmethod)
    return {n for n, m in members.items() if isinstance(m, kinds) and not n.startswith("_")}
