"""The scheduler half: which blocks are granted, which are loaded, and when blocks may be reused."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from datadist_vllm.groups import Groups
from datadist_vllm.messages import Finished, Granting, Load, StepMetadata
from datadist_vllm.metrics import RECOMPUTED, DataDistStats
from datadist_vllm.parameters import RankAddress, Source, answer_of, digest_of, source_of
from datadist_vllm.settings import Settings

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = init_logger(f"vllm.{__name__}")

WELL = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)
RENEWED_AFTER = 1 / 3
"""Of a lease, so that a renewal that comes late is still in time."""
REMEMBERED_KEYS = 4096
"""Of grants that were read here: further requests with one of them compute, or use the prefix cache."""


@dataclass
class _Prefill:
    """A request that is computed here for a decoder."""

    request: Request
    key: int
    granted: bool = False


@dataclass
class _Decode:
    """A request whose first tokens were computed elsewhere."""

    source: Source
    taken: bool = False
    """Whether it was decided to read or release it."""
    renew_at: float = 0.0
    """When its lease is to be renewed, while it waits to be scheduled."""


class SchedulerHalf:
    """Runs in the scheduler's process; one per instance."""

    def __init__(self, engine_id: str, groups: Groups, settings: Settings) -> None:
        self._settings = settings
        self._engine_id = engine_id
        self._groups = groups
        self._ranks: tuple[RankAddress, ...] = ()
        self._next_key = secrets.randbits(62)
        self._prefills: dict[str, _Prefill] = {}
        self._decodes: dict[str, _Decode] = {}
        self._loading: dict[int, str] = {}
        """The request that reads a grant, by the key of the grant."""
        self._tokens: dict[str, int] = {}
        """Of the requests that are loaded."""
        self._stats = DataDistStats()
        self._read: OrderedDict[int, None] = OrderedDict()
        self._step = StepMetadata()

    def set_ranks(self, ranks: Sequence[RankAddress]) -> None:
        """The addresses of this instance's workers, in the order of their ranks."""
        self._ranks = tuple(ranks)

    # -- requests come -------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        """Take note of what a request's parameters ask for; those that are wrong are ignored."""
        params = request.kv_transfer_params or {}
        if params.get("do_remote_decode") and request.prompt_token_ids is not None:
            self._shorten(request)
            self._prefills[request.request_id] = _Prefill(request, self._new_key())
        if params.get("do_remote_prefill") or (
            params.get("do_remote_decode") and params.get("remote_block_ids")
        ):
            source = self._checked_source(request, params)
            if source is not None:
                self._decodes[request.request_id] = _Decode(source)

    def _new_key(self) -> int:
        self._next_key += 1
        return self._next_key

    def _shorten(self, request: Request) -> None:
        """Leave the last prompt token to the decoder, where windows move on with each token.

        The decoder computes the last token anyway. Once the prefiller has computed it, vLLM may free
        a block that the decoder still needs for it.
        """
        params = request.kv_transfer_params
        assert params is not None
        if not self._groups.have_windows or params.get("_shortened"):
            return
        request.max_tokens = 1
        if request.num_prompt_tokens > 1 and not request.get_skip_reading_prefix_cache():
            assert request.prompt_token_ids is not None
            del request.prompt_token_ids[-1:]
            del request._all_token_ids[-1:]
            request.num_prompt_tokens -= 1
            params["_shortened"] = True

    def _checked_source(self, request: Request, params: dict[str, Any]) -> Source | None:
        try:
            source = source_of(params)
            expected = tuple(len(group.span(source.tokens)) for group in self._groups)
            if source.blocks != expected:
                raise ValueError(
                    f"they name {source.blocks} blocks by cache group, and {source.tokens} tokens have "
                    f"{expected} here, where blocks have {[g.block_size for g in self._groups]} tokens"
                )
        except ValueError as error:
            logger.warning(
                "request %s: its kv_transfer_params cannot be used, its prompt is computed here: %s",
                request.request_id,
                error,
            )
            return None
        tokens = request.prompt_token_ids or []
        if len(tokens) < source.tokens or digest_of(tokens[: source.tokens]) != source.digest:
            logger.warning(
                "request %s: its prompt does not begin with the %d tokens that %s has computed as %s; "
                "it is computed here",
                request.request_id,
                source.tokens,
                source.engine_id,
                source.request_id,
            )
            self._step.releases.append(source)
            return None
        return source

    # -- requests are scheduled ----------------------------------------------------------------

    def matched_tokens(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """How many tokens can be loaded beyond those that are here; None: ask again later."""
        decode = self._decodes.get(request.request_id)
        if decode is None or decode.taken or decode.source.key in self._read:
            return 0, False
        if decode.source.key in self._loading:
            return None, False  # of the same prompt: most of it will be in the prefix cache
        count = decode.source.tokens - computed
        return (count, True) if count > 0 else (0, False)

    def after_alloc(self, request: Request, blocks: KVCacheBlocks, external: int) -> None:
        """Load into the blocks, or release the source where all is here already."""
        decode = self._decodes.get(request.request_id)
        if decode is None or decode.taken:
            return
        decode.taken = True
        source = decode.source
        if external:
            self._loading[source.key] = request.request_id
            self._tokens[request.request_id] = external
            self._step.loads.append(self._load(request.request_id, source, blocks, external))
        elif source.key not in self._read:
            self._step.releases.append(source)

    def _load(self, request_id: str, source: Source, blocks: KVCacheBlocks, external: int) -> Load:
        """The granted blocks that are not here, and where they go."""
        positions, own = [], []
        begin = 0
        for group, granted, here in zip(self._groups, source.blocks, blocks.blocks, strict=True):
            for place, index in enumerate(group.span(source.tokens), begin):
                block = here[index]
                if not block.is_null and block.block_hash is None:
                    positions.append(place)
                    own.append(block.block_id)
            begin += granted
        return Load(request_id, source, positions, own, external)

    def build_meta(self, output: SchedulerOutput) -> StepMetadata:
        """What the workers hear in this step; begins the next one."""
        for request_id in output.preempted_req_ids or ():
            self._preempted(request_id)
        for request_id, count in output.num_scheduled_tokens.items():
            prefill = self._prefills.get(request_id)
            if prefill is not None and not prefill.granted:
                self._grant_once_computed(prefill, count, output)
        self._renew_waiting()
        step, self._step = self._step, StepMetadata()
        return step

    def _renew_waiting(self) -> None:
        """Keep the blocks of requests that wait here to be scheduled."""
        now = time.monotonic()
        for each in self._decodes.values():
            if not each.taken and now >= each.renew_at:
                each.renew_at = now + each.source.lease_seconds * RENEWED_AFTER
                self._step.renewals.append(each.source)

    def stats(self) -> DataDistStats | None:
        """What was counted since the last look."""
        return self._stats.taken()

    def _preempted(self, request_id: str) -> None:
        prefill = self._prefills.get(request_id)
        if prefill is not None and prefill.granted:
            prefill.granted = False
            self._step.revokes.append(request_id)

    def _grant_once_computed(self, prefill: _Prefill, count: int, output: SchedulerOutput) -> None:
        """Grant in the step that computes the last prompt tokens: its answer overtakes the next step."""
        request = prefill.request
        if request.num_computed_tokens + count < request.num_prompt_tokens:
            return
        state = output.kv_connector_block_state
        assert state is not None
        block_ids = state.get_block_ids(request.request_id)
        assert block_ids is not None
        needed = self._groups.needed(block_ids, request.num_prompt_tokens)
        prefill.granted = True
        self._step.grants.append(
            Granting(request.request_id, prefill.key, [each for group in needed for each in group])
        )

    # -- requests end --------------------------------------------------------------------------

    def finished(
        self, request: Request, block_ids: Sequence[Sequence[int]]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Whether the blocks are kept for readers, and the parameters of the answer."""
        was_decoded = self._decode_finished(request)
        well = request.status in WELL
        prefill = self._prefills.pop(request.request_id, None)
        if prefill is None:
            keep = was_decoded and well and self._settings.keep_seconds > 0
            return self._kept(request, block_ids) if keep else (False, None)
        if prefill.granted and well:
            tokens = request.num_prompt_tokens
            return True, self._answer(request, prefill.key, tokens, block_ids, prefilled=True)
        if prefill.granted:
            self._step.revokes.append(request.request_id)
        return False, None

    def _kept(
        self, request: Request, block_ids: Sequence[Sequence[int]]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Keep a decoder's blocks for the next turn; the last token was sampled, and not computed.

        They are granted in the next step. Who asks before that is refused, and computes.
        """
        tokens = min(request.num_computed_tokens, request.num_tokens - 1)
        key = self._new_key()
        needed = self._groups.needed(block_ids, tokens)
        blocks = [each for group in needed for each in group]
        self._step.grants.append(Granting(request.request_id, key, blocks))
        return True, self._answer(request, key, tokens, block_ids, prefilled=False)

    def _answer(
        self,
        request: Request,
        key: int,
        tokens: int,
        block_ids: Sequence[Sequence[int]],
        prefilled: bool,
    ) -> dict[str, Any]:
        """Begin the lease; the parameters of the answer."""
        settings = self._settings
        seconds = settings.lease_seconds if prefilled else settings.keep_seconds
        self._step.finished.append(Finished(request.request_id, seconds))
        needed = self._groups.needed(block_ids, tokens)
        source = Source(
            engine_id=self._engine_id,
            request_id=request.request_id,
            key=key,
            ranks=self._ranks,
            blocks=tuple(len(group) for group in needed),
            tokens=tokens,
            digest=digest_of(request.all_token_ids[:tokens]),
            lease_seconds=seconds,
        )
        return answer_of(source, needed, prefilled)

    def _decode_finished(self, request: Request) -> bool:
        """A request that was aborted before it was scheduled, or while it is loaded, reads no more.

        Whether its first tokens were computed elsewhere.
        """
        decode = self._decodes.pop(request.request_id, None)
        if decode is None:
            return False
        if not decode.taken:
            self._step.releases.append(decode.source)
        elif self._loading.get(decode.source.key) == request.request_id:
            self._step.cancels.append(request.request_id)
            self._tokens[request.request_id] = 0  # nobody computes them
        return True

    def received(self, request_ids: Set[str], failed: Set[str]) -> None:
        """Loads have ended."""
        for key in [key for key, each in self._loading.items() if each in request_ids]:
            request_id = self._loading.pop(key)
            tokens = self._tokens.pop(request_id)
            if request_id in failed:
                self._stats.count(RECOMPUTED, tokens)
            else:
                self._read[key] = None
                if len(self._read) > REMEMBERED_KEYS:
                    self._read.popitem(last=False)
