"""The plugin: options, the environment of the process, and the fixtures.

Until a test asks for a fixture nothing of datadist is imported and nothing is looked at.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import Any

import pytest

from pytest_datadist import cluster
from pytest_datadist.cluster import Cluster
from pytest_datadist.environment import Environment
from pytest_datadist.errors import LeftBehind
from pytest_datadist.isolation import Isolation
from pytest_datadist.pool import Pool
from pytest_datadist.watch import Watch

MODES = ("fail", "warn", "ignore")
_environment = pytest.StashKey[Environment]()
_failed = pytest.StashKey[bool]()
_left = pytest.StashKey[list[str]]()
"""What a test has left so far, in words."""
_numbers = itertools.count(1)


# -- options -----------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options of the configuration file."""
    parser.addini("datadist_leftovers", f"what a test leaves: {', '.join(MODES)}", default="fail")
    parser.addini(
        "datadist_leftovers_allowed",
        "patterns (fnmatch) of leftovers that are none",
        type="linelist",
    )
    parser.addini(
        "datadist_check_pools", "caches that are not freed in workers are leftovers", type="bool",
        default=False,
    )  # fmt: skip
    parser.addini("datadist_timeout", "seconds that a function may take in a worker", default="60")
    parser.addini(
        "datadist_as_llm_datadist", "`import llm_datadist` imports datadist", type="bool",
        default=False,
    )  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Provide `llm_datadist` before the first conftest or test module may import it."""
    if early_config.getini("datadist_as_llm_datadist"):
        from datadist.drop_in import DropInError, install_as_llm_datadist

        try:
            install_as_llm_datadist()
        except DropInError as error:
            raise pytest.UsageError(f"datadist_as_llm_datadist: {error}") from None


def pytest_configure(config: pytest.Config) -> None:
    """Give this process a job and a runtime directory of its own."""
    config.addinivalue_line(
        "markers",
        "datadist(pool=BYTES, options={...}, roles=[...]): what datadist_pair makes its engines with",
    )
    _mode(config)
    _timeout(config)
    config.stash[_environment] = environment = Environment()
    environment.set()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Remove the directories, after the fixtures: pytest-xdist ends its workers soon after this."""
    session.config.stash[_environment].remove()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Take that back."""
    environment = config.stash.get(_environment, None)
    if environment is not None:
        environment.restore()


def _mode(config: pytest.Config) -> str:
    mode: str = config.getini("datadist_leftovers")
    if mode not in MODES:
        raise pytest.UsageError(
            f"datadist_leftovers is {mode!r}, expected one of {', '.join(MODES)}"
        )
    return mode


def _timeout(config: pytest.Config) -> float:
    text = config.getini("datadist_timeout")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise pytest.UsageError(f"datadist_timeout is {text!r}, expected seconds above 0")
    return seconds


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note whether a test has failed: then what it leaves is no failure of its own."""
    report = yield
    if report.failed:
        item.stash[_failed] = True
    return report


# -- fixtures ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def _datadist_pool() -> Iterator[Pool]:
    """Processes that wait for tests."""
    pool = Pool()
    try:
        yield pool
    finally:
        pool.close()


@pytest.fixture
def datadist_isolation(request: pytest.FixtureRequest, _datadist_pool: Pool) -> Iterator[Isolation]:
    """A job and a runtime directory for this test alone; what the test leaves is found and cleaned."""
    environment = request.config.stash[_environment]
    number = next(_numbers)
    isolation = Isolation(environment.tests_folder / str(number), f"{environment.name}-{number}")
    left: list[str] = []
    request.node.stash[_left] = left
    with ExitStack() as stack:
        stack.callback(isolation.leave)
        isolation.enter()
        watch = Watch(isolation, lambda: _datadist_pool.pids)
        try:
            yield isolation
        finally:
            left += watch.left()
    _report(request.node, left)


@pytest.fixture
def datadist_cluster(
    request: pytest.FixtureRequest, datadist_isolation: Isolation, _datadist_pool: Pool
) -> Iterator[Callable[..., Cluster]]:
    """Make engines in processes of their own, and link them: ``datadist_cluster(3)``.

    ``roles`` are names of ``LLMRole``, ``pool`` the bytes of each device pool, ``options`` those of
    ``init``. ``link=False`` links nothing; ``engines=False`` gives processes without engines, whose
    functions get none.
    """
    made = ExitStack()
    check_pools = bool(request.config.getini("datadist_check_pools"))
    left = request.node.stash[_left]

    def end(which: Cluster) -> None:
        left.extend(cluster.end(_datadist_pool, which, datadist_isolation, check_pools))

    ids = itertools.count(1)

    def make(count: int, **settings: Any) -> Cluster:
        shape = cluster.shape_of(count, settings)
        first, *_ = itertools.islice(ids, shape.count)
        seconds = _timeout(request.config)
        found = cluster.make(_datadist_pool, shape, datadist_isolation, seconds, first)
        made.callback(end, found)
        return found

    with made:
        yield make


@pytest.fixture
def datadist_pair(
    request: pytest.FixtureRequest, datadist_cluster: Callable[..., Cluster]
) -> Cluster:
    """Two linked engines: a PROMPT with cluster id 1 and a DECODER with cluster id 2."""
    marker = request.node.get_closest_marker("datadist")
    if marker is not None and marker.args:
        raise TypeError(
            f"the marker datadist has {', '.join(map(repr, marker.args))}, and takes only arguments with "
            "names; for another number of workers use the fixture datadist_cluster"
        )
    return datadist_cluster(2, **(marker.kwargs if marker else {}))


# -- leftovers ---------------------------------------------------------------------------------


def _report(node: pytest.Item, left: list[str]) -> None:
    """Fail, warn or say nothing about what a test left."""
    mode = _mode(node.config)
    allowed = node.config.getini("datadist_leftovers_allowed")
    texts = [text for text in left if not any(fnmatchcase(text, each) for each in allowed)]
    if not texts or mode == "ignore":
        return
    text = "\n".join(
        [f"{node.nodeid} left behind, and it was cleaned:", *(f"- {t}" for t in texts)]
    )
    if node.stash.get(_failed, False):
        node.add_report_section("teardown", "datadist", text)
    elif mode == "warn":
        warnings.warn(LeftBehind(text), stacklevel=1)
    else:
        pytest.fail(text, pytrace=False)
