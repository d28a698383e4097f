"""The whole library over RoCE on one host: the tests of core, with nodes on this transport."""

from __future__ import annotations

__all__ = [name for name in dir() if name.startswith("test_")]
