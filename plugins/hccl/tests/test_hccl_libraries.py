"""Finding the vendor libraries: none, some, others, and what users are told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import hccl_sim
import pytest
from datadist_hccl import abi
from datadist_hccl.libraries import OVERRIDE

PROBE = "from datadist_hccl import HcclTransport as T; print(T.probe())"
NAMED = """
from datadist import *
config = LLMConfig()
config.enable_cache_manager = True
config.transfer_backend = "hccl"
config.mem_pool_cfg = '{"memory_size": 4194304}'
try:
    LLMDataDist(LLMRole.MIX, 1).init(config.generate_options())
except LLMException as error:
    print(error.status_code.name, error)
config.transfer_backend = "shm"
engine = LLMDataDist(LLMRole.MIX, 1)
engine.init(config.generate_options())
print("then:", engine.backend)
engine.finalize()
"""


def _run(code: str, **environ: str) -> str:
    own = {k: v for k, v in os.environ.items() if k not in (OVERRIDE, "LD_LIBRARY_PATH")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=own | environ, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_without_cann_every_library_is_named_with_the_loaders_text() -> None:
    text = _run(PROBE)
    assert "usable=False" in text
    for name in ("libascendcl.so", "libacl_rt.so", "libhcomm.so", "libhccl.so"):
        assert f"{name}: cannot open shared object file" in text
    assert "set_env.sh" in text


def test_the_command_says_why_it_cannot_be_used() -> None:
    text = _run("from datadist.cli import main; main(['backends'])")
    row = next(line for line in text.splitlines() if "datadist-hccl" in line)
    assert " no " in row
    assert "libhcomm.so" in row
    assert "* auto chooses shm" in text


def test_a_backend_that_is_named_and_cannot_be_used_ends_the_search(tmp_path: Path) -> None:
    text = _run(NAMED, DATADIST_RUNTIME_DIR=str(tmp_path / "run"))
    assert "LLM_PARAM_INVALID" in text
    assert "libhcomm.so: cannot open shared object file" in text
    assert "then: shm" in text


@pytest.mark.parametrize("missing", [["HcclCommPrepare"], ["HcclBatchGet", "aclrtStreamAbort"]])
def test_every_missing_function_is_named(missing: list[str]) -> None:
    text = _run(PROBE, **{OVERRIDE: str(hccl_sim.build(missing))})
    assert "usable=False" in text
    for name in abi.ACL | abi.HCCL:
        assert (name in text) is (name in missing), name


@pytest.mark.parametrize(
    "names",
    [("libascendcl.so", "libhcomm.so"), ("libacl_rt.so", "libhccl.so")],
)
def test_libraries_under_their_newer_and_older_names(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    for name in names:
        shutil.copy(hccl_sim.build(), tmp_path / name)
    text = _run(PROBE, LD_LIBRARY_PATH=str(tmp_path))
    assert "usable=True" in text


def test_functions_may_be_spread_over_the_libraries(tmp_path: Path) -> None:
    shutil.copy(hccl_sim.build(abi.HCCL), tmp_path / "libascendcl.so")
    shutil.copy(hccl_sim.build(["HcclBatchPut"]), tmp_path / "libhcomm.so")
    shutil.copy(hccl_sim.build(), tmp_path / "libhccl.so")
    assert "libascendcl.so, libhcomm.so, libhccl.so" in _run(PROBE, LD_LIBRARY_PATH=str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"soc": "Ascend310P3"}, "the chip Ascend310P3 is not supported"),
        ({"soc": "Ascend910_9589"}, "the chip Ascend910_9589 is not supported"),
        ({"devices": 0}, "no NPU is visible"),
        ({"soc": "Ascend910_9391"}, "usable=True"),
    ],
)
def test_devices_that_are_supported(settings: dict[str, object], reason: str) -> None:
    assert reason in _run(PROBE, **hccl_sim.environment("/nonexistent", **settings))


def test_importing_the_plugin_loads_nothing() -> None:
    maps = "print(open('/proc/self/maps').read())"
    environ = hccl_sim.environment("/nonexistent")
    assert "libascend_sim" not in _run(f"import datadist_hccl; {maps}", **environ)
    assert "libascend_sim" in _run(f"{PROBE}; {maps}", **environ)
