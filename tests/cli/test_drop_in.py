"""Programs that import llm_datadist, run unedited; and that nothing is shadowed unasked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXPORTS = [
    "LLMDataDist",
    "LLMRole",
    "LlmConfig",
    "LLMConfig",
    "LLMClusterInfo",
    "LLMStatusCode",
    "LLMException",
    "Status",
    "DataType",
    "CacheDesc",
    "CacheKey",
    "CacheKeyByIdAndIndex",
    "BlocksCacheKey",
    "Cache",
    "KvCache",
    "Placement",
    "RegisterMemStatus",
    "Memtype",
    "MemInfo",
    "LayerSynchronizer",
    "TransferConfig",
    "TransferWithCacheKeyConfig",
    "CacheTask",
]
"""The exports of the package (LLM-DataDist API, exports), without the first version's."""

IMPORTS = f"""
from llm_datadist import {", ".join(EXPORTS)}
import llm_datadist
from llm_datadist.configs import LLMConfig as Config
from llm_datadist.data_type import dtype_to_np_dtype, np_dtype_to_dtype, valid_np_dtypes
from llm_datadist.status import LLMStatusCode as Code
from llm_datadist.v2 import llm_types
import datadist, numpy
assert sorted(llm_datadist.v2_list) == sorted({EXPORTS!r})
for name in {EXPORTS!r}:
    assert getattr(llm_datadist, name) is getattr(datadist, name), name
assert (Config, Code) == (LLMConfig, LLMStatusCode)
assert llm_types.CacheDesc is CacheDesc and llm_types.Cache is Cache
assert dtype_to_np_dtype[DataType.DT_BF16] is numpy.float16
assert np_dtype_to_dtype[numpy.float16] is DataType.DT_FLOAT16
assert numpy.int64 in valid_np_dtypes and DataType.DT_BF16 not in np_dtype_to_dtype.values()
print("imported", flush=True)
"""


def _python(
    *arguments: str, cwd: Path, text: str | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    env = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **environ}
    return subprocess.run(
        command,
        cwd=cwd,
        env=env,
        input=text,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def _run(
    *arguments: str, cwd: Path, text: str | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Call ``datadist run``."""
    return _python("-m", "datadist", "run", *arguments, cwd=cwd, text=text, **environ)


def _succeeds(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A folder with another package of that name, which cannot be mistaken for ours."""
    package = tmp_path / "other" / "llm_datadist"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("real = True\n")
    return package.parent


# -- datadist run ----------------------------------------------------------------------------------


def test_every_name_is_imported_by_a_script_and_its_child(tmp_path: Path) -> None:
    (tmp_path / "names.py").write_text(IMPORTS)
    code = 'import subprocess, sys; subprocess.run([sys.executable, "names.py"], check=True)'
    (tmp_path / "script.py").write_text(IMPORTS + code)
    assert _succeeds(_run("script.py", cwd=tmp_path)) == "imported\n" * 2


def test_a_spawned_process_of_a_module_imports_them_too(tmp_path: Path) -> None:
    package = tmp_path / "serving"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "main.py").write_text(
        "import multiprocessing\n"
        "def check():\n"
        f"    exec({IMPORTS!r})\n"
        'if __name__ == "__main__":\n'
        "    check()\n"
        '    child = multiprocessing.get_context("spawn").Process(target=check)\n'
        "    child.start(), child.join()\n"
        "    assert child.exitcode == 0\n"
    )
    assert _succeeds(_run("-m", "serving.main", cwd=tmp_path)) == "imported\n" * 2


def test_an_installed_package_is_shadowed_for_the_program_only(tmp_path: Path, other: Path) -> None:
    (tmp_path / "script.py").write_text("import llm_datadist; print(hasattr(llm_datadist, 'real'))")
    path = {"PYTHONPATH": str(other)}
    assert _succeeds(_run("script.py", cwd=tmp_path, **path)) == "False\n"
    assert _succeeds(_python("script.py", cwd=tmp_path, **path)) == "True\n"
    code = "import datadist, llm_datadist; print(hasattr(llm_datadist, 'real'))"
    assert _succeeds(_python("-c", code, cwd=tmp_path, **path)) == "True\n"
    alone = _python("-c", "import datadist, llm_datadist", cwd=tmp_path)
    assert "No module named 'llm_datadist'" in alone.stderr


def test_arguments_streams_and_status_are_the_programs_own(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import sys; print(sys.argv, sys.stdin.read()); print('why', file=sys.stderr); sys.exit(7)"
    )
    arguments = ["script.py", "-m", "--help", "--", "a b", ""]
    done = _run(*arguments, cwd=tmp_path, text="given")
    assert (done.returncode, done.stdout, done.stderr) == (7, f"{arguments} given\n", "why\n")
    (tmp_path / "killed.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    assert _run("killed.py", cwd=tmp_path).returncode == -signal.SIGTERM


def test_what_cannot_be_run_is_said(tmp_path: Path) -> None:
    done = _run(cwd=tmp_path)
    assert (done.returncode, "name a script" in done.stderr) == (2, True)
    done = _run("absent.py", cwd=tmp_path)
    assert (done.returncode, "there is no script 'absent.py'" in done.stderr) == (2, True)
    done = _run("-m", "absent_module", cwd=tmp_path)
    assert (done.returncode, "absent_module" in done.stderr) == (1, True)


def test_run_refuses_where_another_package_is_imported_already(tmp_path: Path, other: Path) -> None:
    (other / "sitecustomize.py").write_text("import llm_datadist\n")
    (tmp_path / "script.py").write_text("print('ran')")
    done = _run("script.py", cwd=tmp_path, PYTHONPATH=str(other))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"llm_datadist is imported already, from {other}" in done.stderr


@pytest.mark.parametrize("arguments", [["script.py"], ["-m", "script"]])
def test_run_refuses_where_another_package_lies_beside_the_program(
    other: Path, arguments: list[str]
) -> None:
    (other / "script.py").write_text("import llm_datadist; print(hasattr(llm_datadist, 'real'))")
    done = _run(*arguments, cwd=other)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{other}/llm_datadist/__init__.py lies beside the program" in done.stderr


@pytest.mark.skipif(
    sys.version_info < (3, 11),
    reason="this Python is older than 3.11, which brought PYTHONSAFEPATH",
)
def test_a_safe_path_makes_packages_beside_the_program_harmless(other: Path) -> None:
    (other / "script.py").write_text("import llm_datadist; print(hasattr(llm_datadist, 'real'))")
    assert _succeeds(_run("script.py", cwd=other, PYTHONSAFEPATH="1")) == "False\n"


# -- from code -----------------------------------------------------------------------------------


def test_a_fresh_process_installs_it_for_itself_and_its_children(
    tmp_path: Path, other: Path
) -> None:
    (tmp_path / "names.py").write_text(IMPORTS)
    code = (
        "import datadist\n"
        "datadist.install_as_llm_datadist()\n"
        "datadist.install_as_llm_datadist()\n"
        f"{IMPORTS}\n"
        "datadist.install_as_llm_datadist()\n"
        "import os, subprocess, sys\n"
        "assert os.environ['PYTHONPATH'].split(os.pathsep)[1:] == sys.argv[1:]\n"
        "subprocess.run([sys.executable, 'names.py'], check=True)\n"
    )
    done = _python("-c", code, str(other), cwd=tmp_path, PYTHONPATH=str(other))
    assert _succeeds(done) == "imported\n" * 2


def test_installing_refuses_where_another_package_is_imported_already(
    tmp_path: Path, other: Path
) -> None:
    code = (
        "import llm_datadist, datadist, os, sys\n"
        "before = dict(os.environ), list(sys.path)\n"
        "try:\n"
        "    datadist.install_as_llm_datadist()\n"
        "except RuntimeError as error:\n"
        "    print(type(error).__name__, error)\n"
        "assert before == (dict(os.environ), sys.path) and llm_datadist.real\n"
    )
    said = _succeeds(_python("-c", code, cwd=tmp_path, PYTHONPATH=str(other)))
    assert said.startswith(f"DropInError llm_datadist is imported already, from {other}")
    assert "before anything imports it" in said
    assert "datadist run" in said


def test_the_names_of_the_module(tmp_path: Path) -> None:
    code = (
        "import datadist; datadist.install_as_llm_datadist()\n"
        "from llm_datadist import *\n"
        "assert LLMDataDist is datadist.LLMDataDist and 'Tensor' not in globals()\n"
        "import llm_datadist\n"
        "for name in ('nonsense', 'CacheManager', 'PushType', 'Tensor'):\n"
        "    try:\n"
        "        getattr(llm_datadist, name)\n"
        "    except (AttributeError, ImportError) as error:\n"
        "        print(type(error).__name__, error)\n"
        "try:\n"
        "    from llm_datadist.data_type import nonsense\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "from llm_datadist.v2.cache_manager import CacheManager\n"
        "from llm_datadist.v2.llm_datadist import LLMDataDist as again\n"
        "assert again is LLMDataDist\n"
    )
    lines = _succeeds(_python("-c", code, cwd=tmp_path)).splitlines()
    assert lines[:3] == [
        f"AttributeError Module 'llm_datadist' has no attribute '{name}'"
        for name in ("nonsense", "CacheManager", "PushType")
    ]
    assert lines[3] == "ModuleNotFoundError No module named 'llm_datadist_v1'"
    assert "cannot import name 'nonsense'" in lines[4]
