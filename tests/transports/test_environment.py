"""Options of transports from the environment (environment.py)."""

from __future__ import annotations

import logging
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datadist import LLMException, LLMStatusCode
from datadist.engine.options import EngineOptions
from datadist.engine.starting import start_transport
from datadist.transport import Transport
from datadist.transports.environment import VARIABLES, options_from, variable_of
from datadist.transports.loader import list_backends, load_transport

KNOWN = {"populate": "", "huge_pages": "", "gid-index.v2": ""}


@given(st.sampled_from(sorted(KNOWN)), st.text("ab1", min_size=1))
def test_an_option_has_one_variable(name: str, value: str) -> None:
    environ = {variable_of("my-net", name): value, "DATADIST_JOB": "x", "PATH": "/"}
    assert options_from(environ, "my-net", KNOWN) == {name: value}
    assert options_from(environ, "my", None) != {name: value}
    assert options_from({variable_of("my-net", name): ""}, "my-net", KNOWN) == {}


def test_documented_variables_are_no_options() -> None:
    environ = dict.fromkeys(VARIABLES, "x")
    for backend in ("hccl", "auth", "peer", "runtime"):
        assert options_from(environ, backend, None) == {}


def _start(environ: dict[str, str], given: dict[str, str] | None = None) -> Transport:
    options = EngineOptions(backend="shm", extra={"shm": given or {}})
    with ExitStack() as closing:
        return start_transport(options, environ, closing)[1]


def test_the_environment_sets_options_and_code_comes_first() -> None:
    environ = {"DATADIST_SHM_POPULATE": "0", "DATADIST_SHM_HUGE_PAGES": "0"}
    assert _start(environ).describe()["populate"] is False
    shown = _start(environ, {"populate": "1"}).describe()
    assert (shown["populate"], shown["huge_pages"]) == (True, "0")


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("DATADIST_SHM_POPULAT", "1", "did you mean datadist.shm.populate?"),
        ("DATADIST_SHM_POPULATE", "yes", "is 'yes'"),
        ("DATADIST_SHM_THREADS", "0", "is '0'"),
        ("DATADIST_SHM_KERNEL", "z80", "is 'z80'"),
    ],
)
def test_a_wrong_variable_is_named(variable: str, value: str, said: str) -> None:
    with pytest.raises(LLMException, match=variable) as caught:
        _start({variable: value})
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("DATADIST_SMH_POPULATE", "DATADIST_SHM_POPULATE"),
        ("DATADIST_RUNTIMEDIR", "DATADIST_RUNTIME_DIR"),
        ("DATADIST_BACKENDS", "DATADIST_BACKEND"),
    ],
)
def test_a_misspelt_variable_is_a_warning(
    variable: str, meant: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "datadist"):
        _start({variable: "1", "DATADIST_RDMA_PORT": "1", "DATADIST_JOB": "a"})
    (record,) = [each for each in caplog.records if each.module == "environment"]
    assert f"there is no environment variable {variable}, " in record.getMessage()
    assert f"did you mean {meant}?" in record.getMessage()


def test_every_transport_here_declares_its_options() -> None:
    for backend in list_backends():
        assert load_transport(backend.name)[1].options is not None, backend
