"""One side of a link: what one rank may do with our memory, and what we may do with its memory."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from datadist.transport import Access, PeerLost, TransferError
from datadist_nixl.library import Kind
from datadist_nixl.memory import NixlRegion, Ranges
from datadist_nixl.wire import SECRET_BYTES


class Side:
    """Made with the link; the rank's offer completes it."""

    def __init__(self, rank: int, regions: Sequence[NixlRegion], access: Access) -> None:
        self.rank = rank
        self.secret = secrets.token_bytes(SECRET_BYTES)
        """Requests of the rank must carry it."""
        self.ours = Ranges((r.address, r.size, r) for r in regions)
        self.writable = access is Access.READ_WRITE
        self.theirs: Ranges[Kind] | None = None
        """None until the rank's offer was attached."""
        self.their_secret = b""
        self.may_write = False
        self.ended: str | None = None
        """Why no transfer is possible any more; set once, in one step."""
        self.lost = False
        self.writers: set[object] = set()
        """Writes of the rank that were allowed and have not ended: they may touch our memory."""

    def end(self, reason: str, lost: bool = False) -> None:
        """Refuse transfers and requests from now on."""
        if self.ended is None:
            self.lost = lost
            self.ended = reason

    def error(self) -> TransferError:
        """What a transfer raises once the side has ended."""
        text = f"rank {self.rank}: {self.ended}"
        return PeerLost(text, self.rank) if self.lost else TransferError(text)
