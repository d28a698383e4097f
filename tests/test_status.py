"""Status codes, their exception and their holder."""

from __future__ import annotations

import pytest

from datadist.status import LLMException, LLMStatusCode, Status, code_of, text_without_code


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("LLM_SUCCESS", 0),
        ("LLM_FAILED", 4294967295),
        ("LLM_KV_CACHE_NOT_EXIST", 1343270914),
        ("LLM_PARAM_INVALID", 1343270917),
        ("LLM_NOT_YET_LINK", 1343270919),
        ("LLM_ALREADY_LINK", 1343270920),
        ("LLM_LINK_FAILED", 1343270921),
        ("LLM_BLOCKS_OUT_OF_MEMORY", 1343270931),
        ("LLM_EXIST_LINK", 1343270936),
        ("LLM_FEATURE_NOT_ENABLED", 1343270937),
        ("LLM_TIMEOUT", 1343270938),
        ("LLM_OUT_OF_MEMORY", 1343270940),
        ("LLM_DEVICE_MEM_ERROR", 507053),
        ("LLM_SUSPECT_REMOTE_ERROR", 507057),
        ("LLM_UNKNOWN_ERROR", -1),
    ],
)
def test_codes_have_the_documented_numbers(name: str, number: int) -> None:
    assert LLMStatusCode[name] == number
    assert LLMStatusCode(number).name == name


def test_there_are_29_codes_with_distinct_numbers() -> None:
    assert len(LLMStatusCode) == len(LLMStatusCode.__members__) == 29


def test_an_exception_carries_its_code() -> None:
    error = LLMException("text", status_code=LLMStatusCode.LLM_TIMEOUT)
    assert isinstance(error, RuntimeError)
    assert error.args == ("text",)
    assert error.status_code is LLMStatusCode.LLM_TIMEOUT


def test_the_text_of_an_exception_ends_with_the_name_of_its_code() -> None:
    error = LLMException("text", status_code=LLMStatusCode.LLM_TIMEOUT)
    assert str(error) == f"{error}" == "text (LLM_TIMEOUT)"
    assert text_without_code(error) == "text"
    assert str(LLMException(status_code=LLMStatusCode.LLM_TIMEOUT)) == "LLM_TIMEOUT"
    two = LLMException("text", 2, status_code=LLMStatusCode.LLM_FAILED)
    assert str(two) == "('text', 2) (LLM_FAILED)"
    assert two.args == ("text", 2)


class WithoutInit(LLMException):
    def __init__(self) -> None:
        RuntimeError.__init__(self, "its own")


def test_without_a_code_the_text_names_none() -> None:
    assert str(LLMException("text")) == "text"
    assert str(LLMException()) == ""
    assert str(LLMException("text", status_code=LLMStatusCode.LLM_SUCCESS)) == "text"
    assert str(LLMException("text", status_code=7)) == "text"  # type: ignore[arg-type]
    assert str(WithoutInit()) == "its own"
    assert WithoutInit().status_code is LLMStatusCode.LLM_SUCCESS


def test_the_code_of_an_exception_is_read_only_and_success_by_default() -> None:
    error = LLMException("text")
    assert error.status_code is LLMStatusCode.LLM_SUCCESS
    with pytest.raises(AttributeError):
        error.status_code = LLMStatusCode.LLM_FAILED  # type: ignore[misc]


def test_status_holds_a_code() -> None:
    assert Status(LLMStatusCode.LLM_SUCCESS).is_ok()
    status = Status(LLMStatusCode.LLM_TIMEOUT)
    assert not status.is_ok()
    assert status.status_code is LLMStatusCode.LLM_TIMEOUT
    assert "LLM_TIMEOUT" in repr(status)


def test_codes_that_peers_name() -> None:
    assert code_of(0x5010B01A) is LLMStatusCode.LLM_TIMEOUT
    assert code_of(7) is LLMStatusCode.LLM_FAILED
    assert code_of(7, LLMStatusCode.LLM_LINK_FAILED) is LLMStatusCode.LLM_LINK_FAILED
