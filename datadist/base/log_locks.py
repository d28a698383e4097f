"""Gives locks of logging back where an exception of a signal handler ends a log call.

``logging.Handler.handle`` of Python 3.10 to 3.12 takes the handler's lock before its ``try``, and
``Logger.isEnabledFor`` and ``getLogger`` that of the module. An exception between the two leaves the lock
with the thread for good, and every other thread hangs at its next record.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

__all__ = ["give_back_locks", "giving_back"]

A = TypeVar("A")
T = TypeVar("T")


class _Logger(logging.Logger):
    """The same, but no lock stays taken after an exception."""

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802
        """Whether records of this level are handled."""
        return giving_back(super().isEnabledFor, level)

    def callHandlers(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Pass a record to all handlers of this logger and of those above it."""
        free = [lock for lock in _locks(self) if not lock._is_owned()]
        try:
            super().callHandlers(record)
        except BaseException:
            for lock in free:
                if lock._is_owned():
                    lock.release()
            raise


def _locks(logger: logging.Logger | None) -> Iterator[logging._RLock]:  # type: ignore[name-defined]
    while logger is not None:
        for handler in logger.handlers:
            if hasattr(handler.lock, "_is_owned"):
                yield handler.lock
        logger = logger.parent if logger.propagate else None


def giving_back(call: Callable[[A], T], argument: A) -> T:
    """The result of a call of logging, which leaves the lock of that module as it was."""
    lock: Any = getattr(logging, "_lock", None)
    free = hasattr(lock, "_is_owned") and not lock._is_owned()
    try:
        return call(argument)
    except BaseException:
        if free and lock._is_owned():
            lock.release()
        raise


def give_back_locks(logger: logging.Logger) -> None:
    """Have a logger do so; one whose class a program has chosen stays what it is."""
    if type(logger) is logging.Logger:
        logger.__class__ = _Logger
