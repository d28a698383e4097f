"""Whose log records are: with several processes on one terminal, texts alone do not tell."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

__all__ = ["attach", "start_speaking", "stop_speaking"]

ROOT = "datadist"


@dataclass(frozen=True)
class _Speaker:
    """The engine of a process."""

    cluster_id: int
    pid: int

    def __str__(self) -> str:
        return f"[cluster {self.cluster_id}, pid {self.pid}]"


_speaker: _Speaker | None = None
"""A process has one engine at a time."""


class _Prefix(logging.Filter):
    """Begins the message of each record with the engine; its arguments stay as they are.

    The record has the engine as ``datadist_engine``, for formatters, and so that a record which
    another logger handles once more is left alone.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep every record."""
        speaker = _speaker
        if speaker is None or speaker.pid != os.getpid() or hasattr(record, "datadist_engine"):
            return True
        record.datadist_engine = str(speaker)
        record.msg = f"{speaker} {record.msg}"
        return True


_prefix = _Prefix()


def start_speaking(cluster_id: int) -> None:
    """From now on records of ``datadist`` and the loggers below it name this engine."""
    global _speaker
    _speaker = _Speaker(cluster_id, os.getpid())
    attach()


def attach() -> None:
    """Include the loggers that were made since, such as those of a plugin that was loaded.

    A filter of a logger sees nothing of what the loggers below it log, so each gets it.
    """
    for name in [ROOT, *logging.root.manager.loggerDict]:
        if name == ROOT or name.startswith(f"{ROOT}."):
            logging.getLogger(name).addFilter(_prefix)


def stop_speaking() -> None:
    """The engine has ended: records name none."""
    global _speaker
    _speaker = None
