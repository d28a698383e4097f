"""What a forked child lets go of, so that it does not keep memory after its owner has ended.

The engine cannot be used there. Mappings of peers' memory are not inherited at all. A pool of our own
stays mapped in the child as long as arrays over it are referenced there, which the child may read.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class _Inherited(Protocol):
    def leave(self) -> None:
        """Close descriptors and drop references, without touching what the parent uses."""


_all: weakref.WeakSet[_Inherited] = weakref.WeakSet()


def let_go_in_children(what: _Inherited) -> None:
    """Have ``what.leave()`` called in every child that is forked while it exists."""
    _all.add(what)


def _after_fork_in_child() -> None:
    for each in list(_all):
        each.leave()


os.register_at_fork(after_in_child=_after_fork_in_child)
