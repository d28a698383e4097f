"""Grants that end while they are read: `python -m tests.grants.race --pulls 100000`.

An owner grants blocks, revokes them, lets leases lapse, and reuses the blocks at once for other requests.
Readers pull with delays before and after their reads; some of them are stopped and continued. Every pull
that succeeds is compared with the content of that grant: each block holds one number, which says of which
request, of which grant and at which position it is.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from datadist import CacheKey, Grant, LLMException
from tests import nodes
from tests.nodes import Here, Node

REQUESTS, BLOCKS, EACH, TENSORS, WIDTH = 48, 256, 4, 4, 1024
ROOM = 512
"""Bytes of a request in the file that carries tokens: a number twice, a length, the token."""
MIB = 1 << 20


def header(request: int, serial: int, tensor: int, position: int) -> int:
    """What a block holds."""
    return (serial << 12 | request << 6 | tensor << 3 | position) & 0x7FFFFFFF


class Board:
    """Tokens by request, as an application would carry them: a file that both sides map."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), REQUESTS * ROOM)

    def put(self, request: int, serial: int, token: bytes) -> None:
        """The current grant of a request."""
        place = request * ROOM
        self._map[place : place + 8] = (0).to_bytes(8, "little")
        self._map[place + 16 : place + 18 + len(token)] = len(token).to_bytes(2, "little") + token
        self._map[place + 8 : place + 16] = serial.to_bytes(8, "little")
        self._map[place : place + 8] = serial.to_bytes(8, "little")

    def get(self, request: int) -> tuple[int, bytes] | None:
        """Serial number and token; None where it is being written."""
        raw = bytes(self._map[request * ROOM : (request + 1) * ROOM])
        first, second = int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:16], "little")
        again = bytes(self._map[request * ROOM : request * ROOM + 8])
        if not first or first != second or again != raw[:8]:
            return None
        return first, raw[18 : 18 + int.from_bytes(raw[16:18], "little")]


class _Owner:
    def __init__(self, here: Here, board: Path, seed: int) -> None:
        self._manager = here.live.cache_manager
        self._cache, self._arrays = here.caches["src"], here.arrays["src"]
        self._board, self._random = Board(board), random.Random(seed)
        self._free = list(range(BLOCKS))
        self._live: dict[int, Grant] = {}
        self._serial = 0
        self.ends: Counter[str] = Counter()

    def step(self) -> None:
        for grant in self._manager.ended_grants():
            self.ends[grant.state.name] += 1
            self._free += grant.blocks
            if self._live.get(grant.key.req_id) is grant:
                del self._live[grant.key.req_id]
        request = self._random.randrange(REQUESTS)
        if request in self._live and self._random.random() < 0.7:
            self._live[request].revoke()
            return
        self._random.shuffle(self._free)
        if len(self._free) >= EACH:
            blocks = [self._free.pop() for _ in range(EACH)]
            self._grant(request, blocks)

    def _grant(self, request: int, blocks: list[int]) -> None:
        self._serial += 1
        for tensor, array in enumerate(self._arrays):
            for position, block in enumerate(blocks):
                array[block] = header(request, self._serial, tensor, position)
        lease = self._random.choice([2, 20, 600_000])
        readers = self._random.randint(1, 4)
        grant = self._manager.grant_blocks(
            self._cache, CacheKey(1, request), blocks, readers=readers, lease_millis=lease
        )
        self._live[request] = grant
        with suppress(LLMException):  # it may have lapsed already
            self._board.put(request, self._serial, grant.token)


def own(here: Here, board: Path, stop: Path, seed: int) -> dict[str, int]:
    """Grant, end and reuse until the file is there; how many grants ended in which state."""
    owner, pace = _Owner(here, board, seed), random.Random(seed)
    while not stop.exists():
        for _ in range(20):
            owner.step()
            time.sleep(pace.random() * 3e-4)
    return dict(owner.ends)


@contextmanager
def _delays(here: Here, chance: random.Random) -> Iterator[None]:
    """Delays before and after each read of the transport, the reads of words included."""
    engine = here.live._engine
    assert engine is not None
    attempt = engine._all_domains()[0].attempt
    assert attempt is not None
    kind: Any = type(attempt.link)
    inner = kind.read

    def read(*args: Any, **options: Any) -> Any:
        if chance.random() < 0.2:
            time.sleep(chance.random() * 2e-3)
        result = inner(*args, **options)
        if chance.random() < 0.2:
            time.sleep(chance.random() * 2e-3)
        return result

    with mock.patch.object(kind, "read", read):
        yield


def pull(here: Here, board: Path, count: int, seed: int) -> dict[str, Any]:
    """Pull so often; what came of it, and what was wrong."""
    chance, tokens = random.Random(seed), Board(board)
    done: Counter[str] = Counter()
    wrong: list[str] = []
    with _delays(here, chance):
        for _ in range(count):
            request = chance.randrange(REQUESTS)
            held = tokens.get(request) if chance.random() < 0.5 else None
            places = chance.sample(range(EACH), chance.choice([1, 2, EACH]))
            options = {} if held is None else {"token": held[1]}
            try:
                here.live.cache_manager.pull_blocks(
                    CacheKey(1, request),
                    here.caches["dst"],
                    places,
                    places,
                    **options,  # type: ignore[arg-type]
                )
            except LLMException as error:
                done[error.status_code.name] += 1
                continue
            done["LLM_SUCCESS" if held is None else "LLM_SUCCESS with a token"] += 1
            wrong += _compare(here, request, places, None if held is None else held[0])
    return {"done": dict(done), "wrong": wrong[:10]}


def _compare(here: Here, request: int, places: Sequence[int], serial: int | None) -> list[str]:
    arrays = here.arrays["dst"]
    if serial is None:
        serial = int(arrays[0][places[0], 0]) >> 12
    else:
        serial &= 0x7FFFFFFF >> 12
    return [
        f"request {request}, grant {serial}, tensor {tensor}, position {place}: "
        f"{np.unique(array[place] >> 12).tolist()}, {np.unique(array[place] & 4095).tolist()}"
        for tensor, array in enumerate(arrays)
        for place in places
        if (array[place] != header(request, serial, tensor, place)).any()
    ]


def race(
    pulls: int, readers: int, memory: str, one_sided: bool, seed: int, directory: Path
) -> dict[str, Any]:
    """Figures of one run."""
    board, stop = directory / "board", directory / "stop"
    board.write_bytes(bytes(REQUESTS * ROOM))
    run = directory / "run"
    run.mkdir(mode=0o700)
    began = time.monotonic()
    with ExitStack() as stack:
        group = [Node({"DATADIST_RUNTIME_DIR": str(run)}) for _ in range(readers + 1)]
        for node in group:
            stack.callback(node.close)
        _link(group, memory, one_sided)
        owner, pullers = group[0], group[1:]
        owner.begin(own, board, stop, seed)
        for number, node in enumerate(pullers, 1):
            node.begin(pull, board, pulls // readers, seed + number)
        stops = _disturb(pullers[::2], random.Random(seed))
        answers = [node.result(600) for node in pullers]
        stop.touch()
        ends = owner.result()
    total: Counter[str] = Counter()
    for answer in answers:
        total.update(answer["done"])
    return {
        "pulls": sum(total.values()), "seconds": round(time.monotonic() - began, 1),
        "results": dict(total), "ends": ends, "stops": stops,
        "wrong": [text for answer in answers for text in answer["wrong"]],
    }  # fmt: skip


def _link(group: list[Node], memory: str, one_sided: bool) -> None:
    """Each reader has a link of its own with the owner: a domain has four members at most."""
    options: dict[str, Any] = {"remote_accessible": True} if memory == "numpy" and one_sided else {}
    for cluster, node in enumerate(group, 1):
        node.do(
            nodes.init, cluster, 16 * MIB if memory == "pool" else 0,
            enable_remote_cache_accessible=one_sided,
        )  # fmt: skip
        label = "src" if cluster == 1 else "dst"
        node.do(nodes.make, label, "blocks", [BLOCKS, WIDTH], TENSORS, memory=memory, **options)
    for cluster, node in enumerate(group[1:], 2):
        for each in (group[0], node):
            each.begin(nodes.link_and_wait, f"race {cluster}", {1: 0, cluster: 1})
        for each in (group[0], node):
            each.result()


def _disturb(victims: Sequence[Node], chance: random.Random) -> int:
    """Stop and continue readers until one of them has ended; how often."""
    stops = 0
    while victims and not any(_has_answered(node) for node in victims):
        victim = chance.choice(victims)
        with suppress(ProcessLookupError):
            victim.pause()
            time.sleep(chance.random() * 0.03)
            victim.resume()
        stops += 1
        time.sleep(chance.random() * 0.06)
    return stops


def _has_answered(node: Node) -> bool:
    return node._pipe.poll(0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 1 where a pull got other bytes than those of its grant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pulls", type=int, default=100_000)
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--memory", choices=("pool", "numpy"), default="pool")
    parser.add_argument("--one-sided", action="store_true")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    given = parser.parse_args(arguments)
    print(f"seed {given.seed}", flush=True)
    os.environ.setdefault("DATADIST_JOB", "")
    with tempfile.TemporaryDirectory() as place:
        figures = race(
            given.pulls, given.readers, given.memory, given.one_sided, given.seed, Path(place)
        )
    print(json.dumps(figures, indent=1))
    return 1 if figures["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
