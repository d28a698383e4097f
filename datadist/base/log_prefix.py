"""Adds the engine's name to log records, so that records of several processes can be distinguished."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

from datadist.base.log_locks import give_back_locks, giving_back

__all__ = ["attach", "clear_log_prefix", "set_log_prefix"]

ROOT = "datadist"


@dataclass(frozen=True)
class _Engine:
    """The engine of a process."""

    cluster_id: int
    pid: int

    def __str__(self) -> str:
        return f"[cluster {self.cluster_id}, pid {self.pid}]"


_engine: _Engine | None = None
"""A process has one engine at a time."""


class _Prefix(logging.Filter):
    """Prepends the engine to the message of each record; the arguments do not change.

    The record gets the attribute ``datadist_engine``. Formatters can use it, and it prevents a
    second prefix if another logger handles the record again.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep every record."""
        engine = _engine
        if engine is None or engine.pid != os.getpid() or hasattr(record, "datadist_engine"):
            return True
        record.datadist_engine = str(engine)
        record.msg = f"{engine} {record.msg}"
        return True


_prefix = _Prefix()


def set_log_prefix(cluster_id: int) -> None:
    """Add this engine to all following records of ``datadist`` and its child loggers."""
    global _engine
    _engine = _Engine(cluster_id, os.getpid())
    attach()


def attach() -> None:
    """Include loggers that were created since, such as those of a loaded plugin.

    A filter of a logger does not see records of its child loggers, so each logger needs it.
    """
    for name in [ROOT, *logging.root.manager.loggerDict]:
        if name == ROOT or name.startswith(f"{ROOT}."):
            logger = giving_back(logging.getLogger, name)
            logger.addFilter(_prefix)
            give_back_locks(logger)


def clear_log_prefix() -> None:
    """Remove the prefix after the engine has ended."""
    global _engine
    _engine = None
