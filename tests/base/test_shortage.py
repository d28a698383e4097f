"""What is said where the system refuses a resource (shortage.py)."""

from __future__ import annotations

import errno
import os

import pytest

from datadist import LLMException, LLMStatusCode
from datadist.base import shortage
from datadist.status import system_errors


def _refused(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (_refused(errno.EMFILE), "ulimit -n"),
        (_refused(errno.ENFILE), "fs.file-max"),
        (_refused(errno.ENOMEM), "ulimit -v"),
        (MemoryError(), "ulimit -v"),
        (ImportError("x.so: failed to map segment from shared object"), "ulimit -v"),
    ],
)
def test_a_shortage_names_its_limit(error: Exception, said: str) -> None:
    assert shortage.is_shortage(error)
    assert said in shortage.explain(error)
    assert (str(error) or type(error).__name__) in shortage.explain(error)
    with (
        pytest.raises(LLMException, match="it cannot start: ") as caught,
        system_errors("it cannot start"),
    ):
        raise error
    memory = isinstance(error, MemoryError)
    code = LLMStatusCode.LLM_OUT_OF_MEMORY if memory else LLMStatusCode.LLM_FAILED
    assert caught.value.status_code is code


@pytest.mark.parametrize("error", [ImportError("no x"), ValueError("x"), KeyboardInterrupt()])
def test_other_errors_pass(error: BaseException) -> None:
    assert not shortage.is_shortage(error)
    with pytest.raises(type(error)), system_errors("it cannot start"):
        raise error
