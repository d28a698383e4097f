"""The virtual wire between machines: a relay of frames that can be cut, lose and look.

Each machine's network card sends its frames to a socket of ours, which hands them to the card that they
are addressed to, or to all others. It learns nothing: it gave the cards their addresses.
A cut in the middle is invisible to the cards, as a failed switch would be.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import threading
from collections import Counter
from collections.abc import Collection
from pathlib import Path

MTU = 4400
RECEIVE = 1 << 22
ROCE_PORT = 4791
NAMES = "abc"
"""Of machines."""
CARDS = {name: bytes((0x52, 0x54, 0, 0, 0, n)) for n, name in enumerate(NAMES, 1)}
"""The hardware address of each machine's card."""


class Wire:
    """A wire between machines; :meth:`close` ends its thread."""

    def __init__(self, sockets: Path, machines: Collection[str]) -> None:
        self._sockets = sockets
        self._ends = {name: self._bind(name) for name in machines}
        self._stop, self._stopped = socket.socketpair()
        self._random = random.Random(1)
        self.cut = False
        self.loss = 0.0
        """Share of frames that are lost, 0 to 1."""
        self.lost = 0
        self._seen: Counter[tuple[str, int, int]] | None = None
        self._thread = threading.Thread(target=self._relay, daemon=True)
        self._thread.start()

    def _bind(self, name: str) -> socket.socket:
        end = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        end.bind(str(self._sockets / f"{name}.wire"))
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE)
        return end

    def arguments(self, name: str) -> list[str]:
        """QEMU's arguments for the network card of a machine."""
        return [
            "-netdev",
            f"dgram,id=n0,local.type=unix,local.path={self._sockets}/{name}.card,"
            f"remote.type=unix,remote.path={self._sockets}/{name}.wire",
            "-device",
            f"virtio-net-pci,netdev=n0,mac={CARDS[name].hex(':')},host_mtu={MTU},romfile=",
        ]

    def watch(self) -> None:
        """Begin to count RoCE packets."""
        self._seen = Counter()

    def seen(self) -> Counter[tuple[str, int, int]]:
        """Packets by sending machine, type-of-service byte and operation code; ends the watch."""
        seen, self._seen = self._seen, None
        return seen or Counter()

    def close(self) -> None:
        """End the relay."""
        self._stop.close()
        self._thread.join()
        self._stopped.close()
        for end in self._ends.values():
            end.close()

    def _relay(self) -> None:
        poller = select.poll()
        names = {end.fileno(): name for name, end in self._ends.items()}
        for fd in (*names, self._stopped.fileno()):
            poller.register(fd, select.POLLIN)
        while True:
            for fd, _ in poller.poll():
                if fd not in names:
                    return
                self._forward(names[fd])

    def _forward(self, name: str) -> None:
        frame = self._ends[name].recv(65536)
        if self._seen is not None:
            packet = roce_packet(frame)
            if packet is not None:
                self._seen[(name, *packet)] += 1
        if self.cut or (self.loss and self._random.random() < self.loss):
            self.lost += 1
            return
        for other in receivers(frame, name, self._ends):
            with contextlib.suppress(OSError):  # a machine that is off hears nothing
                self._ends[other].sendto(frame, str(self._sockets / f"{other}.card"))


def receivers(frame: bytes, sender: str, machines: Collection[str]) -> list[str]:
    """Who gets a frame: whose card it is addressed to, else all but the sender."""
    named = [name for name in machines if frame[:6] == CARDS[name]]
    return named or [name for name in machines if name != sender]


def roce_packet(frame: bytes) -> tuple[int, int] | None:
    """Type-of-service byte (traffic class) and operation code of a RoCE v2 frame over IPv4 or IPv6."""
    kind = frame[12:14]
    if kind == b"\x08\x00" and len(frame) > 42 and frame[23] == 17:
        tos, udp = frame[15], 34
    elif kind == b"\x86\xdd" and len(frame) > 62 and frame[20] == 17:
        tos, udp = (frame[14] << 4 | frame[15] >> 4) & 0xFF, 54
    else:
        return None
    if int.from_bytes(frame[udp + 2 : udp + 4], "big") != ROCE_PORT:
        return None
    return tos, frame[udp + 8]
