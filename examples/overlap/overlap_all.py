"""The three ways side by side: `python overlap_all.py`."""

from __future__ import annotations

import asyncio

import overlap_asyncio
import overlap_threads
from overlap_world import world


def main() -> None:
    """Several times: the first pull of a key takes longer."""
    with world() as here:
        for _ in range(3):
            here.timed("one after another", here.one_after_another)
            here.timed("threads", lambda: overlap_threads.pull_all(here))
            here.timed("asyncio", lambda: asyncio.run(overlap_asyncio.pull_all(here)))


if __name__ == "__main__":
    main()
