"""Descriptors of what a program may watch: ended grants, messages, events of links."""

from __future__ import annotations

from typing import Any

from datadist.base.event_queue import EventQueue
from datadist.status import LLMException, LLMStatusCode, system_errors

__all__ = ["descriptor_of"]


def descriptor_of(events: EventQueue[Any], what: str) -> int:
    """The descriptor of a queue of an engine, which stays the engine's.

    Raises LLMException: LLM_FAILED where the process can have no more descriptors,
    LLM_ENGINE_FINALIZED where the engine was finalized meanwhile.
    """
    if events.closed:
        raise LLMException(
            f"there is no descriptor for {what}: the engine was finalized meanwhile",
            status_code=LLMStatusCode.LLM_ENGINE_FINALIZED,
        )
    with system_errors(f"there is no descriptor for {what}"):
        return events.fileno()
