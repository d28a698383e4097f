"""Overlap pulls in an asyncio program: `python overlap_asyncio.py`. It starts no thread itself."""

from __future__ import annotations

import asyncio

from overlap_world import PULLS, World, world


async def pull(here: World, number: int) -> None:
    """One request, which a server would go on with when its blocks are here."""
    key, source, target = here.request(number)
    await here.manager.pull_blocks_async(key, here.cache, source, target)


async def pull_all(here: World) -> None:
    """All requests at once."""
    await asyncio.gather(*(pull(here, number) for number in range(PULLS)))


def main() -> None:
    """Both ways, several times: the first pull of a key takes longer."""
    with world() as here:
        for _ in range(3):
            here.timed("one after another", here.one_after_another)
            here.timed("asyncio", lambda: asyncio.run(pull_all(here)))


if __name__ == "__main__":
    main()
