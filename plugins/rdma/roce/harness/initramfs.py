"""The guest's first file system: busybox, modules and a script; then the host's files take over.

The guest runs on the host's own files, read-only below a memory overlay: a virtual environment works
in it unchanged, and nothing that the guest does can reach the host but for the shared folder ``out``.
"""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

from roce.harness.kernel import Kernel

FOLDERS = ("bin", "dev", "proc", "sys", "ro", "rw", "newroot", "modules")

INIT = r"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do
  insmod /modules/$module || echo "guest: $module was not loaded"
done
share=trans=virtio,version=9p2000.L,msize=1048576
mount -t 9p -o $share,ro,cache=loose host /ro || echo "guest: no host root"
mount -t tmpfs rw /rw
mkdir /rw/upper /rw/work
mount -t overlay -o lowerdir=/ro,upperdir=/rw/upper,workdir=/rw/work overlay /newroot
mount -t proc proc /newroot/proc
mount -t sysfs sys /newroot/sys
mount -t devtmpfs dev /newroot/dev
mkdir -p /newroot/dev/shm /newroot/dev/pts
mount -t tmpfs shm /newroot/dev/shm
mount -t devpts pts /newroot/dev/pts
mount -t tmpfs run /newroot/run
mkdir /newroot/run/out
mount -t 9p -o $share out /newroot/run/out || echo "guest: no shared folder"
exec switch_root /newroot /bin/bash /run/out/guest.sh
"""


def build(kernel: Kernel, target: Path) -> None:
    """Write the archive for ``kernel`` to ``target``."""
    busybox = shutil.which("busybox")
    assert busybox is not None
    archive = _Archive()
    for folder in FOLDERS:
        archive.add(folder, stat.S_IFDIR | 0o755)
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive.add("init", stat.S_IFREG | 0o755, INIT.encode())
    archive.add("bin/busybox", stat.S_IFREG | 0o755, Path(busybox).read_bytes())
    order = "\n".join(path.name for path in kernel.modules)
    archive.add("modules/order", stat.S_IFREG | 0o644, order.encode())
    for module in kernel.modules:
        archive.add(f"modules/{module.name}", stat.S_IFREG | 0o644, module.read_bytes())
    target.write_bytes(archive.finish())


class _Archive:
    """cpio in the "newc" format: a header of 110 hexadecimal digits, name and data, padded to 4."""

    def __init__(self) -> None:
        self._parts = bytearray()
        self._inode = 0

    def add(
        self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        self._inode += 1
        path = name.encode() + b"\0"
        fields = (
            self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0,
        )  # fmt: skip
        self._parts += b"070701" + b"".join(b"%08x" % field for field in fields) + path
        self._pad()
        self._parts += data
        self._pad()

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return bytes(self._parts)

    def _pad(self) -> None:
        self._parts += b"\0" * (-len(self._parts) % 4)
