"""Registered memory that peers map as they map pools: arrays of `datadist.empty`.

Peers get the whole allocation, however small the parts of it are that are registered: its descriptor
opens all of it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from datadist.base.shared_memory import SharedMemory
from datadist.base.shortage import explain
from datadist.transport import LinkError, Offer, Placement, Region, RegistrationError
from datadist_shm.memory import Mapping, PoolRegion
from datadist_shm.options import Options

MOST = Offer.MAX_FDS - 8
"""Arrays of a link; pools and the fence have descriptors too."""


class SharedMapping(Mapping):
    """Memory that is mapped already, and stays so while this references it."""

    def __init__(self, shared: SharedMemory) -> None:
        self.address, self.size = shared.address, shared.size
        self.shared = shared


class SharedPart(Region):
    """A registered range of such memory."""

    __slots__ = ("whole",)

    def __init__(self, address: int, size: int, placement: Placement, whole: PoolRegion) -> None:
        super().__init__(address, size, placement, keeper=whole.keeper)
        self.whole = whole

    def wait_filled(self, timeout: float) -> None:
        """That of all of it."""
        self.whole.wait_filled(timeout)


class SharedRegions:
    """What one transport exposes of such memory: a region for each allocation, for all its parts.

    Calls come one at a time, as those that register and release.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._wholes: dict[int, PoolRegion] = {}
        """By address."""
        self._parts: dict[int, set[int]] = {}
        """Addresses of the registered parts, by that of the whole."""

    def add(
        self, region_id: int, shared: SharedMemory, address: int, size: int, placement: Placement
    ) -> SharedPart:
        """Register a part. Raises :class:`RegistrationError`."""
        whole = self._wholes.get(shared.address) or self._open(region_id, shared, placement)
        self._parts.setdefault(shared.address, set()).add(address)
        return SharedPart(address, size, placement, whole)

    def remove(self, part: SharedPart) -> None:
        """Undo :meth:`add`; the last one gives the descriptor back."""
        whole = part.whole.address
        self._parts[whole].discard(part.address)
        part.keeper = None
        if not self._parts[whole]:
            self._close(whole)

    def close(self) -> None:
        """Give all of them back."""
        for whole in list(self._wholes):
            self._close(whole)

    def _open(self, region_id: int, shared: SharedMemory, placement: Placement) -> PoolRegion:
        try:
            fd = os.dup(shared.fd)
        except OSError as error:
            raise RegistrationError(f"cannot expose shared memory: {explain(error)}") from error
        whole = PoolRegion(region_id, fd, SharedMapping(shared), placement, "small", self._options)
        whole.sealing = shared.sealing
        self._wholes[shared.address] = whole
        if self._options.populate:
            whole.fill()
        return whole

    def _close(self, address: int) -> None:
        self._wholes[address].close()
        del self._wholes[address]
        self._parts.pop(address, None)


def exposed(regions: Sequence[Region]) -> list[Region]:
    """What a link over these regions exposes: each whole once, in place of its parts.

    Raises :class:`LinkError` where these are more than it can carry.
    """
    wholes = {r.whole.address: r.whole for r in regions if isinstance(r, SharedPart)}
    if len(wholes) > MOST:
        raise LinkError(
            f"{len(wholes)} arrays of datadist.empty are registered, and peers of a link can map {MOST}: "
            "make larger ones that hold several tensors each"
        )
    return [r for r in regions if not isinstance(r, SharedPart)] + list(wholes.values())
