"""What every transfer takes besides its own arguments: a time limit, and a message for the other end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from datadist.base import checks
from datadist.base.callers import pass_on
from datadist.status import param_invalid
from datadist.transfers.limits import CallLimit
from datadist.transfers.notices import MAX_BYTES

__all__ = ["PreparedTransfer", "message_bytes", "notice_of", "seconds_of"]

MAX_MILLIS = 2**31 - 1


@dataclass(frozen=True)
class PreparedTransfer:
    """A transfer whose arguments have the right types and ranges."""

    cluster: int
    check: Callable[[], None]
    """Raises what this engine alone can tell beyond that."""
    move: Callable[[CallLimit], None]


def seconds_of(timeout_in_millis: int | None) -> float | None:
    """The time limit of one call in seconds; None for ``sync_kv_timeout``.

    The range is that of ``sync_kv_timeout``. Raises ``TypeError``, LLM_PARAM_INVALID.
    """
    if timeout_in_millis is None:
        return None
    checks.check_isinstance("timeout_in_millis", timeout_in_millis, int, allow_none=False)
    if not 1 <= timeout_in_millis <= MAX_MILLIS:
        raise param_invalid(
            f"timeout_in_millis is {timeout_in_millis}: it must be a number of milliseconds in "
            f"[1, {MAX_MILLIS}], or None for sync_kv_timeout"
        )
    return timeout_in_millis / 1000


def notice_of(notify: object) -> bytes | None:
    """A copy of what ``notify`` holds; None for none. Raises as :func:`message_bytes`."""
    return None if notify is None else message_bytes("notify", notify)


def message_bytes(name: str, data: object) -> bytes:
    """A copy of the bytes of a message. Raises ``TypeError``, LLM_PARAM_INVALID."""
    try:
        view = memoryview(data)  # type: ignore[arg-type]
    except (TypeError, ValueError, BufferError) as error:
        pass_on(error)
        raise TypeError(
            f"{name} is a {type(data).__name__} ({error}), only support bytes, bytearray and what else "
            "has the buffer protocol: encode text"
        ) from None
    if "O" in (view.format or ""):
        raise TypeError(
            f"{name} holds objects of Python, only support numbers and bytes: encode them"
        )
    if view.nbytes > MAX_BYTES:
        raise param_invalid(f"{name} has {view.nbytes} bytes: a message has at most {MAX_BYTES}")
    return view.tobytes()
