"""Status codes and the exception that carries them (LLM-DataDist API, status codes)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from datadist.base.callers import pass_on
from datadist.base.enums import NamedInt
from datadist.base.keywords import named_keywords
from datadist.base.names import NamedMembers
from datadist.base.picklable import PicklableError
from datadist.base.shortage import explain, is_shortage

__all__ = [
    "LLMException",
    "LLMStatusCode",
    "Status",
    "code_of",
    "param_invalid",
    "system_errors",
    "text_without_code",
]


class LLMStatusCode(NamedInt, metaclass=NamedMembers):
    """Result of an operation; the numbers are upstream's, also of those never produced here."""

    LLM_SUCCESS = 0
    LLM_FAILED = 0xFFFFFFFF
    LLM_WAIT_PROCESS_TIMEOUT = 0x5010B001
    LLM_KV_CACHE_NOT_EXIST = 0x5010B002
    LLM_REPEAT_REQUEST = 0x5010B003
    LLM_REQUEST_ALREADY_COMPLETED = 0x5010B004
    LLM_PARAM_INVALID = 0x5010B005
    LLM_ENGINE_FINALIZED = 0x5010B006
    LLM_NOT_YET_LINK = 0x5010B007
    LLM_ALREADY_LINK = 0x5010B008
    LLM_LINK_FAILED = 0x5010B009
    LLM_UNLINK_FAILED = 0x5010B00A
    LLM_NOTIFY_PROMPT_UNLINK_FAILED = 0x5010B00B
    LLM_CLUSTER_NUM_EXCEED_LIMIT = 0x5010B00C
    LLM_PROCESSING_LINK = 0x5010B00D
    LLM_DEVICE_OUT_OF_MEMORY = 0x5010B00E
    LLM_PREFIX_ALREADY_EXIST = 0x5010B00F
    LLM_PREFIX_NOT_EXIST = 0x5010B010
    LLM_SEQ_LENOVERLIMIT = 0x5010B011
    LLM_NO_FREE_BLOCK = 0x5010B012
    LLM_BLOCKS_OUT_OF_MEMORY = 0x5010B013
    LLM_EXIST_LINK = 0x5010B018
    LLM_FEATURE_NOT_ENABLED = 0x5010B019
    LLM_TIMEOUT = 0x5010B01A
    LLM_LINK_BUSY = 0x5010B01B
    LLM_OUT_OF_MEMORY = 0x5010B01C
    LLM_DEVICE_MEM_ERROR = 507053
    LLM_SUSPECT_REMOTE_ERROR = 507057
    LLM_UNKNOWN_ERROR = -1


@named_keywords
class LLMException(PicklableError, RuntimeError):
    """An operation failed. ``status_code`` is the kind of failure; the text has the reason and a
    remedy.

    ``str`` is the text and the name of the code, ``text (LLM_TIMEOUT)``; without a code (that is
    LLM_SUCCESS) the text alone. ``args`` are what was given, without the name.
    """

    _status_code = LLMStatusCode.LLM_SUCCESS  # of subclasses that do not call __init__, too

    def __init__(
        self, *args: object, status_code: LLMStatusCode = LLMStatusCode.LLM_SUCCESS
    ) -> None:
        super().__init__(*args)
        self._status_code = status_code

    @property
    def status_code(self) -> LLMStatusCode:
        """The code; LLM_SUCCESS if it was raised without one."""
        return self._status_code

    def __str__(self) -> str:
        text, code = text_without_code(self), self._status_code
        if not isinstance(code, LLMStatusCode) or code is LLMStatusCode.LLM_SUCCESS:
            return text
        return f"{text} ({code.name})" if text else code.name


@named_keywords
class Status:
    """A status code as an object."""

    def __init__(self, status: LLMStatusCode) -> None:
        self._status = status

    def is_ok(self) -> bool:
        """Whether it is LLM_SUCCESS."""
        return self._status == LLMStatusCode.LLM_SUCCESS

    @property
    def status_code(self) -> LLMStatusCode:
        """The code."""
        return self._status

    def __repr__(self) -> str:
        return f"Status({self._status.name})"


def text_without_code(error: LLMException) -> str:
    """The text without the name of the code."""
    return RuntimeError.__str__(error)


def code_of(number: int, unknown: LLMStatusCode = LLMStatusCode.LLM_FAILED) -> LLMStatusCode:
    """The code that a peer names, or ``unknown``."""
    try:
        return LLMStatusCode(number)
    except ValueError:
        return unknown


def param_invalid(text: str) -> LLMException:
    """The exception for a wrong value, LLM_PARAM_INVALID."""
    return LLMException(text, status_code=LLMStatusCode.LLM_PARAM_INVALID)


@contextmanager
def system_errors(what: str) -> Iterator[None]:
    """What the system refuses, as LLM_FAILED, and memory that it refuses Python as LLM_OUT_OF_MEMORY.

    ``what`` says what cannot be done. The text names the limit that was met and the remedy.
    """
    try:
        yield
    except LLMException:  # a RuntimeError too
        raise
    except (OSError, RuntimeError, MemoryError, ImportError) as error:
        pass_on(error)
        if isinstance(error, ImportError) and not is_shortage(error):
            raise
        memory = isinstance(error, MemoryError)
        code = LLMStatusCode.LLM_OUT_OF_MEMORY if memory else LLMStatusCode.LLM_FAILED
        raise LLMException(f"{what}: {explain(error)}", status_code=code) from error
