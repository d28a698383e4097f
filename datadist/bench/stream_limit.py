"""The limit of the network between two hosts: a TCP stream of as many bytes, in the same run.

One connection between the processes of the two engines, without datadist.
"""

from __future__ import annotations

import secrets
import socket
import time

from datadist.bench.measured_engine import BenchError, RemoteEngine
from datadist.bench.tcp_stream import DONE, ORDER, SECONDS, SECRET_BYTES, Stream

NAME = "TCP stream"


class StreamLimit:
    """The end that asks, and measures. ``peer`` is the process of the other end.

    A pull moves bytes from there to here, a push from here to there. Raises :class:`BenchError`.
    """

    names = (NAME,)
    applicable = names
    compared = NAME

    def __init__(self, peer: RemoteEngine, nbytes: int, *, pull: bool) -> None:
        self._nbytes, self._pull = nbytes, pull
        secret = secrets.token_bytes(SECRET_BYTES)
        address = peer.call("open_stream", secret)
        try:
            self._stream = Stream(socket.create_connection(address, SECONDS))
            self._stream.connection.sendall(secret)
        except OSError as error:
            raise BenchError(f"no TCP connection to {address}: {error}") from None

    def measure(self, name: str, number: int) -> float:
        """Seconds that the stream needs for these bytes."""
        del name, number
        stream, began = self._stream, time.perf_counter()
        try:
            stream.connection.sendall(ORDER.pack(self._nbytes, self._pull))
            if self._pull:
                stream.take(self._nbytes)
            else:
                stream.give(self._nbytes)
                stream.receive(len(DONE))
        except OSError as error:
            raise BenchError(f"the TCP stream broke: {error}") from None
        return time.perf_counter() - began

    def close(self) -> None:
        """End the connection, and with it the other end."""
        self._stream.connection.close()
