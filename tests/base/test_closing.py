"""Closing what another process made (closing.py)."""

from __future__ import annotations

import os
import select

import pytest

from datadist.base import closing


def test_descriptors_are_closed_on_a_thread_of_their_own() -> None:
    reader, writer = os.pipe()
    try:
        closing.close_elsewhere([writer, 1 << 20])  # the second one is no descriptor
        assert select.select([reader], [], [], 10)[0]
        assert os.read(reader, 1) == b""
    finally:
        os.close(reader)


def test_who_has_no_thread_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_thread: object) -> None:
        raise RuntimeError("no thread is left")

    monkeypatch.setattr("datadist.base.threads.start", refuse)
    with pytest.raises(RuntimeError, match="no thread"):
        closing.close_elsewhere([1 << 20])
