"""The rules of the interface that tests of the kit check."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from datadist.testing.processes import PeerError

Test = TypeVar("Test", bound=Callable[..., None])


def rule(*names: str) -> Callable[[Test], Test]:
    """Name the parts of ``datadist.transport`` that a test checks; its failures show them.

    The test's docstring says what they ask for.
    """

    def decorate(test: Test) -> Test:
        text = f"rule of {', '.join(names)} in datadist.transport: {_sentence(test)}"

        @functools.wraps(test)
        def checked(*args: Any, **kwargs: Any) -> None:
            __tracebackhide__ = True
            try:
                test(*args, **kwargs)
            except (AssertionError, PeerError) as error:
                error.args = (f"{error}\n{text}", *error.args[1:])
                raise

        vars(checked)["rules"] = names
        return checked  # type: ignore[return-value]

    return decorate


def _sentence(test: Callable[..., Any]) -> str:
    name = test.__name__.removeprefix("test_").replace("_", " ")
    return " ".join(f"{name}. {test.__doc__ or ''}".split())
