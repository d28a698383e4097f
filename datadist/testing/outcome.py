"""The result of a call of a transport, as a process of the kit sends it to the test."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datadist.base.texts import in_seconds
from datadist.transport import TransportError


@dataclass(frozen=True)
class Outcome:
    """The result of a call of the transport: success, or an error of ``datadist.transport``."""

    kinds: tuple[str, ...] = ()
    """Names of the error's class and of its bases; empty for success."""
    text: str = ""
    rank: int | None = None
    link_usable: bool | None = None
    in_flight: bool = False
    """Whether the error says that something goes on, which the process then keeps."""
    seconds: float = 0.0
    value: Any = None

    @property
    def ok(self) -> bool:
        """Whether nothing was raised."""
        return not self.kinds

    def is_a(self, kind: type[Exception]) -> bool:
        """Whether it ended with this error or one derived from it."""
        return kind.__name__ in self.kinds

    def must_succeed(self, what: str) -> None:
        """Raise ``AssertionError`` if it failed."""
        assert self.ok, f"{what}: expected success, came {self}"

    def must_be(self, kind: type[Exception], what: str) -> None:
        """Raise ``AssertionError`` unless it ended with this error or one derived from it."""
        assert self.is_a(kind), f"{what}: expected {kind.__name__}, came {self}"

    def must_end_within(self, seconds: float, what: str) -> None:
        """Raise ``AssertionError`` if it took longer."""
        assert self.seconds < seconds, (
            f"{what}: expected its end within {in_seconds(seconds)}, came {self}"
        )

    def __str__(self) -> str:
        what = f"{self.kinds[0]}: {self.text}" if self.kinds else "success"
        what += ", in flight" if self.in_flight else ""
        return f"{what} (after {self.seconds:.3f} s)"


def outcome_of(
    call: Callable[[], Any], on_error: Callable[[TransportError], None] | None = None
) -> Outcome:
    """Make a call. Exceptions that are not transport errors are raised, with their traceback."""
    begin = time.monotonic()
    try:
        value = call()
    except TransportError as error:
        if on_error is not None:
            on_error(error)
        return Outcome(
            kinds=tuple(base.__name__ for base in type(error).__mro__),
            text=str(error),
            rank=getattr(error, "rank", None),
            link_usable=getattr(error, "link_usable", None),
            in_flight=error.in_flight is not None,
            seconds=time.monotonic() - begin,
        )
    return Outcome(seconds=time.monotonic() - begin, value=value)
