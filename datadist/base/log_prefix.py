"""Whose log records are: with several processes on one terminal, texts alone do not tell."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

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
    """Begins the message of each record with the engine; its arguments stay as they are.

    The record has the engine as ``datadist_engine``, for formatters, and so that a record which
    another logger handles once more is left alone.
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
    """From now on records of ``datadist`` and the loggers below it name this engine."""
    global _engine
    _engine = _Engine(cluster_id, os.getpid())
    attach()


def attach() -> None:
    """Include the loggers that were made since, such as those of a plugin that was loaded.

    A filter of a logger sees nothing of what the loggers below it log, so each gets it.
    """
    for name in [ROOT, *logging.root.manager.loggerDict]:
        if name == ROOT or name.startswith(f"{ROOT}."):
            logging.getLogger(name).addFilter(_prefix)


def clear_log_prefix() -> None:
    """The engine has ended: records name none."""
    global _engine
    _engine = None
