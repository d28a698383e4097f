"""Hosts for ranks that are far from each other, made on one machine.

Each has a runtime directory of its own, and either a network namespace on a virtual switch (root is
needed), or an address of loopback. A namespace is held by a descriptor of the process that made it
and by the processes in it: it ends with them, however they end, and its devices end with it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from datadist.testing.namespace import enter, make_namespace, on_a_thread

KINDS = ("namespaces", "directories")
AUTOMATIC = "automatic"
"""Namespaces where they can be made, else directories."""
DEVICE = {"namespaces": "eth0", "directories": "lo"}
LISTEN_PORT = 26600
"""Of engines (``listen_ip_info``); those that share a host need one each."""
IP_SECONDS = 30
UP_SECONDS = 10.0


class FarHostsError(Exception):
    """The hosts cannot be made; the text says why, and what to do."""


def no_namespaces() -> str | None:
    """Why no network namespaces can be made here, or None."""
    if shutil.which("ip") is None:
        return "the command ip is not installed (Debian: iproute2)"
    made: list[int] = []
    try:
        make_namespace(made)
    except OSError as error:
        return f"network namespaces need root ({error.strerror})"
    finally:
        for descriptor in made:
            os.close(descriptor)
    return None


@dataclass(frozen=True)
class Host:
    """Where a rank runs; can be sent to another process of this machine."""

    address: str
    device: str
    """Name of the network interface that has the address."""
    directory: str
    """Runtime directory."""
    auth_key: str = field(repr=False)
    namespace: str | None = None
    """Path of the network namespace, valid while :class:`FarHosts` is open."""

    @property
    def environ(self) -> dict[str, str]:
        """Environment of the processes there."""
        return {"DATADIST_RUNTIME_DIR": self.directory, "DATADIST_AUTH_KEY": self.auth_key}

    def enter(self) -> None:
        """Move the calling thread, and the threads that it starts later, to this host's network."""
        if self.namespace is not None:
            enter(self.namespace)

    def fill(self, text: str) -> str:
        """``text`` with this host's ``{device}`` and ``{address}``."""
        return text.replace("{device}", self.device).replace("{address}", self.address)


class FarHosts:
    """``count`` hosts of a kind of :data:`KINDS`, or :data:`AUTOMATIC`; close it when all is done.

    Raises :class:`FarHostsError` where namespaces were asked for and cannot be made.
    """

    def __init__(self, count: int, kind: str = AUTOMATIC) -> None:
        refusal = None if kind == "directories" else no_namespaces()
        if refusal is not None and kind == "namespaces":
            raise FarHostsError(
                f"{refusal}; --far=directories needs no namespaces: runtime directories and addresses "
                "of loopback take their place"
            )
        self.kind = "directories" if kind == "directories" or refusal else "namespaces"
        self._why = f" ({refusal})" if refusal else ""
        self._folder = tempfile.TemporaryDirectory(prefix="datadist-far-")
        self._namespaces: list[int] = []
        try:
            self.hosts = self._make(count)
        except BaseException:
            self.close()
            raise

    def host(self, rank: int) -> Host:
        """The host of a rank: ranks take turns where there are more of them than hosts."""
        return self.hosts[rank % len(self.hosts)]

    def describe(self) -> str:
        """What was made, for people."""
        count = len(self.hosts)
        if self.kind == "namespaces":
            where = f"{count} network namespaces"
        else:
            where = f"{count} runtime directories, all on loopback{self._why}"
        first, last = self.hosts[0], self.hosts[-1]
        return f"{where}, {first.address} to {last.address}, device {first.device}"

    def close(self) -> None:
        """Let go of the namespaces, which end with the last process in them, and remove the folders."""
        while self._namespaces:
            os.close(self._namespaces.pop())
        self._folder.cleanup()

    # -- making them -----------------------------------------------------------------------------

    def _make(self, count: int) -> list[Host]:
        key = secrets.token_hex(32)
        folders = [Path(self._folder.name, str(number)) for number in range(count)]
        for folder in folders:
            folder.mkdir(mode=0o700)
        if self.kind == "namespaces":
            self._connect(count)
            network = "10.77.0"
        else:  # not those of another run at the same time
            network = f"127.{secrets.randbelow(254) + 1}.{secrets.randbelow(254) + 1}"
        return [
            Host(
                f"{network}.{number}", DEVICE[self.kind], str(folder), key,
                self._path(number) if self._namespaces else None,
            )
            for number, folder in enumerate(folders, 1)
        ]  # fmt: skip

    def _connect(self, count: int) -> None:
        """A switch in the first namespace, and a host with a cable to it in each of the others."""
        for _ in range(count + 1):
            make_namespace(self._namespaces)
        self._ip(0, "link add switch type bridge", "link set switch up")
        for number in range(1, count + 1):
            self._ip(
                number,
                "link set lo up",
                f"link add eth0 type veth peer name port{number} netns {self._path(0)}",
                f"address add 10.77.0.{number}/24 dev eth0",
                f"address add fd77::{number}/64 dev eth0 nodad",
                "link set eth0 up",
            )
            self._ip(0, f"link set port{number} master switch up")
        for number in range(1, count + 1):
            self._wait_up(number)

    def cut(self, rank: int) -> None:
        """Cut the cable of the host of a rank: packets vanish, as when a host loses its power."""
        self._ip(0, f"link set port{rank % len(self.hosts) + 1} nomaster")

    def mend(self, rank: int) -> None:
        """Undo :meth:`cut`."""
        self._ip(0, f"link set port{rank % len(self.hosts) + 1} master switch")

    def _wait_up(self, number: int) -> None:
        """The kernel reports a cable a moment after it is plugged in, and libraries look at that."""
        end = time.monotonic() + UP_SECONDS
        while (
            json.loads(self._run(number, "ip", "-json", "link", "show", "eth0"))[0]["operstate"]
            != "UP"
        ):
            if time.monotonic() > end:
                raise FarHostsError(
                    f"the cable of host {number} is not up after {UP_SECONDS:.0f} s; use "
                    "--far=directories"
                )
            time.sleep(0.01)

    def _path(self, number: int) -> str:
        return f"/proc/{os.getpid()}/fd/{self._namespaces[number]}"

    def _ip(self, number: int, *lines: str) -> None:
        self._run(number, "ip", "-batch", "-", text="\n".join(lines) + "\n")

    def _run(self, number: int, *command: str, text: str = "") -> str:
        """Run a command in a namespace. Raises :class:`FarHostsError` with what it said."""
        path = self._path(number)

        def inside() -> subprocess.CompletedProcess[str]:
            enter(path)
            return subprocess.run(
                command, input=text, capture_output=True, text=True, timeout=IP_SECONDS, check=False
            )

        done = on_a_thread(inside)
        if done.returncode != 0:
            raise FarHostsError(
                f"`{' '.join(command)}` failed in a network namespace: {done.stderr.strip()}; use "
                "--far=directories"
            )
        return done.stdout
