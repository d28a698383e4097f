from typing_extensions import Buffer

DONE: int
BAD_ADDRESS: int
TIMED_OUT: int
ABORTED: int
PEER_GONE: int
REVOKED: int
FAILED: int
MAX_THREADS: int
FOR_READING: int
FOR_WRITING: int
PRESENT: int
KERNELS: dict[str, int]

def transfer(
    write: bool,
    path: Buffer,
    local: Buffer,
    remote: Buffer,
    length: Buffer,
    fence: int,
    seconds: float,
    /,
) -> bool | tuple[int, int, int]: ...
def copy(dst: Buffer, src: Buffer, length: Buffer, threads: int, kernel: int, /) -> None: ...
def map(fd: int, size: int, writable: bool, huge: bool, /) -> int: ...
def populate(address: int, size: int, how: int, threads: int, /) -> None: ...
def unmap(address: int, size: int, /) -> None: ...
def revoke(fence: int, /) -> None: ...
def active(fence: int, /) -> int: ...
