"""Converts errors of transports to text; an error that the interface does not allow is logged as a
defect.
"""

from __future__ import annotations

import logging

from datadist.base.callers import pass_on
from datadist.base.shortage import explain, is_shortage
from datadist.status import LLMException, text_without_code
from datadist.transport import TransportError

log = logging.getLogger("datadist.transport")


def text_of(error: BaseException, plugin: object) -> str:
    """The text of an exception that ``plugin`` (a transport or a link) raised.

    Raises what a handler of a signal raised inside of it, which is no fault of the plugin's.
    """
    pass_on(error)
    if isinstance(error, LLMException):
        return text_without_code(error)  # the caller raises its own exception, with a code
    if isinstance(error, TransportError) or (isinstance(error, MemoryError) and str(error)):
        return str(error)
    if is_shortage(error):
        return explain(error)
    kind = type(plugin)
    log.error(
        "defect of transport %s.%s (it raised what the interface does not allow)",
        kind.__module__, kind.__qualname__, exc_info=error,
    )  # fmt: skip
    return f"{type(error).__name__}: {error}"
