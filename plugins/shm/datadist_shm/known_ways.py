"""Few blocks over a route that core has looked up, by one call of native code."""

from __future__ import annotations

from array import array
from itertools import chain

from datadist.transport import KnownCall, KnownWay
from datadist_shm import _native

__all__ = ["known_way"]


def known_way(
    way: KnownWay, path: array[int], fence: int, attributes: tuple[tuple[object, str, object], ...]
) -> KnownCall | None:
    """The call of :meth:`datadist.transport.Link.known_way`; None where blocks have too many tensors.

    ``path`` is what native code knows of the peer, ``fence`` the address of its fence or 0,
    ``attributes`` what has to hold besides those of ``way``.
    """
    tensors = len(way.local_bases)
    if tensors > _native.BRIEF_SEGMENTS:
        return None
    numbers = array(
        "q",
        [
            way.write, fence, way.block_bytes, tensors, way.local_stride, way.local_count,
            way.remote_stride, way.remote_count, *way.local_bases, *way.remote_bases,
        ],
    )  # fmt: skip
    checked = chain.from_iterable((*way.attributes, *attributes))
    return _native.known_way(
        path, numbers.tobytes(), tuple(checked), tuple(chain.from_iterable(way.keys))
    )
