"""Engines that were just linked, until they have said all that follows a link."""

from __future__ import annotations

from datadist.status import LLMStatusCode
from tests import nodes
from tests.nodes import Node
from tests.waiting import until


def until_quiet(*linked: Node) -> None:
    """Return once no message is on its way between these.

    Half a second after a link is OK its members withdraw their announcements. A small transfer that such
    a message meets takes another way, and releases the GIL.
    """
    for node in linked:
        node.do(_has_said_all)
    for node in linked:
        node.do(_has_heard_all)


def _has_said_all(here: nodes.Here) -> None:
    engine = here.live._live(LLMStatusCode.LLM_FAILED)
    until(lambda: not any(getattr(each, "announced", ()) for each in engine._all_domains()))


def _has_heard_all(here: nodes.Here) -> None:
    engine = here.live._live(LLMStatusCode.LLM_FAILED)
    assert all(view.synchronize(nodes.SECONDS) for view in list(engine.views.values()))
