"""A notebook's cell that is run twice: the error names the engine that runs, and how to get it."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
from datadist import *

config = LLMConfig()
config.enable_cache_manager = True
config.mem_pool_cfg = '{"memory_size": 1048576}'

def cell():
    engine = LLMDataDist(LLMRole.MIX, 7)
    engine.init(config.generate_options())
    return engine

engine = cell()
try:
    engine = cell()
except LLMException as error:
    print(error.status_code.name, error)
assert LLMDataDist.llm_engine_instance is engine
LLMDataDist.llm_engine_instance.finalize()
cell().finalize()
"""


def test_the_second_engine_of_a_process_is_refused_in_words() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True,
                          check=False, timeout=120)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("LLM_FAILED LLMDataDist(MIX, cluster_id=7, ")
    assert "go on with that engine, which is LLMDataDist.llm_engine_instance" in done.stdout
    assert "LLMDataDist.llm_engine_instance.finalize()" in done.stdout
