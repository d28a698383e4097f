"""The states of a grant."""

from __future__ import annotations

from enum import Enum

from datadist.base.names import NamedMembers

__all__ = ["GrantState"]


class GrantState(Enum, metaclass=NamedMembers):
    """What became of a grant; every state but GRANTED is final, and the blocks are the owner's again."""

    GRANTED = "granted"
    CONSUMED = "consumed"
    """As many readers as it was made for have finished."""
    REVOKED = "revoked"
    """By the owner: `revoke`, another grant of the key, the end of the cache or of the engine."""
    LAPSED = "lapsed"
    """Its lease ended."""
    READER_LOST = "reader lost"
    """Its readers have finished or are lost, and at least one is lost."""
