"""Messages between two programs."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable

from two_engines import SECONDS, link, run

from datadist import BlocksCacheKey, CacheDesc, DataType, LLMDataDist

DESC = CacheDesc(4, [16, 16, 8], DataType.DT_FLOAT16)


def prompt(engine: LLMDataDist, meet: Callable[[], object]) -> None:
    """Send a message, then one that follows a push."""
    manager = engine.cache_manager
    cache = manager.allocate_blocks_cache(DESC)
    for tensor in cache.numpy():
        tensor[:] = 1
    link(engine)
    # region send
    engine.send_message(2, b"request 7 is yours", timeout_in_millis=1000)  # at most 8 KiB of bytes
    # endregion
    meet()
    key = BlocksCacheKey(2)
    # region notify
    manager.push_blocks(key, cache, [3], [10], notify=b"block 10 is there")
    # endregion
    meet()


def decoder(engine: LLMDataDist, meet: Callable[[], object]) -> None:
    """Take both."""
    cache = engine.cache_manager.allocate_blocks_cache(DESC, BlocksCacheKey(2))
    link(engine)
    # region take
    select.select([engine.messages_fileno()], [], [], 60)  # readable until messages() has taken all
    for message in engine.messages():  # what has arrived; does not wait
        print(message.cluster_id, message.data)
    # endregion
    meet()
    assert asyncio.run(asyncio.wait_for(next_message(engine), SECONDS)) == b"block 10 is there"
    assert (cache.numpy()[0][10] == 1).all()
    meet()


async def next_message(engine: LLMDataDist) -> bytes:
    """Wait in asyncio."""
    loop = asyncio.get_running_loop()
    arrived: asyncio.Future[bytes] = loop.create_future()

    def on_messages() -> None:
        for message in engine.messages():
            arrived.set_result(message.data)

    # region asyncio
    loop.add_reader(engine.messages_fileno(), on_messages)  # never read from the descriptor
    # endregion
    try:
        return await arrived
    finally:
        loop.remove_reader(engine.messages_fileno())


if __name__ == "__main__":
    run(prompt, decoder, enable_remote_cache_accessible=True)
