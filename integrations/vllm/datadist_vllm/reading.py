"""Loads: the blocks of a request, read from all ranks of the other instance that have a part of them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vllm.logger import init_logger

from datadist import CacheKey, LLMDataDist, LLMException, LLMStatusCode, TransferTask
from datadist_vllm import renewals
from datadist_vllm.links import Links
from datadist_vllm.messages import Load
from datadist_vllm.parameters import RankAddress, Source
from datadist_vllm.ranks import Piece, Split, pieces_of
from datadist_vllm.regions import Region

logger = init_logger(f"vllm.{__name__}")


SETTLE_SECONDS = 60.0
"""Longest time that a load waits for a transport to let go of its blocks; after 30 s it is made to."""
MESSAGE_MILLIS = 1000
"""Longest time to send a message."""


@dataclass(frozen=True)
class LoadResult:
    """How a load has ended."""

    load: Load
    error: str | None
    seconds: float
    bytes: int
    cancelled: bool
    transport: str


@dataclass
class _Run:
    """A load that goes on."""

    load: Load
    began: float
    seconds: float = 0.0
    outstanding: int = 1
    """Pulls, and steps towards them, that have not ended."""
    errors: list[str] = field(default_factory=list)
    tasks: list[TransferTask] = field(default_factory=list)
    cancelled: bool = False
    bytes: int = 0
    transports: set[str] = field(default_factory=set)
    timed_out: set[int] = field(default_factory=set)
    """Clusters of pulls that timed out: the transport may not have let go of our blocks yet."""
    settled_by: float = 0.0


class Reading:
    """All loads of one worker. Methods are called by vLLM's thread, and wait for nothing."""

    def __init__(
        self,
        engine: LLMDataDist,
        links: Links,
        regions: Sequence[Region],
        rank: int,
        split: Split,
        seconds: float,
    ) -> None:
        self._engine = engine
        self._links = links
        self._regions = regions
        self._rank = rank
        self._split = split
        self._millis = int(seconds * 1000)
        self._lock = threading.Lock()
        self._runs: dict[str, _Run] = {}
        self._ended: deque[_Run] = deque()
        self._one_has_ended = threading.Event()

    def begin(self, load: Load) -> None:
        """Read; `ended` has the result."""
        run = _Run(load, time.monotonic())
        self._runs[load.request_id] = run

        def ready(pieces: list[tuple[Piece, RankAddress]]) -> None:
            with self._lock:
                run.outstanding += len(pieces)
            for piece, address in pieces:
                self._pull(run, piece, address, 2)
            self._one_ended(run, None)

        self._with_pieces(load.source, ready, lambda reason: self._one_ended(run, reason))

    def cancel(self, request_id: str) -> None:
        """End a load whose request was aborted; it is among `ended` once its blocks are not written."""
        run = self._runs.get(request_id)
        if run is not None:
            run.cancelled = True
            for task in list(run.tasks):
                task.cancel()

    def wait(self, seconds: float) -> None:
        """Until a load has ended, if any goes on; for a step that has nothing else to do."""
        self._one_has_ended.clear()
        if self._runs and not self._ended:
            self._one_has_ended.wait(seconds)

    def ended(self) -> list[LoadResult]:
        """The loads that have ended since the last call."""
        found = []
        for _ in range(len(self._ended)):
            run = self._ended.popleft()
            if self._has_settled(run):
                self._runs.pop(run.load.request_id, None)
                found.append(self._result_of(run))
            else:
                self._ended.append(run)
        return found

    def _result_of(self, run: _Run) -> LoadResult:
        return LoadResult(
            run.load,
            run.errors[0] if run.errors else None,
            run.seconds,
            run.bytes,
            run.cancelled,
            ", ".join(sorted(run.transports)) or str(self._engine.backend),
        )

    def _has_settled(self, run: _Run) -> bool:
        """Whether nothing writes to its blocks any more: vLLM may use them again."""
        run.timed_out = {cluster for cluster in run.timed_out if self._goes_on(cluster)}
        if run.timed_out and time.monotonic() < run.settled_by:
            return False
        if run.timed_out:
            logger.error(
                "request %s: its transfer from cluster %s did not end in %g s, its blocks are used again",
                run.load.request_id, sorted(run.timed_out), SETTLE_SECONDS,
            )  # fmt: skip
        return True

    def _goes_on(self, cluster: int) -> bool:
        """Whether a transfer of a link may go on, as the link tells; one that is gone has ended all."""
        try:
            return self._engine.link_error(cluster_id=cluster) is not None
        except LLMException:
            return False

    def release(self, source: Source) -> None:
        """Tell the owner that nobody here reads the source."""

        def ready(pieces: list[tuple[Piece, RankAddress]]) -> None:
            for _, address in pieces:
                self._release_at(source, address)

        def failed(reason: str) -> None:
            logger.info("%s is not released at %s, its lease will end: %s",
                        source.request_id, source.engine_id, reason)  # fmt: skip

        self._with_pieces(source, ready, failed)

    def renew(self, sources: Sequence[Source]) -> None:
        """Ask the owners to keep the blocks for another lease."""
        for source in sources:

            def ready(pieces: list[tuple[Piece, RankAddress]], key: int = source.key) -> None:
                for _, address in pieces:
                    self._links.run(partial(self._renew_at, address.cluster, key))

            self._with_pieces(source, ready, lambda reason: logger.info("not renewed: %s", reason))

    def _renew_at(self, cluster: int, key: int) -> None:
        try:
            for message in renewals.encode([key]):
                self._engine.send_message(cluster, message, timeout_in_millis=MESSAGE_MILLIS)
        except LLMException as error:
            logger.info("a lease at cluster %d is not renewed: %s", cluster, error)

    def _with_pieces(
        self,
        source: Source,
        ready: Callable[[list[tuple[Piece, RankAddress]]], None],
        failed: Callable[[str], None],
    ) -> None:
        """Ask one rank of the source how its instance is split; hand over what this rank reads."""

        def linked(answer: dict[str, Any] | str) -> None:
            if isinstance(answer, str):
                failed(answer)
                return
            try:
                pieces = pieces_of(self._rank, self._split, _split_of(answer, source))
            except ValueError as error:
                failed(str(error))
                return
            ready([(piece, source.ranks[piece.rank]) for piece in pieces])

        self._links.when_linked(source.ranks[self._rank % len(source.ranks)], linked)

    def _pull(self, run: _Run, piece: Piece, address: RankAddress, attempts: int) -> None:
        def linked(answer: dict[str, Any] | str) -> None:
            if isinstance(answer, str):
                self._one_ended(run, answer)
            elif run.cancelled:
                self._one_ended(run, "the request was aborted")
            else:
                self._start(run, piece, address, answer, attempts)

        self._links.when_linked(address, linked)

    def _start(
        self, run: _Run, piece: Piece, address: RankAddress, own: dict[str, Any], attempts: int
    ) -> None:
        """One task per region, which has a grant of its own."""
        with self._lock:
            run.outstanding += len(self._regions) - 1
            run.transports.add(self._links.transport(address))
        for place, region in enumerate(self._regions):

            def done(task: TransferTask) -> None:
                self._task_ended(task, run, piece, address, own, attempts)

            try:
                task = self._task(run, piece, address, place, region)
            except LLMException as error:
                self._one_ended(run, str(error))
                continue
            run.tasks.append(task)
            task.add_done_callback(done)

    def _task(
        self, run: _Run, piece: Piece, address: RankAddress, place: int, region: Region
    ) -> TransferTask:
        load, layers = run.load, region.layers
        task = self._engine.cache_manager.pull_blocks_async(
            CacheKey(address.cluster, load.source.key, model_id=place),
            region.cache(piece.local_split),
            load.positions,
            load.blocks,
            src_layer_range=_layers(piece.remote_parts, layers),
            dst_layer_range=_layers(piece.local_parts, layers),
            release=True,
            timeout_in_millis=self._millis,
        )
        run.bytes += (
            len(load.blocks) * layers * region.block_bytes
            * len(piece.local_parts) // piece.local_split
        )  # fmt: skip
        return task

    def _task_ended(
        self,
        task: TransferTask,
        run: _Run,
        piece: Piece,
        address: RankAddress,
        own: dict[str, Any],
        attempts: int,
    ) -> None:
        """A link that broke before the pull is made again, once."""
        try:
            task.result(0)
        except LLMException as error:
            if error.status_code is LLMStatusCode.LLM_TIMEOUT:
                run.timed_out.add(address.cluster)
            if error.status_code is LLMStatusCode.LLM_NOT_YET_LINK:
                self._links.forget(address, own)
                if attempts > 1 and len(self._regions) == 1 and not run.cancelled:
                    self._pull(run, piece, address, attempts - 1)
                    return
            self._one_ended(run, f"cluster {address.cluster} at {address.host}: {error}")
        else:
            self._one_ended(run, None)

    def _one_ended(self, run: _Run, error: str | None) -> None:
        with self._lock:
            run.outstanding -= 1
            if error is not None:
                run.errors.append(error)
            last = run.outstanding == 0
        if last:
            if run.errors and run.tasks:  # the owner need not keep the blocks
                self.release(run.load.source)
            now = time.monotonic()
            run.seconds, run.settled_by = now - run.began, now + SETTLE_SECONDS
            self._ended.append(run)
            self._one_has_ended.set()

    def _release_at(self, source: Source, address: RankAddress) -> None:
        def linked(answer: dict[str, Any] | str) -> None:
            if isinstance(answer, str):
                return
            for place in range(len(self._regions)):
                try:
                    self._engine.cache_manager.release_grant(
                        CacheKey(address.cluster, source.key, model_id=place)
                    )
                except LLMException as error:
                    logger.info(
                        "%s is not released, its lease will end: %s", source.request_id, error
                    )

        self._links.when_linked(address, linked)


def _split_of(own: dict[str, Any], source: Source) -> Split:
    """How the other instance is split, as it says itself. Raises ``ValueError``."""
    try:
        split = Split(int(own["ranks"]), int(own["shards"]), int(own["parts"]))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"it does not say how it is split, but {own!r}") from None
    if split.ranks != len(source.ranks) or not 0 < split.shards <= split.ranks or split.parts < 1:
        raise ValueError(
            f"it says that it is split as {split}, and names {len(source.ranks)} ranks"
        )
    return split


def _layers(parts: range, layers: int) -> range:
    return range(parts.start * layers, parts.stop * layers)
