"""Strangers on the network: connections from many addresses of loopback that never prove the key.

A thread holds as many connections as it may to one port. Who is disconnected comes again at once.
"""

from __future__ import annotations

import secrets
import selectors
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle

from datadist.control.channel import GREETING
from datadist.control.hostport import HostPort

KINDS = ("silent", "trickling", "garbage", "greeted")
LINGER = struct.pack("ii", 1, 0)
"""Closing resets the connection, so that no port waits for its end."""
TICK = 0.01
CONNECTS_PER_TICK = 32


def addresses(count: int) -> list[str]:
    """So many addresses of loopback, none of which is 127.0.0.x."""
    return [f"127.1.{number // 250}.{1 + number % 250}" for number in range(count)]


class _Stranger:
    """One connection, and what it says."""

    def __init__(self, place: HostPort, address: str, kind: str) -> None:
        self.sock = socket.socket()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
        self.sock.bind((address, 0))
        self.sock.setblocking(False)
        self.sock.connect_ex(place)
        self.address, self.kind = address, kind
        self._words = self._all_words()

    def _all_words(self) -> Iterator[bytes]:
        greeting = GREETING + secrets.token_bytes(32)
        if self.kind == "trickling":
            yield from (greeting[n : n + 1] for n in range(len(greeting)))
        elif self.kind == "greeted":
            yield greeting
        elif self.kind == "garbage":
            yield b"GET / HTTP/1.1\r\n\r\n"

    def talk(self) -> None:
        """Say the next word."""
        with suppress(OSError):
            word = next(self._words, b"")
            if word:
                self.sock.send(word, socket.MSG_NOSIGNAL)


class Connections:
    """Strangers from ``hosts`` addresses with ``each`` connections, until :meth:`close`."""

    def __init__(self, place: HostPort, hosts: int, each: int, kinds: tuple[str, ...]) -> None:
        self._place = HostPort(*place)
        self._selector = selectors.DefaultSelector()
        self._out = [
            (address, kind)
            for (address, kind) in zip(addresses(hosts) * each, cycle(kinds), strict=False)
        ]
        self._all = len(self._out)
        self._over = threading.Event()
        self.tries: Counter[str] = Counter()
        """Connections by the kind of who made them."""
        self.settled = threading.Event()
        """So many connections were made as there are strangers."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            self._come()
            for key, _ in self._selector.select(TICK):
                self._look(key.data)
            for key in list(self._selector.get_map().values()):
                key.data.talk()
        for key in list(self._selector.get_map().values()):
            key.data.sock.close()
        self._selector.close()

    def _come(self) -> None:
        coming, self._out = self._out[:CONNECTS_PER_TICK], self._out[CONNECTS_PER_TICK:]
        for address, kind in coming:
            try:
                made = _Stranger(self._place, address, kind)
            except OSError:  # no port is left for a moment
                self._out.append((address, kind))
                continue
            self.tries[kind] += 1
            self._selector.register(made.sock, selectors.EVENT_READ, made)
        if self.tries.total() >= self._all:
            self.settled.set()

    def _look(self, raw_peer: _Stranger) -> None:
        with suppress(BlockingIOError):
            try:
                if raw_peer.sock.recv(1 << 12):
                    return
            except BlockingIOError:
                raise
            except OSError:
                pass
            self._selector.unregister(raw_peer.sock)
            raw_peer.sock.close()
            self._out.append((raw_peer.address, raw_peer.kind))

    def close(self) -> None:
        """They all hang up."""
        self._over.set()
        self._thread.join()
