"""The job of this process: engines of different jobs never link, whatever their cluster ids are."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

VARIABLE = "DATADIST_JOB"
XDIST = "xdist-"
"""How the names begin that workers of pytest-xdist get."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:+=,-]{0,63}")


def job_name(environ: Mapping[str, str]) -> str:
    """``DATADIST_JOB``, else a name for the run and worker of pytest-xdist, else the empty name.

    A variable that is set to nothing means the empty name, also below pytest-xdist. Raises
    ``ValueError`` for a name that is no file name.
    """
    chosen = environ.get(VARIABLE)
    if chosen is None:
        return _xdist(environ)
    if chosen and not _NAME.fullmatch(chosen):
        raise ValueError(
            f"{VARIABLE} is {chosen[:200]!r}, expected 1 to 64 ASCII letters, digits and . _ @ : + = , - "
            "(a letter or digit first), the same in all processes that link with each other"
        )
    return chosen


def _xdist(environ: Mapping[str, str]) -> str:
    """Each worker of each run is a separate job, so that its engines do not link with those of others."""
    run, worker = environ.get("PYTEST_XDIST_TESTRUNUID"), environ.get("PYTEST_XDIST_WORKER")
    if not (run and worker):
        return ""
    return f"{XDIST}{hashlib.sha256(f'{run} {worker}'.encode()).hexdigest()[:16]}"


def described(job: str) -> str:
    """A job, for people."""
    return f"job {job!r}" if job else "the job without a name"
