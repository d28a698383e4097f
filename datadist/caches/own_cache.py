"""What is noted of one cache of ours while it is made, lives, and goes."""

from __future__ import annotations

from dataclasses import dataclass, field

from datadist.base.flag import Flag
from datadist.base.range_set import RangeSet
from datadist.caches.block_ranges import BlockRanges
from datadist.caches.peers import PeerView
from datadist.caches.pool import Run
from datadist.control.messages import Binding, Entry
from datadist.status import LLMException, LLMStatusCode, param_invalid
from datadist.transport import Placement

__all__ = ["Birth", "Layout", "Leaving", "OwnCache", "Waiter"]


@dataclass(frozen=True)
class Layout:
    """Where a cache lies: one base address per tensor, ``count`` slots or blocks in each.

    They begin ``stride`` bytes apart; the last one ends the ``tensor_size`` bytes.
    """

    blocks: bool
    bases: tuple[int, ...]
    stride: int
    count: int
    tensor_size: int
    placement: Placement
    data_type: int
    """Number of a :class:`~datadist.types.DataType`."""
    tensors_per_layer: int = 2
    cuts: tuple[int, ...] = ()
    """Where two regions of the transport meet inside of a block: no segment of a transfer crosses it."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a slot or block."""
        return self.tensor_size - (self.count - 1) * self.stride

    @property
    def dense(self) -> bool:
        """Whether slots or blocks lie side by side."""
        return self.tensor_size == self.count * self.stride

    @property
    def ranges(self) -> BlockRanges:
        """The bytes that belong to it."""
        return BlockRanges(self.bases, self.tensor_size, self.stride, self.block_bytes)

    def __post_init__(self) -> None:
        """Raises LLM_PARAM_INVALID for memory that no address reaches."""
        last = max(self.bases)
        if last + self.tensor_size >= 1 << 63:
            raise param_invalid(f"{self.tensor_size} bytes at {last:#x} end beyond any address")


@dataclass(eq=False)
class OwnCache:
    """A cache of this engine."""

    cache_id: int
    layout: Layout
    pooled: bool
    accessible: bool
    regions: tuple[int, ...]
    bindings: dict[int, Binding] = field(default_factory=dict)
    covered: dict[int, RangeSet] = field(default_factory=dict)
    """Tensors that peers have pulled, per binding."""
    held: bool = True
    """Whether the id still references it."""
    pins: set[int] = field(default_factory=set)
    """Of the local transfers that use the memory, by token: adding and discarding need no lock."""
    runs: list[Run] = field(default_factory=list)
    """What it has of the pool."""
    tensors: list[object] = field(default_factory=list)
    """Of the program, whose memory is registered: kept until that is let go. The handle has this list."""

    @property
    def unreferenced(self) -> bool:
        """Whether neither its id nor a key keeps a cache of the pool."""
        return self.pooled and not self.held and not self.bindings

    def entry(self) -> Entry:
        """What peers are told."""
        layout = self.layout
        return Entry(
            cache_id=self.cache_id,
            blocks=layout.blocks,
            bases=list(layout.bases),
            stride=layout.stride,
            count=layout.count,
            tensor_size=layout.tensor_size,
            data_type=layout.data_type,
            tensors_per_layer=layout.tensors_per_layer,
            placement=layout.placement,
            pooled=self.pooled,
            accessible=self.accessible,
            regions=sorted(set(self.regions)),
            cuts=list(layout.cuts),
            bindings=list(self.bindings.values()),
        )


@dataclass(eq=False)
class Waiter:
    """A call that unregisters registered memory, and lets go of it unless it is interrupted."""

    waits: bool
    leaving: Leaving | None = None


@dataclass(eq=False)
class Leaving:
    """A cache that is gone, while its memory is not yet given back or let go."""

    cache: OwnCache
    targets: dict[PeerView, int] = field(default_factory=dict)
    """What each peer must acknowledge."""
    released_by_peers: Flag = field(default_factory=Flag)
    """Peers have let go of it."""
    idle: Flag = field(default_factory=Flag)
    """No local transfer uses it any more."""
    waiter: Waiter | None = None
    """Who will let go of registered memory."""

    @property
    def waited_for(self) -> bool:
        """Whether somebody does, and nobody else has to."""
        return self.waiter is not None and self.waiter.waits

    def kept(self) -> LLMException:
        """Why registered memory cannot be let go."""
        late = [
            f"cluster {view.session.cluster_id} ({view.session.peer})"
            for view, seq in self.targets.items()
            if view.seq_acked < seq and not view.gone
        ]
        return LLMException(
            f"cache {self.cache.cache_id} stays registered: {', '.join(late)} did not confirm that it "
            "has stopped writing (is it stopped?); try again when it answers or has ended",
            status_code=LLMStatusCode.LLM_FAILED,
        )


@dataclass(eq=False)
class Birth:
    """A cache that is being made, and what was taken for it: all of that goes if it fails."""

    cache_id: int
    pool: Placement | None
    """None for memory that is registered."""
    runs: list[Run] = field(default_factory=list)
    """Of the pool."""
    made: bool = False
    """Whether the caller has it: what was taken is the cache's."""
    failed: bool = False
