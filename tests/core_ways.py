"""Have small transfers of a process go by core's own way, over `Link.read` and `Link.write`.

A transport may have a call of its own for a route that is known (`Link.known_way`).
"""

from __future__ import annotations

from typing import Any

from datadist import LLMStatusCode
from datadist.transfers.cached_route import CachedRoute
from tests import nodes


def take(here: nodes.Here) -> None:
    """From now on, in the whole process; routes that are known stay so."""
    kind: Any = CachedRoute
    kind._known_way = lambda *_: None
    for cached in here.live._live(LLMStatusCode.LLM_FAILED).route_cache._routes.values():
        cached.known = None
