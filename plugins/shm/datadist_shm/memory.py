"""Memory of the shm transport: sealed memfds of our own, ranges of the user's, mappings of peers'."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import random
import threading
import time
import weakref
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from datadist.base.memory_file import RESIZE_SEALS, create, create_sealed
from datadist.base.memory_map import MemoryMap, NotWritable
from datadist.base.memory_room import least_room, overhead, pool_name
from datadist.base.process_access import ALLOW_CALL, REFUSALS, ptrace_scope
from datadist.base.shortage import explain, is_shortage
from datadist.transport import Placement, Region, RegistrationError
from datadist_shm import _native, pages
from datadist_shm.forking import let_go_in_children
from datadist_shm.options import Options
from datadist_shm.pages import Filling

log = logging.getLogger("datadist.shm")

F_SEAL_FUTURE_WRITE = 0x10
"""linux/fcntl.h, not in Python's module. Who maps anew cannot write; and nobody punches holes."""
NO_HUGE_PAGES = (
    "the kernel made no huge one on demand, as Linux 6.1 or later does where it finds 2 MiB, and offers "
    f"none: write advise to {pages.TRANSPARENT / 'shmem_enabled'} for faster transfers"
)
MOST_SHORTAGES = 3
"""After so many, one after another, no more huge pages are tried for a pool."""
TRIES, TRY_SECONDS = 5, 0.1
"""How often a pool is tried that only lacks what other engines have just begun to take."""
PR_SET_PTRACER = 0x59616D61
PR_SET_PTRACER_ANY = -1


class Mapping:
    """A shared mapping; it is unmapped with the last reference to this object."""

    def __init__(self, fd: int, size: int, writable: bool, huge: bool = False) -> None:
        self.address = _native.map(fd, size, writable, huge)
        self.size = size
        weakref.finalize(self, _native.unmap, self.address, size).atexit = False

    def make_pages(self, threads: int, begin: int, size: int) -> None:
        """Populate the pages of a range of our own memory. Raises OSError."""
        _native.populate(self.address + begin, size, threads, -1, begin)


class PeerFile(NamedTuple):
    """Memory of a peer that we may map."""

    identity: tuple[int, int]
    """What tells it from other files that are open."""
    stays: bool
    """Whether the owner cannot take away pages that exist, see :data:`F_SEAL_FUTURE_WRITE`."""


class PeerMapping:
    """A mapping of a peer's memory, of which no page is made here; undone with the last reference.

    ``search``: a native thread of low priority has those pages mapped that exist, which makes the first
    transfers faster. It ends with the mapping.
    """

    def __init__(
        self, fd: int, size: int, writable: bool, huge: bool, file: PeerFile, search: bool = False
    ) -> None:
        self.file = file
        self.pages, self.address = _native.map_peer(fd, size, writable, huge, file.stays, search)
        self.size = size
        weakref.finalize(self, _native.unmap_peer, self.pages).atexit = False
        let_go_in_children(self)

    def leave(self) -> None:
        """See :mod:`datadist_shm.forking`."""
        _native.leave_peer(self.pages)


class PoolRegion(Region):
    """Memory of our own in a memfd, which peers map."""

    __slots__ = (
        "__weakref__",
        "_filling",
        "_huge",
        "_threads",
        "fd",
        "pages",
        "peers_may_write",
        "region_id",
        "sealing",
    )

    def __init__(
        self, region_id: int, fd: int, mapping: Mapping, placement: Placement, kind: str,
        options: Options,
    ) -> None:  # fmt: skip
        super().__init__(mapping.address, mapping.size, placement, keeper=mapping)
        self.region_id = region_id
        self.fd = fd
        self.sealing = threading.Lock()
        self.peers_may_write: bool | None = None
        """None until that is fixed."""
        self.pages = kind
        self._threads, self._huge = options.threads, options.huge_pages != "0"
        self._filling: Filling | None = None
        let_go_in_children(self)

    def fill(self) -> None:
        """Have all pages made in the background; peers that write need them.

        Raises :class:`RegistrationError` where no thread can be started.
        """
        if self._filling is None:
            assert isinstance(self.keeper, Mapping)
            try:
                file = self.fd if self.pages == "small" and not pages.transparent() else -1
                huge = self._huge and file >= 0
                maker = Maker(self.address, self.size, self._threads, file, huge)
                self._filling = Filling(self.keeper, maker)
            except RuntimeError as error:
                raise RegistrationError(f"cannot populate the pool: {explain(error)}") from error

    @property
    def filled(self) -> bool:
        """Whether all pages are present."""
        return self._filling is not None and self._filling.done

    def wait_filled(self, timeout: float) -> None:
        """See :meth:`Filling.wait`. Raises RegistrationError."""
        if self._filling is not None:
            self._filling.wait(timeout)

    def check_filling(self) -> None:
        """Raise RegistrationError where it is known by now that the pages cannot be had."""
        if self._filling is not None:
            self._filling.check()

    def close(self) -> None:
        """Close the descriptor; the mapping goes with its last user."""
        if self._filling is not None and self.fd >= 0:
            fd, self.fd = self.fd, -1
            self._filling.stop(fd)
        self._drop()

    def _drop(self) -> None:
        fd, self.fd, self.keeper = self.fd, -1, None
        if fd >= 0:
            os.close(fd)

    def leave(self) -> None:
        """See :mod:`datadist_shm.forking`; its mapping stays while arrays over it do."""
        self._filling = None
        self._drop()


class Maker:
    """Makes the pages of what is mapped at an address, until a flag is not 0; it keeps nothing mapped.

    With its file (else -1) nobody who maps memory waits for long meanwhile, and the program's threads go
    first. Pages that are made through a file are small, also where its mapping asked for huge ones.
    ``huge``: these are made on demand, as far as the kernel does that.
    """

    def __init__(self, address: int, size: int, threads: int, file: int, huge: bool) -> None:
        self._address, self._threads, self._file, self._huge = address, threads, file, huge
        self._left = bytearray(size // pages.HUGE)
        """Which huge pages are to be made of small ones."""
        self._shortages = 0
        """How often there was too little memory, one after another."""
        self._careful = False
        """Whether huge pages take long here, see huge.h."""

    def make(self, begin: int, size: int, stop: array[int]) -> None:
        """Populate a part. Raises OSError."""
        address = self._address + begin
        if self._huge:
            how, self._careful = _native.huge_make(
                address, size, self._file, begin, self._left, stop, self._careful
            )
            self._shortages = self._shortages + 1 if how == _native.HUGE_SHORT else 0
            self._huge = how != _native.HUGE_REFUSED and self._shortages < MOST_SHORTAGES
        _native.populate(address, size, self._threads, self._file, begin, stop)

    def improve(self, stop: array[int]) -> None:
        """Make huge pages of the small ones that others have made meanwhile, or before."""
        if self._huge:
            _native.huge_merge(self._address, self._left, stop, self._careful)


class UserRegion(Region):
    """Memory of the user, which peers reach through our process."""

    __slots__ = ("region_id",)

    def __init__(self, region_id: int, address: int, size: int, placement: Placement) -> None:
        super().__init__(address, size, placement)
        self.region_id = region_id


def allocate(region_id: int, size: int, placement: Placement, options: Options) -> PoolRegion:
    """A zeroed region in a memfd that nobody can resize; reserved huge pages round ``size`` up.

    Raises ``MemoryError`` where there is not enough, also of what other engines leave,
    :class:`RegistrationError` otherwise, also where no thread can be started.
    """
    kind, size = pages.choose(options.huge_pages, size)
    for left in reversed(range(TRIES)):
        fd = _make_file(size, kind)
        try:
            shortage = None if kind == "reserved" else _shortage(fd, size)
            if shortage is None or _is_tolerated(shortage, options):
                return _map_pool(region_id, fd, size, placement, kind, options)
            if not left or not shortage.contended:
                raise MemoryError(shortage.text)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # before the next try, so that one of two that begin at a time gets the room
        time.sleep(random.random() * TRY_SECONDS)
    raise AssertionError("the last try returns or raises")


@dataclass(frozen=True)
class _Shortage:
    text: str
    contended: bool
    """Whether there would be enough without the pools that others have begun to populate."""


def _shortage(fd: int, size: int) -> _Shortage | None:
    """Why the pages of a new file cannot be had: the kernel would kill processes, not refuse them."""
    room, need = least_room(os.fstat(fd).st_ino), size + overhead(size)
    if room is None or need <= room.size:
        return None
    text = (
        f"{_text(size)}: {room}; make the pool smaller, raise the limit, or set "
        "datadist.shm.overcommit (DATADIST_SHM_OVERCOMMIT) to 1 to be warned only"
    )
    return _Shortage(text, need <= room.size + room.promised)


def _is_tolerated(shortage: _Shortage, options: Options) -> bool:
    """Whether the user takes the risk; the text is a warning then."""
    if options.populate and not options.overcommit:
        return False
    log.warning("processes may be killed for want of memory: %s", shortage.text)
    return True


def _make_file(size: int, kind: str) -> int:
    """A file of memory that cannot be resized."""
    name = "datadist-huge" if kind == "reserved" else pool_name()
    try:
        return create_sealed(name, size, _flags(kind))
    except (OSError, OverflowError) as error:
        raise _refused(size, error) from error


def _map_pool(
    region_id: int, fd: int, size: int, placement: Placement, kind: str, options: Options
) -> PoolRegion:
    try:
        mapping = Mapping(fd, size, writable=True, huge=options.huge_pages != "0")
    except OSError as error:
        raise _refused(size, error) from error
    region = PoolRegion(region_id, fd, mapping, placement, kind, options)
    if options.populate:
        region.fill()
    return region


def unusable() -> str | None:
    """Which call that pools need is refused here, with the reason; None if all work.

    Raises OSError where a resource is short, which says nothing of this machine.
    """
    call, fd = "memfd_create", -1
    try:
        fd = create("datadist-probe")
        call = "fcntl(F_ADD_SEALS)"
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, RESIZE_SEALS | F_SEAL_FUTURE_WRITE)
    except (AttributeError, OSError) as error:
        if is_shortage(error):
            raise
        return f"{call} does not work here: {error}; pools need it{_remedy(error)}"
    finally:
        if fd >= 0:
            os.close(fd)
    return None


def kind_of_pages() -> str:
    """What pools are made of on this machine, for people."""
    if pages.transparent():
        return "huge ones, which the machine offers"
    try:
        return "huge ones, made on demand" if pages.on_demand() else f"small ones: {NO_HUGE_PAGES}"
    except OSError as error:
        return f"cannot be tried: {explain(error)}"


def _remedy(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in REFUSALS:
        return f": {ALLOW_CALL}"
    return " (Linux 5.1 or later)"


def _refused(size: int, error: OSError | OverflowError) -> Exception:
    if isinstance(error, OverflowError) or error.errno in (errno.ENOMEM, errno.EFBIG, errno.ENOSPC):
        return MemoryError(f"{_text(size)}: {error}")
    return RegistrationError(f"cannot get {_text(size)}: {explain(error)}")


def _text(size: int) -> str:
    return f"{size} bytes of shared memory"


def _flags(kind: str) -> int:
    return os.MFD_HUGETLB | os.MFD_HUGE_2MB if kind == "reserved" else 0


def seal(region: PoolRegion, writable: bool) -> None:
    """Fix for good whether peers may map a region writable; our own mapping stays so.

    What peers may write is populated: a page that a peer made would be charged to the peer.
    """
    if region.peers_may_write is writable:
        return
    seals = fcntl.F_SEAL_SEAL if writable else F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
    with region.sealing:  # the first links are opened by several threads at once
        if writable:
            region.fill()
        present = fcntl.fcntl(region.fd, fcntl.F_GET_SEALS)
        if not present & fcntl.F_SEAL_SEAL:
            fcntl.fcntl(region.fd, fcntl.F_ADD_SEALS, seals)
        elif bool(present & F_SEAL_FUTURE_WRITE) == writable:
            raise RegistrationError("peers were given another access to this region before")
        region.peers_may_write = writable


def descriptor_for_peer(region: PoolRegion, writable: bool) -> int:
    """A new descriptor of a region; read-only unless ``writable``."""
    if writable:
        return os.dup(region.fd)
    return os.open(f"/proc/self/fd/{region.fd}", os.O_RDONLY | os.O_CLOEXEC)


def check_user_memory(mapped: MemoryMap, address: int, size: int) -> None:
    """Raise :class:`RegistrationError` unless this process maps all of the range for writing."""
    try:
        mapped.check_writable(address, size)
    except NotWritable as error:
        if error.mode is not None:
            raise RegistrationError(
                f"the memory at {error.address:#x} is mapped {error.mode!r}, it must be readable and "
                "writable"
            ) from None
        raise RegistrationError(
            f"the {size} bytes at {address:#x} are not memory of this process: nothing is mapped at "
            f"{error.address:#x} (device memory of an accelerator cannot be used with this transport)"
        ) from None


def permit_access(allowed: bool) -> None:
    """Let peers of our user reach this process where Yama restricts that.

    Raises :class:`RegistrationError` where the system, or ``allowed``, forbids it.
    """
    scope = ptrace_scope()
    if scope == 0:
        return
    remedy = "set kernel.yama.ptrace_scope to 0, or use memory of the pool instead of your own"
    if scope >= 2:
        raise RegistrationError(f"kernel.yama.ptrace_scope is {scope}: {remedy}")
    if not allowed:
        raise RegistrationError(
            f"kernel.yama.ptrace_scope is 1 and the option datadist.shm.ptracer is off: {remedy}"
        )
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PTRACER, ctypes.c_ulong(PR_SET_PTRACER_ANY), 0, 0, 0) != 0:
        raise RegistrationError(
            f"PR_SET_PTRACER failed: {os.strerror(ctypes.get_errno())}; {remedy}"
        )


class PeerMappings:
    """Mappings of peers' memory, one per region however many links use it.

    Each is undone with the last reference. There is no lock: a thread that serves all links asks, too,
    and a handler of a signal may keep the holder of a lock for long.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, bool], weakref.ref[PeerMapping]] = {}

    def take(self, key: tuple[str, int, bool], make: Callable[[], PeerMapping]) -> PeerMapping:
        """The mapping of ``key``, made where there is none; two threads at once may make two."""
        known = self._known.get(key)
        mapping = None if known is None else known()
        if mapping is None:
            mapping = make()
            self._known = {**self._living(), key: weakref.ref(mapping)}
        return mapping

    def _living(self) -> dict[tuple[str, int, bool], weakref.ref[PeerMapping]]:
        return {key: known for key, known in self._known.items() if known() is not None}

    def __len__(self) -> int:
        return len(self._living())
