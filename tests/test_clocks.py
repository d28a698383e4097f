"""No deadline depends on the date, which people and daemons set: no source of the product asks for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clocks import in_c, in_python, uses

ROOT = Path(__file__).parent.parent
SUFFIXES = {".py", ".pyx", ".c", ".cc", ".cpp", ".cu", ".h", ".hpp"}
NOT_THE_PRODUCT = {"tests", "roce", "build", ".venv"}

PERMITTED = {
    ("datadist/control/stale_files.py", "_is_stale", "time.time"): (
        "the age of a file is a difference of dates, and only decides what an init sweeps"
    ),
    ("datadist/control/runtime_dir.py", "_touch", "time.time"): (
        "as above; who sets the date has names touched too soon or too late"
    ),
    ("datadist/control/runtime_dir.py", "_touch", "os.utime"): "cleaners go by the date of files",
    ("datadist/cli/top.py", "screen", "time.strftime"): "people are told when they looked",
    ("datadist/cli/top.py", "_as_json", "time.time"): "programs are told when it was",
    ("plugins/shm/native/flight.c", "", "pthread_cond_timedwait"): (
        "the condition has CLOCK_MONOTONIC (pthread_condattr_setclock)"
    ),
}
"""Path, function and use, and why it may ask for the date."""


def _product() -> list[Path]:
    """Every source of core, plugins, examples and integrations."""
    return sorted(
        path
        for top in ("datadist", "plugins", "examples", "integrations")
        for path in (ROOT / top).rglob("*")
        if path.suffix in SUFFIXES and not NOT_THE_PRODUCT & set(path.relative_to(ROOT).parts)
    )


def test_only_what_is_listed_asks_for_the_date() -> None:
    found = {
        use for path in _product() for use in uses(str(path.relative_to(ROOT)), path.read_text())
    }
    assert found == set(PERMITTED)


def test_every_distribution_and_its_native_code_is_looked_at() -> None:
    looked_at = [path.relative_to(ROOT) for path in _product()]
    projects = [path.parent for path in ROOT.glob("*/*/pyproject.toml")]
    assert len(projects) > 3
    for project in projects:
        inside = [path for path in looked_at if path.is_relative_to(project.relative_to(ROOT))]
        assert any(path.suffix == ".py" for path in inside), project
    assert Path("plugins/shm/native/transfer.c") in looked_at
    package = ROOT / "datadist"
    assert {p.relative_to(ROOT) for p in package.rglob("*.py")} <= set(looked_at)


@pytest.mark.parametrize(
    "source",
    [
        "import time\ntime.time()",
        "import time\nclass A:\n    at = field(default_factory=time.time)",
        "import time\ndef f(now=time.time_ns): pass",
        "import time as t\nt.time()",
        "def f():\n    import time as t\n    return t.time()",
        "from time import time",
        "from time import time as now",
        "from time import monotonic, time_ns",
        "from time import *",
        "import time\nclock = getattr(time, 'time')",
        "import time\nclock = time\nclock.time()",
        "import time\nvars(time)['time']()",
        "import time\ntime.__dict__['time']()",
        "import time\ntime.clock_gettime(time.CLOCK_REALTIME)",
        "import time\ntime.clock_gettime(0)",
        "import time\ntime.clock_gettime(which)",
        "import time\ntime.clock_gettime_ns(time.CLOCK_TAI)",
        "from time import clock_gettime",
        "import time\ntime.localtime()",
        "import time\ntime.strftime('%s')",
        "from datadist.control.reactor import time\ntime.time()",
        "from datadist.control import reactor\nreactor.time.time()",
        "import datetime\ndatetime.datetime.now()",
        "import datetime as dt\ndt.datetime.utcnow()",
        "from datetime import datetime",
        "from datetime import date",
        "__import__('time').time()",
        "import importlib\nimportlib.import_module('time').time()",
        "from importlib import import_module as load\nload('time').time()",
        "import sys\nsys.modules['time'].time()",
        "import sys\nsys.modules.get('time').time()",
        "import numpy as np\nnp.datetime64('now')",
        "import ctypes\nctypes.CDLL(None).gettimeofday",
        "libc['clock_gettime']",
        "import subprocess\nsubprocess.run(['python', '-c', 'import time; time.time()'])",
    ],
)
def test_every_way_to_ask_for_the_date_is_seen(source: str) -> None:
    assert in_python(source)


@pytest.mark.parametrize(
    "source",
    [
        "import time\nfrom time import monotonic as now\ntime.monotonic() + now()",
        "import time\ntime.clock_gettime(time.CLOCK_BOOTTIME)",
        "import time as t\nclock, s = t.perf_counter, t.sleep(1)",
        "import threading, asyncio\nthreading.Event().wait(1)",
        "from datetime import timedelta",
        '"""Not time.time(), and no CLOCK_REALTIME."""',
        "self.time = 3\nseconds = record.time",
    ],
)
def test_clocks_that_nobody_sets_are_not_reported(source: str) -> None:
    assert in_python(source) == set()


@pytest.mark.parametrize(
    "source",
    [
        "clock_gettime(CLOCK_REALTIME, &t);",
        "clock_gettime(CLOCK_REALTIME_COARSE, &t);",
        "clock_gettime(which, &t);",
        "clock_gettime(0, &t);",
        "gettimeofday(&t, NULL);",
        "time_t now = time (NULL);",
        "pthread_cond_timedwait(&c, &m, &t);",
        "sem_timedwait(&s, &t);",
        "timerfd_create(CLOCK_REALTIME, 0);",
        "auto now = std::chrono::system_clock::now();",
        "timespec_get(&t, TIME_UTC);",
        "syscall(SYS_gettimeofday, &t, NULL);",
        'open("http://host"); time(NULL);',
        'print("a \\" // b"); time(NULL);',
        'print("/*"); time(NULL); print("*/");',
        'if (c == \'"\') print("//"); time(NULL);',
        'print("in two \\\n// lines"); time(NULL);',
        'print(R"(" // )"); time(NULL);',
        'print(R"x(")" // )x"); time(NULL);',
        "time /* of the day */ (NULL);",
        "a = b //* c */ time(NULL)\n; time(NULL);",
        'dlsym(NULL, "CLOCK_REALTIME");',
    ],
)
def test_native_code_that_asks_for_the_date_is_seen(source: str) -> None:
    assert in_c(source)


def test_other_native_code_is_not_reported() -> None:
    source = """
    /* not CLOCK_REALTIME, nor gettimeofday() */
    clock_gettime(CLOCK_MONOTONIC, &t); // time(NULL)
    print("http://host"); // time(NULL) "
    // a comment of two lines \\
       time(NULL)
    c = '"'; /* time(NULL) */ d = '"';
    n = 1'000'000; // time(NULL)
    pthread_condattr_setclock(&a, CLOCK_MONOTONIC);
    deadline_time(3); t.time = 1;
    """
    assert in_c(source) == set()
