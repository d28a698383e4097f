"""A transfer over RDMA that goes on after its time limit, since the network device has its requests."""

from __future__ import annotations

from datadist_hccl.acl import Runtime
from datadist_hccl.communicator import Communicator


class Flight:
    """Settled when its stream is through without a failure, or the communicator is gone.

    After a failure the network device may still have requests: only the end of the communicator
    takes them back.
    """

    def __init__(self, runtime: Runtime, communicator: Communicator, stream: int) -> None:
        self._runtime = runtime
        self._communicator = communicator
        self._stream = stream
        self._done = False
        self._failed = False

    def settled(self) -> bool:
        """See :class:`datadist.transport.InFlight`."""
        if not self._done and not self._failed:
            self._communicator.look(self._look)
        return self._done or self._communicator.ended

    def _look(self) -> None:
        if self._runtime.is_through(self._stream):
            failed = self._runtime.synchronize(self._stream, 0.0) != 0  # which does not wait now
            self._done, self._failed = not failed, failed
