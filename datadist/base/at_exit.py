"""The end of the process: what daemon threads that are inside a call of the engine get then."""

from __future__ import annotations

import threading
from types import TracebackType

__all__ = ["expect_daemon_threads_to_fail"]

OWN = "datadist"
"""How the modules of this library and of its transports begin."""


def expect_daemon_threads_to_fail() -> None:
    """From now on, print nothing for a daemon thread that ends with an exception of this library.

    The engine is finalized at exit, and threads that the program did not wait for may be inside a call.
    """
    report = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (args.thread and args.thread.daemon and _is_ours(args.exc_traceback)):
            report(args)

    threading.excepthook = hook


def _is_ours(trace: TracebackType | None) -> bool:
    """Whether the exception was raised in this library or a transport of it."""
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__")).startswith(OWN)
