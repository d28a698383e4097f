"""In the other machine: starts nodes for the tester, one per connection, and passes on what it says."""

from __future__ import annotations

import socket
import threading
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from roce.nodes import start_here

from tests.nodes import Node, RemoteError

PORT = 7000
KEY = b"tests on a wire of their own"
CONNECT_SECONDS = 5.0


def main() -> None:
    """Serve until the machine goes off."""
    with Listener(("0.0.0.0", PORT), authkey=KEY, backlog=8) as listener:
        start_here({}).close()  # the fork server loads everything ahead
        print("agent: ready", flush=True)
        while True:
            try:
                line = listener.accept()
            except (EOFError, OSError):  # who only wanted to know whether we are up
                continue
            threading.Thread(target=_serve, args=(line,), daemon=True).start()


def _serve(line: Any) -> None:
    connection: Connection = line
    node = start_here(connection.recv())
    connection.send(node.pid)
    try:
        while True:
            order, args, options = connection.recv()
            connection.send(_obey(node, order, args, options))
    except (EOFError, OSError):
        node.close()


def _obey(node: Node, order: str, args: Any, options: Any) -> tuple[bool, Any]:
    try:
        return True, getattr(node, order)(*args, **options)
    except RemoteError as error:
        return False, (error.kind, error.status, error.text)
    except TimeoutError as error:
        return False, ("TimeoutError", None, str(error))


def connect(host: str) -> Connection:
    """A line to the agent at ``host``. Raises ``OSError`` within seconds where that is off."""
    # Client has no time limit: it waits a minute for its next attempt, while the machine comes up.
    socket.create_connection((host, PORT), CONNECT_SECONDS).close()
    return Client((host, PORT), authkey=KEY)


if __name__ == "__main__":
    main()
