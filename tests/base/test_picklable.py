"""Exceptions in another process: serving programs hand them on."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import pkgutil
from collections.abc import Callable

import pytest

import datadist
from datadist import LLMException, LLMStatusCode
from datadist.base.memory_map import NotWritable
from datadist.caches.pool import PoolExhausted
from datadist.control.account import Item, LimitExceeded
from datadist.control.endpoint import EndpointError
from datadist.control.hostport import HostPort
from datadist.control.listener import NetworkError
from datadist.links.clusters import DialError
from datadist.rank_table import RankTableError
from datadist.status import param_invalid
from datadist.testing.processes import PeerError
from datadist.transport import LinkError, PeerLost, TransferError, TransferTimeout


class OfAProgram(LLMException):
    """What a program may make of ours."""

    def __init__(self, request: int, *, worker: str) -> None:
        super().__init__(
            f"request {request} on {worker}", request, status_code=LLMStatusCode.LLM_TIMEOUT
        )
        self.worker = worker


EXAMPLES: list[Exception] = [
    param_invalid("wrong"),
    LLMException("text", 2, status_code=LLMStatusCode.LLM_TIMEOUT),
    OfAProgram(7, worker="decoder 3"),
    LinkError("no way", 3),
    TransferError("failed", link_usable=True),
    TransferTimeout("late"),
    PeerLost("gone", 1),
    RankTableError(["one problem", "another one"]),
    PoolExhausted("full", 4, 3, 2),
    DialError(LLMStatusCode.LLM_LINK_FAILED, "nobody"),
    NotWritable(4096, "r--p"),
    LimitExceeded(Item.KEYS, 1 << 18),
    EndpointError("in use", HostPort("0.0.0.0", 80)),
    NetworkError("in use", HostPort("0.0.0.0", 80)),
    PeerError("raised there", ["LinkError", "TransportError"]),
]


def _through_pickle(error: Exception) -> Exception:
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, Exception)
    return again


@pytest.mark.parametrize("way", [_through_pickle, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_nothing_of_an_exception_is_lost(
    error: Exception, way: Callable[[Exception], Exception]
) -> None:
    again = way(error)
    assert type(again) is type(error)
    assert (str(again), again.args) == (str(error), error.args)
    assert vars(again) == vars(error)


def test_every_exception_with_something_to_carry_is_looked_at() -> None:
    found = set()
    for module in pkgutil.walk_packages(datadist.__path__, "datadist."):
        if module.name.endswith("__main__") or module.name.startswith("datadist.testing."):
            continue  # those of pytest must be loaded by pytest
        for kind in vars(importlib.import_module(module.name)).values():
            ours = inspect.isclass(kind) and kind.__module__.startswith("datadist")
            if ours and issubclass(kind, Exception) and "__init__" in vars(kind):
                found.add(kind.__qualname__)
    known = {kind.__qualname__ for error in EXAMPLES for kind in type(error).__mro__}
    assert "LLMException" in found
    assert found - known == set()
