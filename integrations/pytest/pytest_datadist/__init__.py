"""Fixtures of pytest for code that is written against the LLM-DataDist API.

The names here are for annotations and for ``except`` clauses; tests get their objects from fixtures.
"""

from __future__ import annotations

from pytest_datadist.cluster import Cluster
from pytest_datadist.errors import LeftBehind, WorkerEnded, WorkerError, WorkerTimeout
from pytest_datadist.isolation import Isolation
from pytest_datadist.worker import Call, Kept, Worker

__all__ = [
    "Call",
    "Cluster",
    "Isolation",
    "Kept",
    "LeftBehind",
    "Worker",
    "WorkerEnded",
    "WorkerError",
    "WorkerTimeout",
]
