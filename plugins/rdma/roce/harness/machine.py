"""One virtual machine: QEMU in a process of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from roce.harness.wire import MTU, Wire

HERE = Path(__file__).parent
KVM = Path("/dev/kvm")
CPU_FLAGS = Path("/proc/cpuinfo")
BOOT_SECONDS = 180


@dataclass(frozen=True)
class Boot:
    """What is equal for all machines of a run."""

    kernel: Path
    initrd: Path
    cpus: int
    memory: str = "2G"


class Machine:
    """A machine that runs ``bash job`` and powers off; ``out`` is a folder that it shares with us.

    ``environ`` is what the job sees beside the basics. Sockets lie in ``sockets``, whose path must
    be short.
    """

    def __init__(
        self,
        name: str,
        boot: Boot,
        out: Path,
        job: str,
        environ: Mapping[str, str],
        sockets: Path,
        wire: Wire | None = None,
    ) -> None:
        self.name = name
        self.out = out
        self._boot = boot
        self._sockets = sockets
        self._wire = wire
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / "guest.sh", out / "guest.sh")
        (out / "job.sh").write_text(job)
        lines = [f"export {key}={_quote(value)}" for key, value in environ.items()]
        (out / "environ").write_text("\n".join(lines) + "\n")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def console(self) -> Path:
        """What the machine says."""
        return self.out / "console.log"

    def start(self) -> None:
        """Switch on."""
        (self.out / "status").unlink(missing_ok=True)
        with open(self.out / "qemu.log", "ab") as log:
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _command(self) -> list[str]:
        accelerator, cpu = ("kvm", "host") if _kvm_works() else ("tcg,thread=multi", "Nehalem")
        command = [
            "qemu-system-x86_64", "-machine", "q35", "-accel", accelerator, "-cpu", cpu,
            "-smp", str(self._boot.cpus), "-m", self._boot.memory,
            "-display", "none", "-monitor", "none", "-no-reboot", "-nic", "none",
            "-kernel", str(self._boot.kernel), "-initrd", str(self._boot.initrd),
            # without no_timer_check a guest panics where a busy host delays its first timer interrupts
            "-append", "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check",
            "-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
            "-virtfs", f"local,path={self.out},mount_tag=out,security_model=none",
            "-serial", f"file:{self.console}",
            "-chardev", f"socket,id=lab,path={self.lab},server=on,wait=off",
            "-serial", "chardev:lab",
        ]  # fmt: skip
        if self._wire is not None:
            command += self._wire.arguments(self.name)
        return command

    @property
    def lab(self) -> Path:
        """The machine's second serial line, a socket that QEMU listens on."""
        return self._sockets / f"{self.name}.lab"

    def connect_lab(self, timeout: float = 20) -> socket.socket:
        """Open the second serial line."""
        deadline = time.monotonic() + timeout
        while True:
            line = socket.socket(socket.AF_UNIX)
            try:
                line.connect(str(self.lab))
                return line
            except OSError:
                line.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def wait(self, timeout: float) -> None:
        """Wait until the machine is off; switch it off after ``timeout`` seconds."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        self.power_off()

    @property
    def running(self) -> bool:
        """Whether it is on."""
        return self._process is not None and self._process.poll() is None

    def power_off(self) -> None:
        """As pulling the plug."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def status(self) -> int | None:
        """Exit status of the job; None if the machine ended without one."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.out / "status").read_text())
        return None

    def last_words(self, lines: int = 40) -> str:
        """The end of the console."""
        with contextlib.suppress(OSError):
            text = self.console.read_text(errors="replace")
            return "\n".join(text.splitlines()[-lines:])
        return "(no console)"


def _kvm_works() -> bool:
    """/dev/kvm alone says nothing: inside some machines it exists and guests hang on it."""
    flags = CPU_FLAGS.read_text().split()
    return ("vmx" in flags or "svm" in flags) and os.access(KVM, os.R_OK | os.W_OK)


def _quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


__all__ = ["BOOT_SECONDS", "MTU", "Boot", "Machine"]
