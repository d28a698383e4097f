"""Exceptions that can be pickled and copied."""

from __future__ import annotations

from typing import Any


class PicklableError(Exception):
    """Is pickled with all its attributes, independent of the constructor's arguments."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, dict(self.__dict__))


def _rebuild(
    kind: type[PicklableError], args: tuple[object, ...], state: dict[str, Any]
) -> PicklableError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error
