from collections.abc import Callable

from typing_extensions import Buffer

DONE: int
BAD_ADDRESS: int
TIMED_OUT: int
ABORTED: int
PEER_GONE: int
REVOKED: int
FAILED: int
MAX_THREADS: int
BRIEF_SEGMENTS: int
AUTO: int
HUGE_REFUSED: int
HUGE_SHORT: int
HUGE_MADE: int
KERNELS: dict[str, int]

def transfer(
    write: bool,
    path: Buffer,
    local: Buffer,
    remote: Buffer,
    length: Buffer,
    fence: int,
    seconds: float,
    flights: list[object],
    /,
) -> bool | tuple[int, int, int]: ...
def settled(flight: object, /) -> bool: ...
def copy(dst: Buffer, src: Buffer, length: Buffer, threads: int, kernel: int, /) -> None: ...
def convert_list(
    values: list[int], limit: int, stride: int, base: int, vector: Buffer, distinct: bool, /
) -> int: ...
def known_way(
    path: Buffer, numbers: bytes, attributes: tuple[object, ...], keys: tuple[object, ...], /
) -> Callable[[object, object, float], float | None]: ...
def tune(
    threads: int, /
) -> tuple[tuple[str, int], dict[str, float], int, list[tuple[int, float]]]: ...
def map(fd: int, size: int, writable: bool, huge: bool, /) -> int: ...
def map_peer(
    fd: int, size: int, writable: bool, huge: bool, stays: bool, search: bool, /
) -> tuple[int, int]: ...
def unmap_peer(pages: int, /) -> None: ...
def leave_peer(pages: int, /) -> None: ...
def populate(
    address: int, size: int, threads: int, file: int, offset: int, stop: Buffer = ..., /
) -> None: ...
def huge_make(
    address: int, size: int, file: int, offset: int, left: Buffer, stop: Buffer,
    careful: bool = ..., /,
) -> tuple[int, bool]: ...  # fmt: skip
def huge_merge(address: int, left: Buffer, stop: Buffer, careful: bool = ..., /) -> None: ...
def unmap(address: int, size: int, /) -> None: ...
def revoke(fence: int, /) -> None: ...
def active(fence: int, /) -> int: ...
