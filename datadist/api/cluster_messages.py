"""The engine's part that exchanges messages with linked clusters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datadist.api.descriptors import descriptor_of
from datadist.base import checks
from datadist.base.calls import begin, entries
from datadist.base.keywords import named_keywords
from datadist.base.lazy_module import LazyModule
from datadist.types import ReceivedMessage

if TYPE_CHECKING:  # loaded by init, since their imports are slow
    import typing_extensions as extensions

    from datadist.engine.engine import Engine
else:
    extensions = LazyModule("typing_extensions")

__all__ = ["ClusterMessages"]


@named_keywords
@entries
class ClusterMessages:
    """Small messages between programs, over the control connection of linked engines."""

    def send_message(
        self, cluster: int, data: extensions.Buffer, *, timeout_in_millis: int | None = None
    ) -> None:
        """Send ``data`` (at most 8 KiB, copied) to the program of a linked cluster.

        Messages of one thread arrive in order. 64 of one cluster may wait for the program there: who
        sends more waits until it calls :meth:`messages`, for ``timeout_in_millis`` (None:
        ``sync_kv_timeout``). That the call returns says that the message is on its way; a peer that
        ends may not have read it.

        Raises ``RuntimeError`` before `init`, ``TypeError``, ``ValueError`` for a cluster that is no
        uint64, and :class:`LLMException`: LLM_PARAM_INVALID for data that is too large, this engine's
        own cluster or a wrong time, LLM_NOT_YET_LINK, LLM_TIMEOUT, LLM_ENGINE_FINALIZED.
        """
        from datadist.api.call_options import message_bytes, seconds_of
        from datadist.transfers.limits import CallLimit

        begin("send_message")
        engine = self._initialised()
        checks.check_uint64("cluster", cluster)
        content, limit = message_bytes("data", data), CallLimit(seconds_of(timeout_in_millis))
        engine.notices.send(cluster, content, limit)

    def messages(self) -> list[ReceivedMessage]:
        """The messages that wait, in the order of their arrival; none are left. Never blocks.

        ``cluster_id`` is the sender's, ``data`` what it sent. What a peer sent before it ended, or
        before the link to it ended, stays until it is taken here or the engine is finalized.

        Raises ``RuntimeError`` before `init`.
        """
        begin("messages")
        return self._initialised().notices.take()

    def messages_fileno(self) -> int:
        """A descriptor that is readable while :meth:`messages` may have some, for `select` and the like.

        Now and then it is readable for nothing. It belongs to the engine: do not read or close it.
        Raises ``RuntimeError`` before `init`, LLMException (LLM_FAILED) where no descriptor is left.
        """
        begin("messages_fileno")
        return descriptor_of(self._initialised().notices.inbox, "messages")

    def _initialised(self) -> Engine:
        raise NotImplementedError
