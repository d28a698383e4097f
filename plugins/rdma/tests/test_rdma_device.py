"""The thread of a device: what is left, and said, where none can be started."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
from datadist_rdma import device as device_module
from datadist_rdma import verbs
from datadist_rdma.device import Events

from datadist.transport import TransportError
from tests import descriptors


def test_a_thread_that_cannot_be_started_is_said_and_leaves_no_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(_thread: object) -> None:
        raise RuntimeError("can't start new thread: no memory for its stack")

    read, write = os.pipe()
    channel = SimpleNamespace(contents=SimpleNamespace(fd=read))
    device: Any = SimpleNamespace(name="rxe0", context=1, channel=channel)
    monkeypatch.setattr(device_module, "start", start)
    monkeypatch.setattr(verbs, "async_fd", lambda _: write)
    try:
        before = descriptors.count()
        with pytest.raises(TransportError, match="rxe0 cannot be used: can't start new thread"):
            Events(device)
        assert descriptors.falls_to(before)
    finally:
        os.close(read)
        os.close(write)
