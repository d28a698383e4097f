"""Whole runs of pytest with the plugin: what tests leave, options, isolation, installation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.inner_run import PLUGIN, Ran, environ, left_running, run, write

MARK = f"8{os.getpid():07d}"
"""Begins the seconds of sleeps: another worker, or another run, does the same at the same time."""
LEAVING = """
import json, os, subprocess, sys, threading, time
from multiprocessing import shared_memory
import pytest
from datadist import LLMDataDist, LLMRole

OPTIONS = {"llm.EnableCacheManager": "1", "llm.MemPoolConfig": '{"memory_size": 1048576}'}
TABLE = json.dumps({"version": "1.0", "status": "completed", "server_count": "1", "server_list": [
    {"server_id": "h", "device": [{"device_id": r, "rank_id": r} for r in "01"]}]})
kept = []


def an_engine(isolation):
    engine = LLMDataDist(LLMRole.MIX, 7)
    engine.init(OPTIONS)
    return engine

def test_engine(datadist_isolation):
    an_engine(datadist_isolation)

def test_process(datadist_isolation):
    subprocess.Popen(["sleep", "MARK1"])

def test_orphan(datadist_isolation):
    wait = "until grep -q ^sleep /proc/$!/cmdline; do :; done"
    subprocess.run(["sh", "-c", f"sleep MARK2 > /dev/null 2>&1 & {wait}"], check=True)

def test_thread(datadist_isolation):
    threading.Thread(target=time.sleep, args=(60,), name="left", daemon=True).start()

def test_memfd(datadist_isolation):
    kept.append(os.memfd_create("left"))

def test_shm(datadist_isolation):
    kept.append(shared_memory.SharedMemory(create=True, size=4096))
    print("NAME", kept[-1].name)

def test_killed_engine(datadist_isolation):
    code = "import os; from test_it import an_engine; an_engine(None); os._exit(0)"
    subprocess.run([sys.executable, "-c", code], check=True)

def test_failed_and_left(datadist_isolation):
    subprocess.Popen(["sleep", "MARK3"])
    assert False

def test_clean(datadist_isolation):
    an_engine(datadist_isolation).finalize()
    subprocess.run(["true"], check=True)
    thread = threading.Thread(target=time.sleep, args=(0.05,))
    thread.start()
    memory = shared_memory.SharedMemory(create=True, size=4096)
    memory.close()
    memory.unlink()

def link_and_leave(engine):
    engine.link("another", {1: 0, 2: 1}, TABLE)

def start_a_thread(engine):
    threading.Thread(target=time.sleep, args=(60,), name="left there", daemon=True).start()

def start_a_process(engine):
    subprocess.Popen(["sleep", "MARK4"])

def crash(engine):
    os.kill(os.getpid(), 11)

def test_worker_link(datadist_pair):
    datadist_pair[0].run(link_and_leave)

def test_worker_thread(datadist_pair):
    datadist_pair[0].run(start_a_thread)

def test_worker_process(datadist_pair):
    datadist_pair[1].run(start_a_process)

def test_worker_busy(datadist_pair):
    datadist_pair[0].start(time.sleep, 0)

def test_worker_crashed(datadist_pair):
    call = datadist_pair[0].start(crash)
    while not call.done:
        time.sleep(0.01)
""".replace("MARK", MARK)
NAMED = {
    "test_engine": "LLMDataDist(MIX, cluster_id=7, backend='shm'), which was not finalized",
    "test_process": f"(sleep {MARK}1), which still ran",
    "test_orphan": f"(sleep {MARK}2), which still ran",
    "test_thread": "thread 'left' (a daemon), which still runs",
    "test_memfd": "shared memory memfd:left",
    "test_shm": "shared memory dev/shm/",
    "test_killed_engine": "the engine with cluster id 7 in the runtime directory: its process has ended",
    "test_worker_link": "link 'another' (comm id 2) of LLMDataDist(PROMPT, cluster_id=1",
    "test_worker_thread": "thread 'left there' (a daemon), which still runs; in Worker(PROMPT, cluster 1",
    "test_worker_process": f"(sleep {MARK}4), which still runs; in Worker(DECODER, cluster 2",
    "test_worker_busy": "which still runs sleep or whose result nobody took",
    "test_worker_crashed": "ended with signal SIGSEGV",
}


@pytest.fixture(scope="module")
def leaving(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A run in which every test but one leaves something."""
    folder = tmp_path_factory.mktemp("leaving")
    write(folder, LEAVING)
    return run(folder, "-p", "no:randomly", "-s", LEAVING=str(folder))


@pytest.mark.parametrize("name", NAMED)
def test_what_a_test_leaves_fails_it_and_is_named(leaving: Ran, name: str) -> None:
    assert leaving.outcomes[name] == "error", leaving.output
    assert NAMED[name] in leaving.texts[name]


def test_each_test_is_blamed_for_its_own(leaving: Ran) -> None:
    assert leaving.names("error") == set(NAMED)
    assert leaving.outcomes["test_clean"] == "passed"
    for name, text in leaving.texts.items():
        if name in NAMED:
            assert text.count("\n- ") == 1, text


def test_a_test_that_failed_gets_a_section(leaving: Ran) -> None:
    assert leaving.outcomes["test_failed_and_left"] == "failed"
    assert f"(sleep {MARK}3), which still ran" in leaving.output


def test_what_was_left_is_cleaned(leaving: Ran) -> None:
    assert left_running(f"LEAVING={leaving.folder}") == []
    (name,) = [line.split()[-1] for line in leaving.output.splitlines() if "NAME " in line]
    assert not Path("/dev/shm", name).exists()


QUIET = """
import subprocess

def test_it(datadist_isolation):
    subprocess.Popen(["sleep", "60"])
"""


@pytest.mark.parametrize(
    ("ini", "said"),
    [
        ("datadist_leftovers = warn\n", "LeftBehind: test_it.py::test_it left behind"),
        ("datadist_leftovers = ignore\n", "1 passed"),
        ("datadist_leftovers_allowed = process * (sleep 60)*\n", "1 passed"),
    ],
)
def test_leftovers_can_be_warnings_or_nothing(tmp_path: Path, ini: str, said: str) -> None:
    write(tmp_path, QUIET, ini)
    ran = run(tmp_path)
    assert ran.status == 0
    assert said in ran.output
    assert ("LeftBehind" in ran.output) == ("warn" in ini)


@pytest.mark.parametrize(
    ("ini", "said"),
    [
        ("datadist_leftovers = some\n", "datadist_leftovers is 'some', expected one of fail, warn"),
        ("datadist_timeout = 0\n", "datadist_timeout is '0', expected seconds above 0"),
    ],
)
def test_a_wrong_option_is_said(tmp_path: Path, ini: str, said: str) -> None:
    write(tmp_path, QUIET, ini)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "pytest_datadist.plugin", "-p", "no:cacheprovider"],
        cwd=tmp_path, env=environ(), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert said in done.stderr


INERT = """
import os, sys

def test_nothing_is_imported():
    assert not {"datadist", "numpy", "pydantic"} & set(sys.modules)

def test_nothing_is_made():
    assert not os.path.exists(os.environ["DATADIST_RUNTIME_DIR"])
"""


def test_nothing_happens_until_a_fixture_is_used(tmp_path: Path) -> None:
    write(tmp_path, INERT)
    ran = run(tmp_path, "-p", "no:hypothesispytest", "-p", "no:randomly", "-p", "no:xdist")
    assert ran.names("passed") == {"test_nothing_is_imported", "test_nothing_is_made"}, ran.output


DROP_IN = """
import llm_datadist

def role(engine):
    import llm_datadist
    return llm_datadist.LLMRole.PROMPT.name, isinstance(engine, llm_datadist.LLMDataDist)

def test_it(datadist_pair):
    assert datadist_pair[0].run(role) == ("PROMPT", True)
"""


def test_llm_datadist_can_be_imported_with_the_option_only(tmp_path: Path) -> None:
    write(tmp_path, DROP_IN, "datadist_as_llm_datadist = true\n")
    assert run(tmp_path).status == 0
    write(tmp_path, DROP_IN)
    ran = run(tmp_path)
    assert ran.status == pytest.ExitCode.INTERRUPTED
    assert "No module named 'llm_datadist'" in ran.output


MORE = """


import pytest

ONE_SIDED = {"llm.EnableRemoteCacheAccessible": "1"}

@pytest.mark.datadist(pool=4 << 20, roles=["MIX", "MIX"], options=ONE_SIDED)
def test_a_marker(datadist_pair):
    assert [worker.role for worker in datadist_pair] == ["MIX", "MIX"]

def test_two_clusters(datadist_cluster):
    first, second = datadist_cluster(2), datadist_cluster(3, link=False)
    assert [worker.cluster_id for worker in (*first, *second)] == [1, 2, 3, 4, 5]
    assert first[0].comm_id == 1
    assert second[0].comm_id is None
    second[2].keep(make_cache, 1.0)

def test_what_does_not_start(datadist_cluster):
    with pytest.raises(Exception, match="LLM_PARAM_INVALID"):
        datadist_cluster(2, options={"llm.TransferBackend": "none"})
    assert len(datadist_cluster(2)) == 2
"""


def test_the_first_test_of_the_documents_passes(tmp_path: Path) -> None:
    pages = PLUGIN / "README.md", PLUGIN.parents[1] / "docs" / "ci.md"
    shown = [
        re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)[0] for page in pages
    ]
    assert [text.splitlines()[-1] for text in shown] == [
        "    assert decoder.run(pull, target) == 7.0"
    ] * 2
    write(tmp_path, shown[1] + MORE)
    ran = run(tmp_path)
    assert ran.status == 0, ran.output
    assert len(ran.names("passed")) == 4


MISTAKES = """
import pytest

@pytest.mark.datadist(3)
def test_a_number(datadist_pair):
    pass

@pytest.mark.datadist(pol=3)
def test_a_name(datadist_pair):
    pass
"""


def test_a_marker_with_a_mistake_is_an_error_that_says_what_it_takes(tmp_path: Path) -> None:
    write(tmp_path, MISTAKES)
    ran = run(tmp_path)
    assert ran.names("error") == {"test_a_number", "test_a_name"}
    assert "takes only arguments with names" in ran.output
    assert "pol is no argument of datadist_cluster, which has roles, pool, options," in ran.output


ISOLATED = """
import os, time
import pytest
from datadist import LLMDataDist, LLMRole

OPTIONS = {"llm.EnableCacheManager": "1", "llm.MemPoolConfig": '{"memory_size": 1048576}'}

def surroundings(engine):
    return os.environ["DATADIST_JOB"], os.environ["DATADIST_RUNTIME_DIR"], os.getcwd()

@pytest.mark.parametrize("number", range(4))
def test_surroundings(datadist_isolation, datadist_pair, number, monkeypatch, tmp_path):
    here = os.environ["DATADIST_JOB"], os.environ["DATADIST_RUNTIME_DIR"], os.getcwd()
    assert here[:2] == (datadist_isolation.job, str(datadist_isolation.runtime_dir))
    assert datadist_pair.run_all(surroundings) == [here, here]
    print("JOB", here[0], "MEETS", here[1])

def test_worker_of_xdist_by_itself():
    print("JOB", os.environ["DATADIST_JOB"], "MEETS", os.environ["DATADIST_RUNTIME_DIR"])
    engine = LLMDataDist(LLMRole.MIX, 1)
    engine.init(OPTIONS)
    engine.finalize()
    assert os.path.isdir(os.environ["DATADIST_RUNTIME_DIR"])
"""


def test_tests_and_workers_of_xdist_are_apart(tmp_path: Path) -> None:
    write(tmp_path, ISOLATED)
    ran = run(tmp_path, "-n", "2", "-rP", TMPDIR=str(tmp_path))
    assert ran.status == 0, ran.output
    lines = [line.split() for line in ran.output.splitlines() if line.startswith("JOB ")]
    assert len({line[1] for line in lines}) == len({line[3] for line in lines}) == 5
    assert list(tmp_path.glob("pytest-datadist-*")) == []


def test_what_the_user_has_set_is_kept(tmp_path: Path) -> None:
    write(
        tmp_path, "import os\n\ndef test_it():\n    assert os.environ['DATADIST_JOB'] == 'mine'\n"
    )
    assert run(tmp_path, DATADIST_JOB="mine").status == 0


def test_the_entry_point_loads_the_plugin(tmp_path: Path) -> None:
    declared = (PLUGIN / "pyproject.toml").read_text()
    (line,) = [each for each in declared.splitlines() if "pytest_datadist.plugin" in each]
    info = tmp_path / "site" / "pytest_datadist-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pytest-datadist\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[pytest11]\n" + line.replace('"', "") + "\n")
    write(tmp_path, "def test_it(datadist_isolation):\n    assert datadist_isolation.job\n")
    ran = run(tmp_path, plugin=False, PYTHONPATH=f"{PLUGIN}:{info.parent}")
    assert ran.status == 0, ran.output
