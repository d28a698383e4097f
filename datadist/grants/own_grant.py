"""What is noted of one grant of ours."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datadist.base.flag import Flag
from datadist.caches.directory import KeyName
from datadist.grants.state import GrantState

__all__ = ["OwnGrant"]


@dataclass(eq=False, slots=True)
class OwnGrant:
    """One grant of ours."""

    name: KeyName
    cache_id: int
    blocks: NDArray[np.int64]
    readers: int
    lease: float
    """Seconds."""
    handle: Any = None
    """What the program has of it."""
    generation: int = 0
    slot: int | None = None
    """Of its word."""
    deadline: float = math.inf
    asked: set[str] = field(default_factory=set)
    """Incarnations of the peers that asked for it, and have neither finished nor gone."""
    finished: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    state: GrantState = GrantState.GRANTED
    done: Flag = field(default_factory=Flag)
    told: bool = False
    """Whether its end is queued for the program, or need not be; an interrupt may queue it twice."""
    taken: int = 0
    """Number of the call by which the program has taken it from there; 0 before."""
