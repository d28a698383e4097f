"""A decoder: asks a prompt engine for requests, and pulls their blocks. `python decoder.py`."""

# region decoder
import select
import sys

from prompt import DESC, link, start

from datadist import CacheKey, LLMDataDist, LLMRole


def decode(engine: LLMDataDist) -> None:
    """Ask for three requests of 1, 2 and 3 blocks."""
    manager = engine.cache_manager
    cache = manager.allocate_blocks_cache(DESC)
    link(engine)
    for request in (1, 2, 3):
        engine.send_message(1, f"{request} {request}".encode())  # its number, and its length
        if not select.select([engine.messages_fileno()], [], [], 60)[0]:
            sys.exit("the prompt engine has not answered within 60 s")
        engine.messages()
        own_blocks = list(range(request))
        manager.pull_blocks(CacheKey(1, request), cache, dst_blocks=own_blocks)
        assert all((tensor[own_blocks] == request).all() for tensor in cache.numpy())
        print(f"request {request} is here, in blocks {own_blocks}", flush=True)


if __name__ == "__main__":
    with start(LLMRole.DECODER, 2) as engine:
        decode(engine)
# endregion
