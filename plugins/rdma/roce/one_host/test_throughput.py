"""Throughput beside the yardstick of the trade, in the same machine; the best of three rounds each."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable

import pytest
from roce import spi
from roce.nodes import start_here
from roce.spi import MIB

ROUNDS = 3
FLOOR = 0.6
"""Ratio below which something is wrong; 0.9 and more are usual, but machines may be busy."""
SIZE = 16 * MIB
PORT = 18515


def yardstick(size: int, count: int) -> float:
    """MB/s (2^20 bytes) of ib_read_bw for reads of ``size`` bytes."""
    command = [
        "ib_read_bw", "-d", "rxe0", "-x", "1", "-s", str(size), "-n", str(count), "-t", "128", "-F",
        "-p", str(PORT),
    ]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(50):
            time.sleep(0.2)
            client = subprocess.run(
                [*command, "10.99.0.1"], capture_output=True, text=True, check=False
            )
            if client.returncode == 0:
                break
        found = re.search(rf"^\s*{size}\s+\d+\s+[\d.]+\s+([\d.]+)", client.stdout, re.MULTILINE)
        assert found, client.stdout + client.stderr
        return float(found[1])
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("size", [65536, 4096], ids=["64K", "4K"])
def test_reads_are_as_fast_as_ib_read_bw(
    size: int, record_property: Callable[[str, object], None]
) -> None:
    if shutil.which("ib_read_bw") is None:
        pytest.skip("ib_read_bw is not installed (Debian: perftest)")
    count = SIZE // size
    nodes = [start_here({}), start_here({})]
    try:
        local, remote = (node.do(spi.start, SIZE) for node in nodes)
        spi.connect(nodes[0], nodes[1])
        # Neighbours change places, so that nothing is contiguous on both sides.
        places = [(n ^ 1) * size for n in range(count)]
        mine, theirs = [], []
        for _ in range(ROUNDS):
            theirs.append(yardstick(size, count))
            took = nodes[0].do(
                spi.move, "l", 1, "read", [local + p for p in places],
                [remote + n * size for n in range(count)], [size] * count,
            )  # fmt: skip
            mine.append(SIZE / MIB / took)
        ratio = max(mine) / max(theirs)
        print(f"{size}: {mine} MB/s, ib_read_bw {theirs} MB/s, ratio of the best {ratio:.2f}")
        record_property("ratio", round(ratio, 2))
        record_property("MB/s", round(max(mine), 1))
        assert ratio >= FLOOR
    finally:
        for node in nodes:
            node.do(spi.stop)
            node.close()
