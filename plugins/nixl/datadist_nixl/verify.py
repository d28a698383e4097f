"""``python -m datadist_nixl.verify``: does NIXL work here, and with ``--cuda`` also from GPU to GPU?

Two transports in this process read and write each other's memory through UCX, in blocks of several
sizes; every byte is compared.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from datadist.base.digits import number_argument
from datadist.transport import (
    Access,
    Group,
    Link,
    Offer,
    Peer,
    Placement,
    Region,
    TransportError,
    TransportOptions,
)
from datadist_nixl.transport import NixlTransport

MIB = 1 << 20
BLOCKS = (4096, 65536, MIB)
ROUNDS = 3
Bytes = NDArray[np.uint8]


class Side:
    """A transport with one link, memory that is moved, and memory of the host to look at it."""

    def __init__(
        self, rank: int, size: int, placement: Placement, options: TransportOptions
    ) -> None:
        with contextlib.ExitStack() as stack:
            self.transport = NixlTransport(options)
            stack.callback(self.transport.close)
            self.region = self._allocate(stack, size, placement)
            self._host = self._allocate(stack, size, Placement.HOST)
            self._view = np.frombuffer(
                (ctypes.c_char * size).from_address(self._host.address), np.uint8
            )
            peer = Peer(1 - rank, f"verify-{1 - rank}")
            connection = self.transport.connect(peer)
            peer = Peer(peer.rank, peer.incarnation, connection=connection)
            stack.callback(self.transport.disconnect, peer)
            peers = {rank: Peer(rank, f"verify-{rank}"), 1 - rank: peer}
            group = Group("verify", rank, peers, None, time.monotonic() + 60)
            self.link: Link = self.transport.open(group, [self.region], Access.READ_WRITE)
            stack.callback(self.link.close)
            self._stack = stack.pop_all()

    def _allocate(self, stack: contextlib.ExitStack, size: int, placement: Placement) -> Region:
        region = self.transport.allocate(size, placement)
        stack.callback(self.transport.release, region)
        return region

    def put(self, content: Bytes) -> None:
        """Fill the memory."""
        self._view[:] = content
        self._copy(self.region, self._host)

    def get(self) -> Bytes:
        """What the memory holds."""
        self._copy(self._host, self.region)
        return self._view.copy()

    def _copy(self, dst: Region, src: Region) -> None:
        self.transport.copy(
            *(np.array([value], np.int64) for value in (dst.address, src.address, dst.size))
        )

    def close(self) -> None:
        """End it."""
        self._stack.close()


@contextlib.contextmanager
def linked(size: int, placement: Placement, options: TransportOptions) -> Iterator[list[Side]]:
    """Two sides."""
    with contextlib.ExitStack() as stack:
        sides = []
        for rank in (0, 1):
            sides.append(Side(rank, size, placement, options))
            stack.callback(sides[-1].close)
        offers = [side.link.offer(1 - rank).data for rank, side in enumerate(sides)]
        for rank, side in enumerate(sides):
            side.link.attach(1 - rank, Offer(offers[1 - rank]))
        yield sides


def check(sides: list[Side], verb: str, block: int, size: int) -> float:
    """Move everything, neighbouring blocks swapped; bytes per second of the best round."""
    mine, theirs = sides
    numbers = np.arange(size // block, dtype=np.int64)
    vectors = (
        mine.region.address + (numbers ^ 1) * block, theirs.region.address + numbers * block,
        np.full(len(numbers), block, np.int64),
    )  # fmt: skip
    source, target = (theirs, mine) if verb == "read" else (mine, theirs)
    content = np.random.default_rng(block).integers(0, 256, size, np.uint8)
    source.put(content)
    target.put(np.zeros(size, np.uint8))
    best = float("inf")
    for _ in range(ROUNDS):
        begun = time.monotonic()
        getattr(mine.link, verb)(1, *vectors, 60)
        best = min(best, time.monotonic() - begun)
    moved = target.get().reshape(-1, 2, block)[:, ::-1]
    if not np.array_equal(content.reshape(-1, 2, block), moved):
        raise ValueError("the bytes differ")
    return size / best


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks; 0 if all passed."""
    parser = argparse.ArgumentParser(prog="python -m datadist_nixl.verify", description=__doc__)
    parser.add_argument(
        "--size", type=number_argument(2), default=64, help="MiB to move (default 64)"
    )
    parser.add_argument("--cuda", action="store_true", help="memory of a CUDA device")
    parser.add_argument(
        "--device-id", type=number_argument(0), default=0, help="of CUDA (default 0)"
    )
    args = parser.parse_args(arguments)
    state = NixlTransport.probe()
    print("ok   " if state.usable else "FAIL ", state.reason)
    if not state.usable:
        return 1
    extra = {"cuda": "1"} if args.cuda else {}
    placement = Placement.DEVICE if args.cuda else Placement.HOST
    size, failed = args.size // 2 * 2 * MIB, 0
    try:
        with linked(size, placement, TransportOptions(args.device_id, extra=extra)) as sides:
            print("ok    linked:", dict(sides[0].transport.describe()))
            for verb in ("read", "write"):
                for block in BLOCKS:
                    what = f"{verb} in blocks of {block // 1024} KiB"
                    try:
                        print(f"ok    {what}: {check(sides, verb, block, size) / 1e9:.2f} GB/s")
                    except (TransportError, ValueError) as error:
                        failed += 1
                        print(f"FAIL  {what}: {type(error).__name__}: {error}")
    except (TransportError, MemoryError) as error:
        failed += 1
        print(f"FAIL  link: {type(error).__name__}: {error}")
    print("all passed" if not failed else f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
