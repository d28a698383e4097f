"""The simulator of the vendor libraries: built with the C compiler, loaded in their place."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import subprocess
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datadist_hccl import abi
from datadist_hccl.libraries import OVERRIDE

CSRC = Path(__file__).parent / "csrc"
BUILD = Path(__file__).parents[2] / "build" / "simulator"
FLAGS = (
    "-O2",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-fPIC",
    "-fvisibility=hidden",
    "-pthread",
    "-shared",
)

MORE_FLAGS = tuple(os.environ.get("ASCEND_SIM_CFLAGS", "").split())
"""Such as those of sanitizers, whose libraries have to be loaded before this process's own."""

ALIGNMENT = 2 << 20
CONTEXTS, STREAMS, COMMUNICATORS, REGISTRATIONS, ALLOCATIONS, DEVICES = range(6)


def build(hidden: Iterable[str] = ()) -> Path:
    """The library, built once per state of its sources; without the ``hidden`` functions."""
    names = sorted(hidden)
    sources = sorted(CSRC.glob("*.[ch]"))
    digest = hashlib.sha256(" ".join((*FLAGS, *MORE_FLAGS, *names)).encode())
    for source in sources:
        digest.update(source.read_bytes())
    library = BUILD / f"libascend_sim-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
        made = Path(scratch) / "sim.so"
        extra = []
        if names:
            script = Path(scratch) / "hidden.map"
            script.write_text("{ local: " + " ".join(f"{name};" for name in names) + " };\n")
            extra = [f"-Wl,--version-script={script}"]
        files = [str(source) for source in sources if source.suffix == ".c"]
        subprocess.run(["cc", *FLAGS, *MORE_FLAGS, *files, *extra, "-o", str(made)], check=True)
        made.replace(library)
    return library


def environment(sim_directory: str, **settings: object) -> dict[str, str]:
    """Variables for processes that use the simulator; ``sim_directory`` is where their ranks meet.

    ``settings`` are ASCEND_SIM_*: soc, devices, physical, capacity, foreign.
    """
    own = {f"ASCEND_SIM_{name.upper()}": str(value) for name, value in settings.items()}
    return {OVERRIDE: str(build()), "ASCEND_SIM_DIR": sim_directory} | own


def table(ranks: int = 2, servers: int | None = None, **changes: object) -> str:
    """A rank table of A2: rank r is device 0 of server r, or one of several on fewer servers."""
    count = ranks if servers is None else servers
    hosts: list[dict[str, Any]] = [
        {"server_id": f"10.0.0.{s + 1}", "device": []} for s in range(count)
    ]
    for rank in range(ranks):
        devices = hosts[rank * count // ranks]["device"]
        devices.append(
            {
                "device_id": str(len(devices)),
                "device_ip": f"192.168.0.{rank + 1}",
                "rank_id": str(rank),
            }
        )
    text = {
        "version": "1.0",
        "status": "completed",
        "server_count": str(count),
        "server_list": hosts,
    }
    return json.dumps(text | changes)


class Simulator:
    """The library in this process: what tests do to it, and what they ask."""

    def __init__(self, path: str | None = None) -> None:
        self.library = ctypes.CDLL(path or os.environ[OVERRIDE])
        self.library.sim_live.restype = ctypes.c_long
        self.library.sim_calls.restype = ctypes.c_long
        for name, (restype, argtypes) in (abi.ACL | abi.HCCL).items():
            if hasattr(self.library, name):
                function = getattr(self.library, name)
                function.restype, function.argtypes = restype, argtypes

    def fault(
        self,
        symbol: str,
        code: int = 0,
        first: int = 1,
        last: int = 1,
        after: bool = False,
        ms: int = 0,
    ) -> None:
        """Calls ``first`` to ``last`` of a function from now on fail, or take ``ms`` longer."""
        self.library.sim_fault(symbol.encode(), first, last, code, int(after), ms)

    def delayed(self) -> int:
        """How many calls take longer now, as a fault wants it."""
        return int(self.library.sim_delayed())

    def let_go(self) -> None:
        """End these delays, until :meth:`clear`."""
        self.library.sim_let_go()

    def clear(self) -> None:
        """End all faults."""
        self.library.sim_clear()

    def tasks(self, delay_ms: int = 0, stuck: bool = False) -> None:
        """Every queued copy begins later, or never."""
        self.library.sim_set_tasks(delay_ms, int(stuck))

    def peer_code(self, code: int) -> None:
        """What copies return whose peer has died; 0: they never end."""
        self.library.sim_set_peer_code(code)

    def live(self) -> dict[str, int]:
        """How many of everything exist."""
        kinds = ("contexts", "streams", "communicators", "registrations", "allocations", "devices")
        return {kind: self.library.sim_live(number) for number, kind in enumerate(kinds)}

    def calls(self, symbol: str) -> int:
        """How often a function was called."""
        return int(self.library.sim_calls(symbol.encode()))

    def violations(self) -> str:
        """What hardware would not have noticed, one a line."""
        text = ctypes.create_string_buffer(8192)
        self.library.sim_violations(text, ctypes.c_size_t(len(text)))
        return text.value.decode()

    # -- memory of a device, which Python cannot touch: as a framework would use it ------------

    def use_device(self, number: int = 0) -> None:
        """Give this thread the default context of a device."""
        self.library.aclInit(None)
        assert self.library.aclrtSetDevice(number) == 0

    def malloc(self, size: int, policy: int = 1) -> int:
        """Device memory."""
        pointer = ctypes.c_void_p()
        assert self.library.aclrtMalloc(ctypes.byref(pointer), size, policy) == 0
        return pointer.value or 0

    def free(self, address: int) -> None:
        """Free device memory."""
        assert self.library.aclrtFree(address) == 0

    def write(self, address: int, data: bytes) -> None:
        """Write to device memory."""
        assert self.library.aclrtMemcpy(address, len(data), data, len(data), 1) == 0

    def read(self, address: int, size: int) -> bytes:
        """Read from device memory."""
        data = ctypes.create_string_buffer(size)
        assert self.library.aclrtMemcpy(data, size, address, size, 2) == 0
        return data.raw


class UserMemory:
    """Memory as a program with NPUs makes it: of the device, or pinned; freed with this object."""

    def __init__(self, size: int, placement: int) -> None:
        self.sim = Simulator()
        self.sim.use_device()
        device = placement == 1
        make = self.sim.library.aclrtMalloc if device else self.sim.library.aclrtMallocHost
        pointer = ctypes.c_void_p()
        room = size if device else size + ALIGNMENT
        assert make(ctypes.byref(pointer), room, *([1] if device else [])) == 0
        self.pointer = pointer.value or 0
        self.address = -(-self.pointer // ALIGNMENT) * ALIGNMENT
        free = self.sim.library.aclrtFree if device else self.sim.library.aclrtFreeHost
        weakref.finalize(self, _free, self.sim, free, self.pointer).atexit = False


def _free(sim: Simulator, free: Any, pointer: int) -> None:
    sim.use_device()
    assert free(pointer) == 0
    sim.library.aclrtResetDevice(0)
    sim.library.aclrtResetDevice(0)


def make_memory(size: int, placement: int) -> tuple[int, UserMemory]:
    """Address and keeper of new memory, for the conformance kit."""
    memory = UserMemory(size, placement)
    return memory.address, memory
